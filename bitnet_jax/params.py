"""Pure surgery on parameter trees: pack and unpack ternary weights, stack and unstack layers, walk by path.

A packed tree has the paths of the latent one; under `kernel` of every BitLinear stands a `PackedTernary` in place of a matrix.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import partition, quant
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import ModelConfig, QuantConfig
from bitnet_jax.errors import UserError
from kernels_pallas import Encoding, PackedTernary
from kernels_pallas import pack as pack_codes
from kernels_pallas import unpack as unpack_codes

Params = dict[str, Any]
"""A nested dict of arrays, with a `PackedTernary` for each packed matrix."""

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
"""Names of the BitLinear layers of a block."""


def is_bitlinear(path: tuple[str, ...]) -> bool:
    """Whether a leaf's path is the kernel of a BitLinear; the head's kernel is not, for it is never quantised."""
    return len(path) >= 2 and path[-1] == "kernel" and path[-2] in LINEAR


def leaves(params: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) in the order of sorted names; a `PackedTernary` is one leaf."""
    for name in sorted(params):
        value = params[name]
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def map_leaves(function: Callable[[tuple[str, ...], Any], Any], params: Params, path: tuple[str, ...] = ()) -> Params:
    """The tree with `function(path, leaf)` in place of every leaf; a `PackedTernary` is one leaf."""
    return {
        name: map_leaves(function, value, (*path, name)) if isinstance(value, dict) else function((*path, name), value)
        for name, value in params.items()
    }


# --- ternary codes ---------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(1, 2))
def _quantize(kernel: jax.Array, config: QuantConfig, axis: int | None) -> tuple[jax.Array, jax.Array]:
    # One matrix at a time, in the shape that the forward pass quantises: a sum over another shape may round differently.
    def one(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, scale = quant.quantize_weights(kernel, config, axis)
        return codes.astype(jnp.int8), scale.reshape(()) if scale.ndim == codes.ndim else scale[:, 0]

    return jax.lax.map(one, kernel) if kernel.ndim == 3 else one(kernel)


def codes(params: Params, config: ModelConfig) -> Params:
    """The int8 codes of every BitLinear kernel of a latent tree, and nothing else: what statistics and flips are counted from."""
    if not is_ternary(config):
        return {}

    def keep(tree: Params, path: tuple[str, ...]) -> Params:
        kept: Params = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                inner = keep(value, (*path, name))
                if inner:
                    kept[name] = inner
            elif is_bitlinear((*path, name)):
                kept[name] = _quantize(value, config.quant, partition.cut_axis("/".join((*path, name)), config.quant))[0]
        return kept

    return keep(params, ())


def pack(params: Params, config: ModelConfig, encoding: Encoding = Encoding.TWO_BIT) -> Params:
    """Every BitLinear kernel as packed ternary weights, everything else as it is.

    Args:
        params: latent parameters, kernels [L, K, N] or [K, N] float32.
        config: the configuration they were trained with.
        encoding: 2 bits a weight, or 5 weights a byte.

    Raises:
        UserError: the model's linear layers are not ternary, or a kernel is packed already or not finite.
    """
    if not is_ternary(config):
        raise UserError(f"linear={config.linear.value} with weight quantiser {config.quant.weight.value} has no ternary weights to pack")

    def one(path: tuple[str, ...], leaf: Any) -> Any:
        if not is_bitlinear(path):
            return leaf
        if isinstance(leaf, PackedTernary):
            raise UserError(f"{'/'.join(path)} is packed already")
        return pack_kernel(jnp.asarray(leaf), config.quant, encoding, "/".join(path))

    return map_leaves(one, params)


def pack_kernel(kernel: jax.Array, config: QuantConfig, encoding: Encoding, name: str) -> PackedTernary:
    """The latent matrix [K, N] at the path `name`, or a stack of them [L, K, N], as packed ternary weights on the host.

    Raises:
        UserError: it holds NaN or infinite weights, or no rule of `partition` fits its name.
    """
    values, scale = _quantize(kernel, config, partition.cut_axis(name, config))
    scale = np.asarray(scale)
    if not np.all(np.isfinite(scale)):
        raise UserError(f"{name} holds NaN or infinite weights: they have no ternary code")
    return pack_codes(np.asarray(values), scale, encoding)


def unpack(params: Params) -> Params:
    """Every packed kernel as a float32 matrix codes * scale [..., K, N]: the full-precision form of a ternary model.

    Quantising the result again gives the same codes; the latent weights are gone.
    """

    def one(path: tuple[str, ...], leaf: Any) -> Any:
        if not isinstance(leaf, PackedTernary):
            return leaf
        values = np.asarray(unpack_codes(leaf)).astype(np.float32)
        scale = np.asarray(leaf.scale)
        if scale.ndim == values.ndim - 2:
            return values * scale[..., None, None]
        return values * np.repeat(scale, values.shape[-2] // scale.shape[-2], -2)

    return map_leaves(one, params)


# --- layers ----------------------------------------------------------------------------------------------------------


def stack(params: Params) -> Params:
    """The tree of `Layers.LOOP` (`block_0`, `block_1`, …) as that of `Layers.SCAN` (`blocks`, with a leading layer axis)."""
    names = sorted((name for name in params if name.startswith("block_")), key=lambda name: int(name.removeprefix("block_")))
    if not names:
        raise UserError(f"parameters have no block_0: they are stacked already, or not a transformer's ({', '.join(sorted(params))})")
    blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *(params[name] for name in names))
    return {**{name: value for name, value in params.items() if name not in names}, "blocks": blocks}


def unstack(params: Params) -> Params:
    """The tree of `Layers.SCAN` as that of `Layers.LOOP`; the inverse of `stack`."""
    if "blocks" not in params:
        raise UserError(f"parameters have no 'blocks': they are unstacked already, or not a transformer's ({', '.join(sorted(params))})")
    count = jax.tree.leaves(params["blocks"])[0].shape[0]
    blocks = {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(count)}
    return {**{name: value for name, value in params.items() if name != "blocks"}, **blocks}
