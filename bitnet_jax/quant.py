"""Every quantiser of the papers as a pure function, and the straight-through estimator.

A quantiser returns integer-valued codes and a scale, the step between two neighbouring codes, so that value ≈ codes * scale.
All arithmetic is float32 whatever the input's type; rounding is half to even, as torch.round; the smallest scale is held up by
`max(., 1e-5)` and not by addition (FAQ, code listing).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.lax import stop_gradient

from bitnet_jax.array_types import Array, Float, Float32
from bitnet_jax.config import ActivationQuantizer, QuantConfig, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.sums import exact_mean

EPS = 1e-5
"""Smallest magnitude that a scale is computed from (FAQ, code listing)."""


class Quantized(NamedTuple):
    """Integer-valued float32 codes, and the float32 step that turns them back into values (rank kept, so that codes * scale broadcasts)."""

    codes: Float32[Array, "..."]
    scale: Float32[Array, "..."]


# --- weights ---------------------------------------------------------------------------------------------------------


def quantize_weights(w: Float[Array, "*layers K N"], config: QuantConfig, axis: int | None = None) -> Quantized:
    """Codes in {-1, 0, 1} of a weight matrix and its scale.

    With s the magnitude that `config.weight` names, over the whole matrix, over `weight_group` inputs of one column, or over one of
    `weight_shards` parts of the matrix, of which each has its own s and its own mean (b1, section 2.3, group quantisation; TriLM):

        codes = clip(round(W * (1 / max(s, 1e-5))), -1, 1)     s = mean|W| (b1.58, section 2), median|W| (Reloaded), max|W|
        codes = +1 where W > mean W, else -1                   s = mean|W| of the uncentred W (b1, section 2)
        codes = clip(round(W * (1 / max(s, 1e-5))), 0, 1)      s = mean|W|; the FAQ of b1.58 names the alphabet {0, 1} and no equation, so
                                                               this is that of b1.58 with the lower end at 0

    Args:
        w: matrices [..., K, N]; leading axes are independent.
        config: `weight` must not be `NONE`; K must be a multiple of `weight_group`, the cut axis one of `weight_shards`.
        axis: what `weight_shards` cut: -2, the inputs, or -1, the outputs (`partition.cut_axis` of the matrix's path).

    Returns:
        codes shaped as `w`, and scale [..., 1, 1], or [..., G, 1, N] for codes seen as [..., G, K / G, N]: G is `weight_shards` where they
        cut the inputs, and 1 where they cut the outputs.

    Raises:
        UserError: there are `weight_shards` and no axis.
    """
    w = w.astype(jnp.float32)
    *layers, k, n = w.shape
    shards = config.weight_shards
    if config.weight_group is not None:
        codes, scale = _quantize_block(w.reshape(*layers, k // config.weight_group, config.weight_group, n), (-2,), config.weight)
    elif shards == 1:
        codes, scale = _quantize_block(w, (-2, -1), config.weight)
    elif axis == -2:
        codes, scale = _quantize_block(w.reshape(*layers, shards, k // shards, n), (-2, -1), config.weight)
        scale = jnp.broadcast_to(scale, (*layers, shards, 1, n))
    elif axis == -1:
        codes, scale = _quantize_block(w.reshape(*layers, k, shards, n // shards), (-3, -1), config.weight)
        scale = jnp.broadcast_to(scale, (*layers, 1, shards, n // shards)).reshape(*layers, 1, 1, n)
    else:
        raise UserError(f"weight_shards={shards} cut a matrix along its inputs or outputs: axis={axis} must be -2 or -1")
    return Quantized(codes.reshape(w.shape), scale)


def _quantize_block(w: Float32[Array, "..."], axes: tuple[int, ...], quantizer: WeightQuantizer) -> Quantized:
    magnitude = jnp.abs(w)
    if quantizer is WeightQuantizer.ABSMEDIAN:
        size = jnp.median(magnitude, axes, keepdims=True)
    elif quantizer is WeightQuantizer.ABSMAX:
        size = jnp.max(magnitude, axes, keepdims=True)
    else:
        size = exact_mean(magnitude, axes)
    scale = jnp.maximum(size, EPS)
    if quantizer is WeightQuantizer.SIGN:
        codes = jnp.where(w > exact_mean(w, axes), 1.0, -1.0)
    else:
        codes = jnp.clip(jnp.round(w * (1.0 / scale)), 0.0 if quantizer is WeightQuantizer.ZERO_ONE else -1.0, 1.0)
    return Quantized(codes, scale)


def dequantize_weights(quantized: Quantized) -> Float32[Array, "*layers K N"]:
    """codes * scale, for one scale a matrix and for grouped scales alike."""
    codes, scale = quantized
    if scale.ndim == codes.ndim:
        return codes * scale
    *layers, groups, _, n = scale.shape
    return (codes.reshape(*layers, groups, -1, n) * scale).reshape(codes.shape)


# --- activations -----------------------------------------------------------------------------------------------------


def quantize_activations(x: Float[Array, "... K"], config: QuantConfig) -> Quantized:
    """Codes in [-2^(b-1), 2^(b-1) - 1] of activations, and their scale (FAQ, code listing; b = 8 there).

        s = (2^(b-1) - 1) / max(max|x|, 1e-5),   codes = clip(round(x * s), -2^(b-1), 2^(b-1) - 1),   scale = 1 / s

    Args:
        x: activations [..., K].
        config: `activation` must not be `NONE`. `PER_TOKEN` takes the maximum over the last axis, `PER_TENSOR` over everything
            (b1, section 2, while training).

    Returns:
        codes shaped as `x`, and scale [..., 1].
    """
    x = x.astype(jnp.float32)
    size, top = _activation_size(x, config)
    # A written reciprocal, and no 1 / s: the compiler may turn either division into it, or not, and the last bit with it.
    return Quantized(jnp.clip(jnp.round(x * (top / size)), -top - 1.0, top), size * (1.0 / top))


def _activation_size(x: Float32[Array, "... K"], config: QuantConfig) -> tuple[Float32[Array, "... 1"], float]:
    """The magnitude that becomes the largest code, and that code."""
    axes = -1 if config.activation is ActivationQuantizer.PER_TOKEN else None
    size = jnp.maximum(jnp.max(jnp.abs(x), axes, keepdims=True), EPS)
    return jnp.broadcast_to(size, (*x.shape[:-1], 1)), 2.0 ** (config.activation_bits - 1) - 1.0


# --- straight-through estimator --------------------------------------------------------------------------------------


def straight_through(x: Float[Array, "..."], quantized: Float[Array, "..."]) -> Float[Array, "..."]:
    """`quantized` forward, the identity backward: no gradient flows into codes or scale (b1, section 2).

    Written (x - sg(x)) + sg(q): the first term is exactly zero, so the value is exactly q. The usual x + sg(q - x) rounds, and on
    bfloat16 weights gives more than three distinct values.
    """
    return (x - stop_gradient(x)) + stop_gradient(quantized)


def fake_quantize_weights(
    w: Float[Array, "*layers K N"], config: QuantConfig, strength: Float32[Array, ""] | None = None, axis: int | None = None
) -> Float[Array, "*layers K N"]:
    """Weights rounded to codes * scale, in the type of `w`, with the straight-through gradient; in part where `strength` is given.

    `axis` is that of `quantize_weights`.
    """
    if config.weight is WeightQuantizer.NONE:
        return w
    return straight_through(w, _part(w, dequantize_weights(quantize_weights(w, config, axis)), strength).astype(w.dtype))


def fake_quantize_activations(
    x: Float[Array, "... K"], config: QuantConfig, strength: Float32[Array, ""] | None = None
) -> Float[Array, "... K"]:
    """Activations rounded to codes / s, in the type of `x`, with the straight-through gradient; in part where `strength` is given."""
    if config.activation is ActivationQuantizer.NONE:
        return x
    codes, _ = quantize_activations(x, config)
    size, top = _activation_size(x.astype(jnp.float32), config)
    return straight_through(x, _part(x, codes / (top / size), strength).astype(x.dtype))


def _part(x: Float[Array, "..."], quantized: Float32[Array, "..."], strength: Float32[Array, ""] | None) -> Float32[Array, "..."]:
    """The way from `x` to `quantized` that `strength` = lambda says: x + lambda * (q(x) - x) (Hugging Face's blog on 1.58 bits, warm-up).

    Written (1 - lambda) * x + lambda * q(x), which is exactly x at 0 and exactly q(x) at 1.
    """
    return quantized if strength is None else (1.0 - strength) * x.astype(jnp.float32) + strength * quantized
