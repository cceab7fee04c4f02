"""BitLinear: the parameters of a linear layer, and the one place where its policy is decided."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from bitnet_jax import cpu, dot, partition
from bitnet_jax.array_types import Array, Float, Float32
from bitnet_jax.config import ActivationQuantizer, Arithmetic, Gather, Linear, ModelConfig, NormKind, NormPlacement, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.norms import normalize
from kernels_pallas import PackedLayer, PackedTernary


class BitLinear(nn.Module):
    """y = Q_a(norm(x)) @ Q_w(kernel), without bias (b1.58, section 2; FAQ, code listing).

    The norm stands here only where `config.norm` is `INSIDE`. With `config.linear` `FULL` the same layer multiplies without quantising:
    the full-precision twin. `kernel` is the latent float32 matrix [K, N], or a `PackedTernary` of it made by `params.pack`, or a layer of a
    stack of those.

    Attributes:
        features: outputs N.
        config: the model's configuration.
        implementation: name of the `ternary_matmul` implementation for packed weights; None chooses, and "xla" also stands for the
            products of weights that are not packed.
        native: whether this is inference beside the CPU's native library: latent weights then give the bits that packed ones do.
        gather: what of latent weights travels where they are cut up over devices.
    """

    features: int
    config: ModelConfig
    implementation: str | None = None
    native: bool = False
    gather: Gather = Gather.LATENT

    @nn.compact
    def kernel(self, x: Float[Array, "... K"] | dot.Activations) -> Float[Array, "K N"] | PackedTernary | PackedLayer:
        """The kernel [K, N] that `x` is multiplied by. Raises UserError where its shape is another one."""
        config, shape = self.config, (x.shape[-1], self.features)
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            std = config.init_std or 1.0 / math.sqrt(shape[0])
            kernel = self.param("kernel", nn.initializers.normal(std), shape, jnp.float32)
        if tuple(kernel.shape) != shape:
            raise UserError(f"{'/'.join(self.path)}/kernel has shape {tuple(kernel.shape)}: must be {shape}, as the configuration says")
        return kernel

    def __call__(self, x: Float[Array, "... K"] | dot.Activations, strength: Float32[Array, ""] | None = None) -> Float[Array, "... N"]:
        """Raises UserError as `products`."""
        return products(x, [self], strength)[0]


def products(
    x: Float[Array, "... K"] | dot.Activations, layers: Sequence[BitLinear], strength: Float32[Array, ""] | None = None
) -> list[Float[Array, "... N"]]:
    """The outputs of several `BitLinear` of one configuration with the same input, in one call where their weights are packed.

    With `strength`, from 0 to 1, latent weights and activations are quantised in part (`dot.quantized`).

    Raises:
        UserError: a kernel's shape does not fit `x` and `features`, packed weights meet a full-precision config or a `strength`, or an
            implementation that is for packed weights meets others.
    """
    config, implementation = layers[0].config, layers[0].implementation
    kernels = [layer.kernel(x) for layer in layers]
    if config.norm is NormPlacement.INSIDE and not isinstance(x, dot.Activations):
        x = normalized(x, None, config, layers[0].native)
    packed = [kernel for kernel in kernels if isinstance(kernel, PackedTernary | PackedLayer)]
    if packed and config.linear is not Linear.BIT:
        raise UserError(f"{_names(layers)} are packed: a model with linear={config.linear.value} has no ternary weights")
    if packed and strength is not None:
        raise UserError(f"{_names(layers)} are packed: only latent weights can be quantised in part")
    if len(packed) < len(kernels) and implementation not in (None, "xla"):
        raise UserError(f"implementation={implementation!r} is for packed weights: not all of {_names(layers)} are packed")
    outs = iter(dot.packed(x, packed, config.quant, implementation) if packed else ())
    return [
        next(outs) if isinstance(kernel, PackedTernary | PackedLayer) else _product(x, kernel, layer, strength)
        for layer, kernel in zip(layers, kernels, strict=True)
    ]


def _product(
    x: Float[Array, "... K"] | dot.Activations, kernel: Float[Array, "K N"], layer: BitLinear, strength: Float32[Array, ""] | None
) -> Float[Array, "... N"]:
    config = layer.config
    if layer.native and _rounds(config):
        return dot.rounded(x, kernel, config.quant)
    assert not isinstance(x, dot.Activations)
    path = "/".join((*layer.path, "kernel"))
    placement = partition.placement(path, layer.gather)
    if config.linear is Linear.FULL:
        return dot.full(x, kernel, placement=placement)
    return dot.quantized(x, kernel, config.quant, placement, strength, partition.cut_axis(path, config.quant))


def normalized(
    x: Float[Array, "... K"],
    gain: Float32[Array, "K"] | None,
    config: ModelConfig,
    native: bool = False,
    up: Float[Array, "... K"] | None = None,
) -> Float[Array, "... K"] | dot.Activations:
    """The norm that stands before a product, times `gain`; quantised in the same pass where the native library does both.

    With `up` it is that of relu(x)^2 * up.
    """
    if not native or not _rounds(config) or config.norm_kind is not NormKind.RMS or config.quant.activation_bits != 8:
        x = x if up is None else jnp.square(jax.nn.relu(x)) * up  # overflows float16, which is why DType has none
        y = normalize(x, config.norm_kind, config.norm_eps)
        return y if gain is None else y * jnp.expand_dims(gain.astype(x.dtype), range(x.ndim - 1))
    gain = jnp.ones(x.shape[-1:], jnp.float32) if gain is None else gain
    rows = x.reshape(-1, x.shape[-1])
    if up is None:
        codes, scale = cpu.norm_quantize(rows, gain, config.norm_eps)
    else:
        codes, scale = cpu.relu2_norm_quantize(rows, up.reshape(rows.shape), gain, config.norm_eps)
    return dot.Activations(codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1), x.dtype)


def _rounds(config: ModelConfig) -> bool:
    """Whether latent weights have products that the native library ends, and so the bits of packed ones."""
    if not is_ternary(config) or config.quant.arithmetic is Arithmetic.FAKE:
        return False
    one = config.quant.weight_group is None and config.quant.weight_shards == 1
    return one and config.quant.activation is not ActivationQuantizer.NONE


def _names(layers: Sequence[BitLinear]) -> str:
    return ", ".join("/".join((*layer.path, "kernel")) for layer in layers)


def is_ternary(config: ModelConfig) -> bool:
    """Whether the model's linear layers have ternary weights, so that they can be packed and counted."""
    return config.linear is Linear.BIT and config.quant.weight is not WeightQuantizer.NONE
