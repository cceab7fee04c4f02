"""The portable implementation: XLA operations only, on any platform. It is shaped for what XLA does with them on a CPU.

Three facts decide. XLA fuses an integer multiply-reduce with the unpacking of its operand as long as it reduces blocks of 32, and
materialises the operand otherwise. It multiplies int8 matrices fast from two rows up, and is tens of times slower with one. And it
materialises the operands of a product, so that big matrices are unpacked in blocks of rows. Sums of int8 products are exact in
int32 whatever their order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.arg_specs import ArgSpec
from kernels_pallas.packing import Encoding, PackedTernary, block_bytes, decode_rows, planes

_BLOCK_CODES = 3 << 20
"""Codes that are unpacked at a time on a CPU: they stay in cache, and there are few enough blocks to keep all cores busy in each."""

_FUSED_ROWS = {Encoding.TWO_BIT: 3, Encoding.BASE3: 1}
"""Largest M at which unpacking once for every row, without storing, beats unpacking once for all. At least 1: see above."""


def supported(spec: ArgSpec) -> str | None:
    """None: every call is supported."""
    return None


@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def ternary_matmul(x: jax.Array, w: PackedTernary, x_scale: jax.Array | None, out_dtype: Any, config: None = None) -> jax.Array:
    """x [M, K] times w [K, N] with x_scale float32 [M, 1] or None, as [M, N] in `out_dtype`; equations in `api.ternary_matmul`."""
    if w.group is not None:
        sums = jax.lax.platform_dependent(x, w.codes, w.scale, cpu=_grouped_cpu(w), default=_grouped(w))
        return (sums if x_scale is None else sums * x_scale).astype(out_dtype)
    x = _planes_of_rows(x, w)
    sums = jax.lax.platform_dependent(x, w.codes, cpu=_product_cpu(w), default=_product(w)).astype(jnp.float32)
    return (sums * (w.scale if x_scale is None else x_scale * w.scale)).astype(out_dtype)


def input_gradient(g: jax.Array, w: PackedTernary, dtype: Any) -> jax.Array:
    """The gradient of x [M, K] in `dtype` from that of the result, g [M, N]: (g * scale) Wᵀ, computed in float32."""
    rows = decode_rows(w.codes, w.k, w.encoding).astype(jnp.float32)
    g = g.astype(jnp.float32)
    if w.group is None:
        g = g * w.scale
    else:
        rows = rows * jnp.repeat(w.scale.T, w.group, axis=1)
    return jnp.matmul(g, rows, precision="highest").astype(dtype)


# --- one scale per matrix --------------------------------------------------------------------------------------------


def _planes_of_rows(x: jax.Array, w: PackedTernary) -> jax.Array:
    """x [M, K] as [M, P, bytes_per_row]: plane p lines up with the codes that plane p of the packed bytes holds. Padded with 0."""
    m, p = x.shape[0], w.encoding.planes
    x = jnp.pad(x, ((0, 0), (0, w.codes.shape[-1] * p - w.k)))
    return x.reshape(m, -1, p, block_bytes(w.k, w.encoding)).swapaxes(1, 2).reshape(m, p, -1)


def _product(w: PackedTernary) -> Any:
    """(x [M, P, bytes], codes [N, bytes]) → sums [M, N]: one product per plane, which XLA fuses with the unpacking on a GPU."""

    def product(x: jax.Array, codes: jax.Array) -> jax.Array:
        sums = [
            jax.lax.dot_general(
                x[:, p],
                plane.astype(x.dtype) - 1,
                (((1,), (1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=_accumulator(x),
            )
            for p, plane in enumerate(planes(codes, w.encoding))
        ]
        return functools.reduce(jnp.add, sums)

    return product


def _product_cpu(w: PackedTernary) -> Any:
    """The same for a CPU: without unpacked weights in memory for few rows of int8, else a block of rows of W at a time."""

    def product(x: jax.Array, codes: jax.Array) -> jax.Array:
        if x.dtype == jnp.int8 and x.shape[0] <= _FUSED_ROWS[w.encoding]:
            return _fused(x, codes, w.encoding)
        if x.dtype != jnp.int8:
            x = x.astype(jnp.float32)  # the same products, many times faster than those of 16 bits
        return _map_rows(lambda block: _product(w)(x, block), w.k, codes)

    return product


def _fused(x: jax.Array, codes: jax.Array, encoding: Encoding) -> jax.Array:
    """int8 x [M, P, bytes] times codes [N, bytes] as one loop: int16 products, summed over blocks of bytes before they widen."""
    m, n = x.shape[0], codes.shape[0]
    # Codes 0..2 stand for -1..1, which the last line puts right. A product is at least -256, and P of them over a block must fit.
    block = 32 if encoding is Encoding.TWO_BIT else 16
    padding = -codes.shape[1] % block  # zeros times zeros
    x, codes = jnp.pad(x, ((0, 0), (0, 0), (0, padding))), jnp.pad(codes, ((0, 0), (0, padding)))
    wide = x.astype(jnp.int16)
    products = [wide[:, p, None, :] * plane.astype(jnp.int16)[None] for p, plane in enumerate(planes(codes, encoding))]
    sums = functools.reduce(jnp.add, products).reshape(m, n, -1, block).sum(axis=3, dtype=jnp.int16)
    return sums.astype(jnp.int32).sum(axis=2) - x.astype(jnp.int32).sum(axis=(1, 2))[:, None]


# --- one scale per group ---------------------------------------------------------------------------------------------


def _grouped(w: PackedTernary) -> Any:
    """(x [M, K], codes [N, bytes], scale [G, N]) → sum over groups of sums * scale, float32 [M, N]; sums of int8 are exact."""

    def product(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        groups = scale.shape[0]
        rows = decode_rows(codes, w.k, w.encoding).reshape(codes.shape[0], groups, -1)
        sums = jnp.einsum(
            "mgk,ngk->gmn",
            x.reshape(x.shape[0], groups, -1),
            rows.astype(x.dtype),
            precision="highest",
            preferred_element_type=_accumulator(x),
        )
        return (sums.astype(jnp.float32) * scale[:, None]).sum(axis=0)

    return product


def _grouped_cpu(w: PackedTernary) -> Any:
    """The same for a CPU, a block of rows of W at a time."""

    def product(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return _map_rows(lambda block, scales: _grouped(w)(x, block, scales.T), w.k, codes, scale.T)

    return product


# --- blocks ----------------------------------------------------------------------------------------------------------


def _accumulator(x: jax.Array) -> Any:
    return jnp.int32 if x.dtype == jnp.int8 else jnp.float32


def _map_rows(function: Any, k: int, *arrays: jax.Array) -> jax.Array:
    """`function` over blocks of rows of `arrays` [N, ...], one block after the other, its results [M, block] put together as [M, N]."""
    n = arrays[0].shape[0]
    size = max(64, _BLOCK_CODES // k // 64 * 64)
    if n <= size:
        return function(*arrays)
    count = -(-n // size)

    def block(i: jax.Array) -> jax.Array:
        # The last block overlaps the one before it where N is not a multiple: equal shapes, and the overlap is cut off below.
        start = jnp.minimum(i * size, n - size)
        return function(*(jax.lax.dynamic_slice_in_dim(array, start, size) for array in arrays))

    sums = jax.lax.map(block, jnp.arange(count, dtype=jnp.int32))
    whole = jnp.moveaxis(sums[:-1], 0, 1).reshape(sums.shape[1], -1)
    return jnp.concatenate([whole, sums[-1][:, count * size - n :]], axis=1)
