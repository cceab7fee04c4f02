"""A mean that does not depend on the order of summation.

The scale of a ternary matrix is the mean of its magnitudes. A float32 sum rounds differently wherever the compiler fuses or splits the
reduction differently, and then the packed weights, a scanned layer, a sharded matrix or another machine would each have a scale of their
own, off in the last digit. Here every partial sum is an integer below 2^24, exact in float32 in any order.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bitnet_jax.array_types import Array, Float32

_BASE = 4096.0  # 2^12: a sum of 2^12 integers up to 2^12 is exact in float32


def exact_mean(x: Float32[Array, "..."], axes: Sequence[int]) -> Float32[Array, "..."]:
    """Mean over `axes`, which are kept with size one; the same bits on every backend, in every fusion and on every mesh.

    Each value is cut into two 12-bit digits relative to the largest magnitude of its sum, x = (h + l / 4096) * unit, so that a value is off
    by at most 2^-25 of the largest: closer than a float32 sum of more than a few terms.
    """
    count = 1.0
    for axis in axes:
        count *= x.shape[axis]
    unit = _power_of_two(jnp.max(jnp.abs(x), tuple(axes), keepdims=True)) * (2.0 / _BASE)
    digits = x / unit
    high = jnp.floor(digits)
    low = jnp.round((digits - high) * _BASE)
    return (_sum(high, list(axes)) * _BASE + _sum(low, list(axes))) * (unit * (1.0 / _BASE / count))


def _power_of_two(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The largest power of two that is not above x; at least 2^-100, so that its fractions are normal numbers."""
    exponent = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7F800000)
    return jnp.maximum(jax.lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-100)


def _sum(x: Float32[Array, "..."], axes: list[int]) -> Float32[Array, "..."]:
    """Sum over `axes` of integers up to 4096, by chunks of up to 4096 whose sums are cut into two digits again."""
    axis, *rest = axes
    size = x.shape[axis]
    chunks = -(-size // int(_BASE))
    if chunks > 1:
        chunk = -(-size // chunks)
        before = x.ndim + axis if axis < 0 else axis
        padding = [(0, 0)] * x.ndim
        padding[before] = (0, chunks * chunk - size)
        x = jnp.pad(x, padding).reshape(*x.shape[:before], chunks, chunk, *x.shape[before + 1 :])
        x = jnp.sum(x, before + 1)
        rest = [axis, *rest]
    else:
        x = jnp.sum(x, axis, keepdims=True)
    if not rest:
        return x
    high = jnp.floor(x / _BASE)
    return _sum(high, rest) * _BASE + _sum(x - high * _BASE, rest)
