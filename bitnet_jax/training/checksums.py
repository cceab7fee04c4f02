"""Checksums of arrays and of JSON values, by which a checkpoint is held to what was saved."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from bitnet_jax.array_types import Array, Shaped

Tree = Any


def checksums(tree: Tree) -> dict[str, str]:
    """A checksum of every leaf, by its path: the same however an array is cut up over devices and processes. Waits for the arrays.

    It is the sum over elements, modulo 2^32, of their bits times an odd number that depends on where the element stands. It finds every
    change of a single element, for odd numbers have inverses; other damage it misses once in about 2^32.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get([_sum(jnp.asarray(leaf)) for _, leaf in leaves])
    return {jax.tree_util.keystr(path): f"sum32:{int(total):08x}" for (path, _), total in zip(leaves, sums, strict=True)}


def json_digest(value: Any) -> str:
    """Digest of a JSON value that does not depend on the order of keys or on spacing."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, separators=(",", ":")).encode(), digest_size=16).hexdigest()


@jax.jit
def _sum(x: Shaped[Array, "..."]) -> jax.Array:
    bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % (1 << 32))
        stride *= x.shape[axis]
    # Neighbours get numbers that have nothing to do with one another (the mixing steps of MurmurHash3), made odd.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        place = (place ^ (place >> jnp.uint32(shift))) * jnp.uint32(factor)
    factors = (place ^ (place >> jnp.uint32(16))) | jnp.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * factors, dtype=jnp.uint32)
