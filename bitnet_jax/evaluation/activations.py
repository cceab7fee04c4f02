"""What goes into the linear layers of a model: ranges, outliers and zeros of activations, layer by layer."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bitnet_jax import quant
from bitnet_jax.array_types import Array, Float, Int32, Positions
from bitnet_jax.bitlinear import BitLinear, normalized
from bitnet_jax.config import ActivationQuantizer, Linear, ModelConfig, NormPlacement
from bitnet_jax.errors import UserError
from bitnet_jax.programs import Program
from bitnet_jax.transformer import Block

OUTLIER = 6.0
"""How many times the root mean square an outlier is larger than: 2e-9 of a normal distribution are."""
_INPUTS = {"q": "qkv", "o": "o", "up": "gate_up", "down": "down"}
"""The layer whose input is looked at → what that input is called; q, k and v have one, and so have gate and up."""


@dataclass(frozen=True, kw_only=True)
class ActivationStatistics:
    """Activations that one or several linear layers of a block multiply, over all tokens of a text, as they are before quantisation.

    Where the norm is inside the linear layer they are what comes out of that norm.

    Attributes:
        layer: number of the block, from 0 on.
        input: "qkv", "o", "gate_up" (also where there is no gate) or "down".
        absmax: largest |x|.
        token_absmax: median over the tokens of each one's largest |x|, which becomes its largest code.
        rms: root of the mean of x^2.
        kurtosis: mean of (x - mean)^4 over the variance squared; 3 for a normal distribution.
        outliers: share of |x| > `OUTLIER` * rms.
        zeros: share of x that are 0, as relu leaves them.
        zero_codes: share of x whose code is 0, those that rounding makes 0 included; None where activations are not quantised.
        channel_absmax: largest |x| of each input feature [K].
    """

    layer: int
    input: str
    absmax: float
    token_absmax: float
    rms: float
    kurtosis: float
    outliers: float
    zeros: float
    zero_codes: float | None
    channel_absmax: np.ndarray


def activation_statistics(
    params: Any, config: ModelConfig, tokens: np.ndarray, implementation: str | None = None
) -> list[ActivationStatistics]:
    """Statistics of the inputs of all linear layers while the model reads `tokens`: four for each block, in the order of the product.

    One block is compiled and run at a time, so that a model of any depth takes the time to compile and the memory of one block.

    Args:
        params: latent or packed parameters, scanned or looped.
        config: their configuration.
        tokens: [B, T] integers; rows are texts by themselves.
        implementation: of `ternary_matmul` for packed weights, as in `Transformer`.

    Raises:
        UserError: tokens are not [B, T] or not in the vocabulary, or the parameters do not fit the configuration.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype.kind not in "iu":
        raise UserError(f"tokens are {tokens.dtype} of shape {tokens.shape}: must be integers [B, T]")
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if wrong.size:
        raise UserError(f"tokens hold {wrong[0]}: must be from 0 to {config.vocab_size - 1}, as vocab_size says")
    batch, time = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    x = jnp.asarray(params["embed"]["embedding"])[tokens.astype(np.int32)].astype(config.dtype.value)
    program, found = _program(config, implementation), []
    for layer in range(config.num_layers):
        arguments = _block_params(params, layer), x, jnp.int32(layer), positions
        compiled, _ = program.prepare(*arguments)
        x, numbers = compiled(*arguments)
        for name, of in zip(_INPUTS.values(), (numbers[linear] for linear in _INPUTS), strict=True):
            numpy = {key: np.asarray(value) for key, value in of.items()}
            channels = numpy.pop("channel_absmax")
            scalars: dict[str, Any] = {"zero_codes": None} | {key: float(value) for key, value in numpy.items()}
            found.append(ActivationStatistics(layer=layer, input=name, channel_absmax=channels, **scalars))
    return found


def _block_params(params: Any, layer: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[layer], params["blocks"]) if "blocks" in params else params[f"block_{layer}"]


@functools.cache
def _program(config: ModelConfig, implementation: str | None) -> Program:
    return Program(functools.partial(_run_block, Block(config, implementation, parent=None)))


def _run_block(
    block: Block, params: Any, x: Float[Array, "B T D"], layer: Int32[Array, ""], positions: Positions
) -> tuple[Float[Array, "B T D"], dict[str, dict[str, Array]]]:
    """A block's output, and name of a linear layer → numbers of its input."""
    config, found = block.config, {}

    def look(method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        # Every product asks its layer for the kernel, and hands over what will be multiplied.
        if isinstance(context.module, BitLinear) and context.method_name == "kernel" and context.module.name in _INPUTS:
            inside = config.norm is NormPlacement.INSIDE
            read = cast(Array, normalized(args[0], None, config) if inside else args[0])
            found[context.module.name] = _numbers(read.astype(jnp.float32), config)
        return method(*args, **kwargs)

    with nn.intercept_methods(look):
        (x, _), _ = cast(Any, block.apply({"params": params}, (x, None), layer, positions))
    return x, found


def _numbers(x: Float[Array, "B T K"], config: ModelConfig) -> dict[str, Array]:
    size, rms = jnp.abs(x), jnp.sqrt(jnp.mean(jnp.square(x)))
    centred = x - jnp.mean(x)
    spread = jnp.mean(jnp.square(centred))
    numbers = {
        "absmax": jnp.max(size),
        "token_absmax": jnp.median(jnp.max(size, -1)),
        "rms": rms,
        "kurtosis": jnp.mean(jnp.square(jnp.square(centred))) / jnp.maximum(jnp.square(spread), jnp.finfo(jnp.float32).tiny),
        "outliers": jnp.mean(size > OUTLIER * rms, dtype=jnp.float32),
        "zeros": jnp.mean(x == 0, dtype=jnp.float32),
        "channel_absmax": jnp.max(size, (0, 1)),
    }
    if config.linear is Linear.BIT and config.quant.activation is not ActivationQuantizer.NONE:
        codes, _ = quant.quantize_activations(x, config.quant.for_inference)
        numbers["zero_codes"] = jnp.mean(codes == 0, dtype=jnp.float32)
    return numbers
