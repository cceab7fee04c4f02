"""The product with the vocabulary table, which reads as many bytes of a small model as all its ternary layers.

A sum over D has 32 lanes: element d is added to lane d % 32, in order, and lane l is then added to lane l + 16, l + 8, ..., l + 1.
Products of bfloat16 numbers are exact in float32, and so are those of bfloat16 and int8: native results, on every instruction set and
for every number of threads, and those of the twins here are the same bits. With float32 operands they are equal within rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.array_types import Array, Float, Float32, Int8, Int32
from bitnet_jax.cpu.native import CpuConfig, call
from bitnet_jax.errors import UserError
from bitnet_jax.memory import large_array

_LANES = 32
_BLOCK = 4096


class RoughTable(NamedTuple):
    """A table [V, D] in int8: table[v] = codes[v] * scale[v] + e[v].

    `error[v]` bounds |logit - rough logit| / |x|_2: by Cauchy and Schwarz |e[v]|_2, and what the roundings of both sums may add.
    """

    codes: Int8[Array | np.ndarray, "V D"]
    scale: Float32[Array | np.ndarray, "V"]
    error: Float32[Array | np.ndarray, "V"]


# --- native ----------------------------------------------------------------------------------------------------------


def logits(x: Float[Array, "M D"], table: Float[Array, "V D"], config: CpuConfig | None = None) -> Float32[Array, "M V"]:
    """x @ table^T in float32, for x and table of float32 or bfloat16."""
    return call("bitnet_logits", [_shape(x, table)], x, table, jnp.zeros((0,), jnp.float32), config=config, columns=False)[0]


def logits_of_columns(x: Float[Array, "M D"], table: Float[Array, "D V"], config: CpuConfig | None = None) -> Float32[Array, "M V"]:
    """x @ table in float32, for x and table of float32 or bfloat16; the terms of a sum are added in order."""
    result = jax.ShapeDtypeStruct((x.shape[0], table.shape[1]), jnp.float32)
    return call("bitnet_logits", [result], x, table, jnp.zeros((0,), jnp.float32), config=config, columns=True)[0]


def rough_logits(x: Float[Array, "M D"], table: RoughTable, config: CpuConfig | None = None) -> Float32[Array, "M V"]:
    """(x @ codes^T) * scale in float32: the logits of the int8 table, within `error` * |x|_2 of those of the table itself."""
    return call("bitnet_logits", [_shape(x, table.codes)], x, table.codes, table.scale, config=config, columns=False)[0]


def top_logits(
    x: Float[Array, "M D"],
    table: Float[Array, "V D"],
    rough: RoughTable,
    k: int = 1,
    limit: Int32[Array, ""] | None = None,
    config: CpuConfig | None = None,
) -> tuple[Int32[Array, "M k"], Float32[Array, "M k"], Int32[Array, "M"]]:
    """The k largest of `logits(x, table)`, exactly, from a pass over the int8 table and the few rows of the table that can be among them.

    Args:
        x: hidden states; a row that is not finite gets the logits NaN.
        table: float32 or bfloat16.
        rough: `quantize_table(table)`.
        k: how many.
        limit: only ids below it; None is all of them. At least k.
        config: how the kernel runs.

    Returns:
        Ids with their logits, the largest first and equal ones by their id, and how many rows of the table were read.
    """
    limit = jnp.int32(table.shape[0]) if limit is None else limit
    m = x.shape[0]
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((m, k), jnp.int32), ((m, k), jnp.float32), ((m,), jnp.int32))]
    ids, values, read = call("bitnet_top_logits", results, x, table, rough.codes, rough.scale, rough.error, limit, config=config)
    return ids, values, read


def quantize_table(
    table: Float[np.ndarray, "V D"], config: CpuConfig | None = None, dtype: Any = None, release: Callable[[], None] = lambda: None
) -> RoughTable:
    """The int8 table of a table: scale[v] = max|table[v]| / 127, codes of the nearest multiples, on the host.

    A block of rows is read at a time, cast to `dtype` if one is given, and `release` is called after it: a table mapped from a file need
    never be in memory as a whole.

    Raises:
        UserError: the table holds a number that is not finite.
    """
    rows, width = table.shape
    codes, scale, error = large_array((rows, width), np.int8), np.empty(rows, np.float32), np.empty(rows, np.float32)
    for begin in range(0, rows, _BLOCK):
        block = jnp.asarray(table[begin : begin + _BLOCK].astype(dtype or table.dtype, copy=False))
        shapes = ((block.shape, jnp.int8), (block.shape[:1], jnp.float32), (block.shape[:1], jnp.float32))
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        for whole, part in zip((codes, scale, error), call("bitnet_quantize_table", results, block, config=config), strict=True):
            whole[begin : begin + _BLOCK] = part
        release()
    if not np.isfinite(scale).all():
        raise UserError(f"table row {int(np.argmin(np.isfinite(scale)))} holds a number that is not finite")
    return RoughTable(codes, scale, error)


def _shape(x: Array, table: Array | np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], table.shape[0]), jnp.float32)


# --- twins -----------------------------------------------------------------------------------------------------------


def logits_twin(x: Float[Array, "M D"], table: Float[Array, "V D"], scale: Float32[Array, "V"] | None = None) -> Float32[Array, "M V"]:
    """`logits`, or with a scale `rough_logits`, in JAX: for tests, and slow."""
    sums = lane_sum(lambda part: x[:, None, part].astype(jnp.float32) * table[None, :, part].astype(jnp.float32), x.shape[1])
    return sums if scale is None else sums * scale[None]


def top_logits_twin(
    x: Float[Array, "M D"], table: Float[Array, "V D"], k: int = 1, limit: Int32[Array, ""] | None = None
) -> tuple[Int32[Array, "M k"], Float32[Array, "M k"]]:
    """`top_logits` in JAX, from all logits."""
    known = jnp.arange(table.shape[0], dtype=jnp.int32) < (table.shape[0] if limit is None else limit)
    values, ids = jax.lax.top_k(jnp.where(known[None], logits_twin(x, table), -jnp.inf), k)
    return ids.astype(jnp.int32), values


def lane_sum(products, width: int) -> Float32[Array, "..."]:
    """The sum over the last axis in the order that this file describes; `products(slice)` gives the float32 terms of a slice of it."""
    lanes = None
    for begin in range(0, width, _LANES):
        part = products(slice(begin, min(begin + _LANES, width)))
        part = jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, _LANES - part.shape[-1])])
        lanes = part if lanes is None else lanes + part
    assert lanes is not None
    half = _LANES // 2
    while half:
        lanes, half = lanes[..., :half] + lanes[..., half : 2 * half], half // 2
    return lanes[..., 0]
