"""Normalisation, gain and quantisation of activations in one pass: what stands before every packed product.

The arithmetic is that of `norms.normalize` (root mean square), of the gain, and of `quant.quantize_activations` at 8 bits, with every
product of the type of `x` rounded to it. XLA may sum the squares in another order and leave a rounding to bfloat16 out: the twins write
order and roundings out, and give the same codes and steps.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.array_types import Array, Float, Float32, Int8
from bitnet_jax.cpu.head import lane_sum
from bitnet_jax.cpu.native import CpuConfig, call
from bitnet_jax.quant import EPS


def norm_quantize(
    x: Float[Array, "M D"], gain: Float32[Array, "D"], eps: float, config: CpuConfig | None = None
) -> tuple[Int8[Array, "M D"], Float32[Array, "M 1"]]:
    """int8 codes and step of x / sqrt(mean(x^2) + eps) * gain, for x of float32 or bfloat16."""
    return _call(x, jnp.zeros((0,), x.dtype), gain, eps, config)


def relu2_norm_quantize(
    gate: Float[Array, "M F"], up: Float[Array, "M F"], gain: Float32[Array, "F"], eps: float, config: CpuConfig | None = None
) -> tuple[Int8[Array, "M F"], Float32[Array, "M 1"]]:
    """`norm_quantize` of relu(gate)^2 * up."""
    return _call(gate, up, gain, eps, config)


def _call(x: Array, up: Array, gain: Array, eps: float, config: CpuConfig | None) -> tuple[Array, Array]:
    results = [jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32)]
    # The gain is rounded to the type of x, as the norm does.
    gain = gain.astype(x.dtype).astype(jnp.float32)
    codes, step = call("bitnet_norm_quantize", results, x, up, gain, config=config, eps=np.float32(eps))
    return codes, step


# --- twins -----------------------------------------------------------------------------------------------------------


def norm_quantize_twin(x: Float[Array, "M D"], gain: Float32[Array, "D"], eps: float) -> tuple[Int8[Array, "M D"], Float32[Array, "M 1"]]:
    """`norm_quantize` in JAX."""
    wide = x.astype(jnp.float32)
    mean = lane_sum(lambda part: jnp.square(wide[:, part]), x.shape[1])[:, None] / x.shape[1]
    y = _rounded(wide * (1.0 / jnp.sqrt(mean + eps)), x.dtype)
    y = _rounded(y * gain.astype(x.dtype).astype(jnp.float32)[None], x.dtype)
    size = jnp.maximum(jnp.max(jnp.abs(y), -1, keepdims=True), EPS)
    return jnp.clip(jnp.round(y * (127.0 / size)), -128.0, 127.0).astype(jnp.int8), size * (1.0 / 127.0)


def relu2_norm_quantize_twin(
    gate: Float[Array, "M F"], up: Float[Array, "M F"], gain: Float32[Array, "F"], eps: float
) -> tuple[Int8[Array, "M F"], Float32[Array, "M 1"]]:
    """`relu2_norm_quantize` in JAX."""
    inner = _rounded(jnp.square(jax.nn.relu(gate.astype(jnp.float32))), gate.dtype)
    inner = _rounded(inner * up.astype(jnp.float32), gate.dtype)
    return norm_quantize_twin(inner.astype(gate.dtype), gain, eps)


def _rounded(x: Float32[Array, "..."], dtype: jnp.dtype) -> Float32[Array, "..."]:
    """x rounded to `dtype`, which XLA may not leave out, as float32."""
    return jax.lax.reduce_precision(x, 8, 7) if dtype == jnp.bfloat16 else x
