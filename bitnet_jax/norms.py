"""Normalisation over the last axis: root mean square (b1.58) and layer norm (b1), as pure functions."""

import jax
import jax.numpy as jnp

from bitnet_jax.array_types import Array, Float
from bitnet_jax.config import NormKind


def normalize(x: Float[Array, "... D"], kind: NormKind, eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) for `RMS`; (x - mean x) / sqrt(var x + eps) for `LAYER` (b1, section 2).

    Statistics are float32; the result has the type of `x` and no gain.
    """
    x32 = x.astype(jnp.float32)
    if kind is NormKind.LAYER:
        x32 = x32 - jnp.mean(x32, -1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)).astype(x.dtype)
