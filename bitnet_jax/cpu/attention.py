"""Attention over a cache of keys and values that costs the tokens present, and not what the cache could hold.

softmax(q k^T / sqrt(H)) v as `layers.attention` computes it, with weights rounded to the type of the values. The two differ where
their exponentials and sums round differently: by a few units in the last place of float32, or one of bfloat16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bitnet_jax.array_types import Array, Float, Float32, Int8, Int32, Positions, Queries
from bitnet_jax.cpu.native import CpuConfig, call


class Int8Vectors(NamedTuple):
    """Keys or values in int8, each head of each position with its own step: value = codes * scale."""

    codes: Int8[Array, "L B S K H"]
    scale: Float32[Array, "L B S K"]


def quantize_vectors(x: Float[Array, "... H"]) -> Int8Vectors:
    """codes = round(x * 127 / max|x|) over the last axis, half to even, and scale = max|x| / 127."""
    x = x.astype(jnp.float32)
    size = jnp.maximum(jnp.max(jnp.abs(x), -1), 1e-20)
    return Int8Vectors(jnp.round(x * (127.0 / size)[..., None]).astype(jnp.int8), size * (1.0 / 127.0))


def attention(
    q: Queries,
    k: Float[Array, "L B S K H"] | Int8Vectors,
    v: Float[Array, "L B S K H"] | Int8Vectors,
    layer: Int32[Array, ""],
    positions: Positions,
    config: CpuConfig | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of queries to one layer of a cache, each query seeing the keys 0 to its position; in the type of `q`.

    Args:
        q: float32 or bfloat16 [B, T, N, H]; N / K queries share one key head.
        k: keys of all layers, float32, bfloat16 or int8, of which nothing behind the positions is read.
        v: values, as `k`.
        layer: which layer. An index out of range is an error when it runs.
        positions: position of each query [B, T], below S: otherwise an error when it runs.
        config: how the kernel runs.
    """
    none = jnp.zeros((0,), jnp.float32)
    keys, k_scale = k if isinstance(k, Int8Vectors) else (k, none)
    values, v_scale = v if isinstance(v, Int8Vectors) else (v, none)
    result = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return call("bitnet_attention", [result], q, keys, values, k_scale, v_scale, layer, positions, config=config)[0]
