"""The right answer in plain lines. Every implementation is held to it, and it is never optimised."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.arg_specs import ArgSpec
from kernels_pallas.packing import PackedTernary, unpack


def supported(spec: ArgSpec) -> str | None:
    """None: the reference supports every call."""
    return None


def ternary_matmul(x: jax.Array, w: PackedTernary, x_scale: jax.Array | None, out_dtype: Any, config: None = None) -> jax.Array:
    """x [M, K] times w [K, N] with x_scale float32 [M, 1] or None, as [M, N] in `out_dtype`; equations in `api.ternary_matmul`."""
    groups = 1 if w.group is None else w.k // w.group
    accumulator = jnp.int32 if x_scale is not None else jnp.float32
    x = x.reshape(x.shape[0], groups, -1).astype(accumulator)
    ternary = unpack(w).reshape(groups, -1, w.n).astype(accumulator)
    sums = jnp.einsum("mgk,gkn->mgn", x, ternary, precision="highest").astype(jnp.float32)
    step = jnp.ones((1, 1), jnp.float32) if x_scale is None else x_scale
    if w.group is None:
        return (sums[:, 0] * (step * w.scale)).astype(out_dtype)
    return ((sums * w.scale[None]).sum(axis=1) * step).astype(out_dtype)
