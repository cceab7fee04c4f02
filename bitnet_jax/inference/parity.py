"""Proof on a model's own weights and activations that its packed form is the same model."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bitnet_jax import params as trees
from bitnet_jax import partition, quant
from bitnet_jax.array_types import Array, Float, Float32, Hidden, Int32
from bitnet_jax.bitlinear import BitLinear, is_ternary
from bitnet_jax.config import ActivationQuantizer, ModelConfig, NormPlacement, Remat
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.inference import prompts as prompt_arrays
from bitnet_jax.inference.generation import generate
from bitnet_jax.norms import normalize
from bitnet_jax.programs import Program
from bitnet_jax.transformer import Block
from kernels_pallas import PackedTernary, ternary_matmul
from kernels_pallas import unpack as unpack_codes


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How many numbers of a latent and a packed model were compared, and how many of them differ.

    Attributes:
        layers: BitLinear layers.
        weights: ternary codes, all of them: those of the quantiser against those of the packed bytes.
        weights_differ: how many are not equal.
        scales: weight scales, compared bit for bit.
        scales_differ: how many are not equal.
        accumulators: integer sums of products, of every BitLinear on the activations that the model has at that place: the product of
            training, on integers held in the model's compute type, against `ternary_matmul` on packed bytes. 0 where activations are
            not quantised, for then the sums are no integers.
        accumulators_differ: how many are not equal.
        tokens: greedily generated tokens.
        tokens_differ: how many are not equal; those behind the first difference in a row follow from other tokens and count too.
        largest_difference: between the outputs of a latent and of a packed block for the same input; 0 is equality bit for bit. It
            is reported and not part of `proven`: outside the integers, a compiler may round two programs differently.
        where: the first path with a difference; None where there is none.
    """

    layers: int
    weights: int
    weights_differ: int
    scales: int
    scales_differ: int
    accumulators: int
    accumulators_differ: int
    tokens: int
    tokens_differ: int
    largest_difference: float
    where: str | None

    @property
    def proven(self) -> bool:
        """Whether everything that was compared is equal."""
        return not (self.weights_differ or self.scales_differ or self.accumulators_differ or self.tokens_differ)

    def require(self) -> None:
        """Raises RunError, which says what differs, unless `proven`."""
        if not self.proven:
            pairs = (
                (self.weights_differ, self.weights, "weights"),
                (self.scales_differ, self.scales, "scales"),
                (self.accumulators_differ, self.accumulators, "integer sums"),
                (self.tokens_differ, self.tokens, "greedy tokens"),
            )
            found = ", ".join(f"{differ} of {all_} {name}" for differ, all_, name in pairs if differ)
            raise RunError(f"the packed model is not the latent one: {found} differ" + (f", first in {self.where}" if self.where else ""))


def check_parity(
    latent: trees.Params,
    packed: trees.Params,
    config: ModelConfig,
    prompts: Sequence[np.ndarray | Sequence[int]],
    *,
    max_new_tokens: int,
    implementation: str | None = None,
) -> Parity:
    """Compares a latent model with a packed one, in three ways.

    1. Weights: codes and scales of every BitLinear as the forward pass quantises them, against those in the packed tree, exactly.
    2. Products: the latent blocks are run on the prompts one after the other; at every BitLinear its real input is quantised once, and
       the integer sums of the training product and of `ternary_matmul` are compared, exactly.
    3. Text: both models continue the prompts greedily, and the tokens are compared; not where `max_new_tokens` is 0.

    Args:
        latent: parameters as trained.
        packed: what `params.pack` made of them, or a file that should hold the same.
        config: the model's configuration.
        prompts: token ids; together at least one.
        max_new_tokens: new tokens for each prompt; 0 compares no text, and compiles a good deal less.
        implementation: name of the `ternary_matmul` implementation; None chooses.

    Raises:
        UserError: the model has no ternary weights, the trees do not belong together, or as `generate`.
    """
    if not is_ternary(config):
        raise UserError(f"linear={config.linear.value} with weight quantiser {config.quant.weight.value} has no ternary weights to compare")
    config = config.for_inference
    mine, theirs = ({**tree} if "blocks" not in tree else trees.unstack(tree) for tree in (latent, packed))
    _check_trees(mine, theirs, config.dtype.value)
    mine, theirs = jax.device_put((mine, theirs))

    counts = dict.fromkeys(("layers", "weights", "weights_differ", "scales", "scales_differ", "accumulators", "accumulators_differ"), 0)
    where: str | None = None
    largest = 0.0
    ids, lengths = prompt_arrays.pad(prompt_arrays.encode(prompts, config, None, max_new_tokens))
    x = mine["embed"]["embedding"][ids].astype(config.dtype.value)
    counted = jnp.asarray(np.arange(ids.shape[1])[None] < lengths[:, None])
    program = _program(config, implementation)
    for number in range(config.num_layers):
        args = (mine[f"block_{number}"], theirs[f"block_{number}"], x, counted)
        compared, _ = program.prepare(*args)
        x, *numbers = compared(*args)
        difference, found = jax.device_get(numbers)
        largest = max(largest, float(difference))
        for path, measured in sorted(found.items()):
            counts["layers"] += 1
            for name, value in measured.items():
                counts[name] += int(value.sum(dtype=np.int64))
                if where is None and name.endswith("differ") and value.any():
                    where = f"block_{number}/{path}"

    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    if max_new_tokens > 0:
        # What is not a product of packed weights is computed by the same library for both.
        alike = None if implementation in (None, "native") else "xla"
        mine = generate(latent, config, prompts, max_new_tokens=max_new_tokens, implementation=alike).rows
        theirs = generate(packed, config, prompts, max_new_tokens=max_new_tokens, implementation=implementation).rows
        pairs = [(a.tokens, b.tokens) for a, b in zip(mine, theirs, strict=True)]
    return Parity(
        **counts,
        tokens=sum(len(a) for a, _ in pairs),
        tokens_differ=sum(int((a != b).sum()) for a, b in pairs),
        largest_difference=largest,
        where=where,
    )


def _check_trees(latent: trees.Params, packed: trees.Params, compute: str) -> None:
    theirs = dict(trees.leaves(packed))
    for path, leaf in trees.leaves(latent):
        other = theirs.pop(path, None)
        name = "/".join(path)
        if isinstance(leaf, PackedTernary):
            raise UserError(f"{name} of the latent parameters is packed: must be the latent matrix")
        if other is None:
            raise UserError(f"{name} is missing in the packed parameters")
        if trees.is_bitlinear(path) != isinstance(other, PackedTernary):
            raise UserError(f"{name} of the packed parameters must be {'packed' if trees.is_bitlinear(path) else 'an array'}")
        if tuple(leaf.shape) != tuple(other.shape):
            raise UserError(f"{name} has shape {tuple(other.shape)} in the packed parameters: must be {tuple(leaf.shape)}")
        # A file may hold the rest in the compute type, to which it is cast at use: that changes nothing.
        if not trees.is_bitlinear(path) and not np.array_equal(leaf.astype(compute), other.astype(compute)):
            raise UserError(f"{name} differs in the packed parameters: only BitLinear kernels may")
    if theirs:
        raise UserError(f"{'/'.join(next(iter(theirs)))} is missing in the latent parameters")


@functools.cache
def _program(config: ModelConfig, implementation: str | None) -> Program:
    return Program(functools.partial(_compare_block, replace(config, remat=Remat.NONE), implementation))


def _compare_block(
    config: ModelConfig, implementation: str | None, latent: trees.Params, packed: trees.Params, x: Hidden, counted: Array
) -> tuple[Hidden, Float32[Array, ""], dict[str, dict[str, Int32[Array, "..."]]]]:
    """The latent block's output, its largest difference from the packed block's, and the counts of each BitLinear by path.

    Counts are per output column, so that int32 holds those of any size. `counted` [B, T] leaves padding out.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    inputs: dict[str, jax.Array] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        # A look from outside at what flows into each layer; the model itself is run as it is.
        if isinstance(context.module, BitLinear):
            inputs["/".join(context.module.path)] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        (y, _), _ = Block(config).apply({"params": latent}, (x, None), jnp.int32(0), positions)  # type: ignore[misc]
    (other, _), _ = Block(config, implementation).apply({"params": packed}, (x, None), jnp.int32(0), positions)  # type: ignore[misc]
    gap = jnp.abs(y.astype(jnp.float32) - other.astype(jnp.float32))
    difference = jnp.max(jnp.where(counted[..., None], gap, 0.0))

    found = {}
    for path, value in inputs.items():
        kernels = latent, packed
        for name in path.split("/"):
            kernels = kernels[0][name], kernels[1][name]
        axis = partition.cut_axis(f"{path}/kernel", config.quant)
        found[path] = _compare_layer(config, implementation, kernels[0]["kernel"], kernels[1]["kernel"], value, counted, axis)
    return y, difference, found


def _compare_layer(
    config: ModelConfig,
    implementation: str | None,
    kernel: Float32[Array, "K N"],
    packed: PackedTernary,
    x: Float[Array, "B T K"],
    counted: Array,
    axis: int | None,
) -> dict[str, Int32[Array, "..."]]:
    codes, scale = quant.quantize_weights(kernel, config.quant, axis)
    scale = scale.reshape(packed.scale.shape)
    differ = unpack_codes(packed).astype(jnp.float32) != codes
    found = {
        "weights": jnp.full(codes.shape[1], codes.shape[0], jnp.int32),
        "weights_differ": jnp.sum(differ, 0, dtype=jnp.int32),
        "scales": jnp.full(scale.shape, 1, jnp.int32),
        "scales_differ": (scale != packed.scale).astype(jnp.int32),
    }
    if config.quant.activation is ActivationQuantizer.NONE:
        return found
    if config.norm is NormPlacement.INSIDE:
        x = normalize(x, config.norm_kind, config.norm_eps)
    operand = quant.quantize_activations(x, config.quant).codes
    # The product of training: operands in the compute type, sums in float32 (`dot.quantized`).
    dtype = config.dtype.value
    trained = jax.lax.dot_general(operand.astype(dtype), codes.astype(dtype), (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    # With both scales one, what comes out are the sums themselves: below 2^24 they are exact in float32.
    bare = replace(packed, scale=jnp.ones_like(packed.scale))
    ones = jnp.ones((*x.shape[:2], 1), jnp.float32)
    served = ternary_matmul(operand.astype(jnp.int8), bare, x_scale=ones, out_dtype=jnp.float32, implementation=implementation)
    # NaN is unequal to itself, and counts as a difference.
    differ = (trained != served) & counted[..., None]
    found["accumulators"] = jnp.broadcast_to(jnp.sum(counted, dtype=jnp.int32), (codes.shape[1],))
    found["accumulators_differ"] = jnp.sum(differ, (0, 1), dtype=jnp.int32)
    return found
