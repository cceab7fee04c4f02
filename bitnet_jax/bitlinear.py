"""BitLinear: the parameters of a linear layer, and the one place where its policy is decided."""

import math

import jax.numpy as jnp
from flax import linen as nn

from bitnet_jax import dot
from bitnet_jax.array_types import Array, Float
from bitnet_jax.config import Linear, ModelConfig, NormPlacement, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.norms import normalize
from kernels_pallas import PackedTernary


class BitLinear(nn.Module):
    """y = Q_a(norm(x)) @ Q_w(kernel), without bias (b1.58, section 2; FAQ, code listing).

    The norm stands here only where `config.norm` is `INSIDE`. With `config.linear` `FULL` the same layer multiplies without quantising:
    the full-precision twin. `kernel` is the latent float32 matrix [K, N], or a `PackedTernary` of it made by `params.pack`.

    Attributes:
        features: outputs N.
        config: the model's configuration.
        implementation: name of the `ternary_matmul` implementation for packed weights; None chooses.
    """

    features: int
    config: ModelConfig
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        """Raises UserError where the kernel's shape does not fit `x` and `features`, or packed weights meet a full-precision config."""
        config, shape = self.config, (x.shape[-1], self.features)
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            std = config.init_std or 1.0 / math.sqrt(shape[0])
            kernel = self.param("kernel", nn.initializers.normal(std), shape, jnp.float32)
        if tuple(kernel.shape) != shape:
            raise UserError(f"{'/'.join(self.path)}/kernel has shape {tuple(kernel.shape)}: must be {shape}, as the configuration says")

        if config.norm is NormPlacement.INSIDE:
            x = normalize(x, config.norm_kind, config.norm_eps)
        if isinstance(kernel, PackedTernary):
            if config.linear is not Linear.BIT:
                raise UserError(f"{'/'.join(self.path)}/kernel is packed: a model with linear={config.linear.value} has no ternary weights")
            return dot.packed(x, kernel, config.quant, self.implementation)
        if self.implementation is not None:
            raise UserError(f"implementation={self.implementation!r} is for packed weights: {'/'.join(self.path)}/kernel is not packed")
        if config.linear is Linear.FULL:
            return dot.full(x, kernel)
        return dot.quantized(x, kernel, config.quant)


def is_ternary(config: ModelConfig) -> bool:
    """Whether the model's linear layers have ternary weights, so that they can be packed and counted."""
    return config.linear is Linear.BIT and config.quant.weight is not WeightQuantizer.NONE
