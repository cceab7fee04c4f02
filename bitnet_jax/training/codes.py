"""Ternary statistics of a run: how the codes are spread over -1, 0 and +1, and how many changed since they were last counted."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bitnet_jax import params as parameters
from bitnet_jax.array_types import Array, Int32
from bitnet_jax.config import ModelConfig

Codes = dict[str, Any]
"""The int8 codes of every BitLinear kernel, under the paths of the parameter tree; empty where the model has none."""


class CodeCounts(NamedTuple):
    """Counts of one kind of layer, on the device; one row per layer of a stacked kernel, so that int32 is enough.

    Attributes:
        values: how many codes are -1, 0 and +1, [L, 3].
        flips: how many codes differ from the earlier ones, [L]; None where there are no earlier ones.
    """

    values: Int32[Array, "L 3"]
    flips: Int32[Array, "L"] | None


class TernaryStatistics(NamedTuple):
    """Codes of the whole model.

    Attributes:
        fractions: shares of -1, 0 and +1 among all codes.
        by_kind: the same for each kind of layer ("q", "k", …, "down").
        flips: codes that changed since the last count; None where there was none.
        weights: how many codes there are.
    """

    fractions: tuple[float, float, float]
    by_kind: dict[str, tuple[float, float, float]]
    flips: int | None
    weights: int


def snapshot(params: parameters.Params, config: ModelConfig) -> Codes:
    """The codes of `params` as they are now, int8 on the device. Dispatched, not waited for."""
    return parameters.codes(params, config)


def count(codes: Codes, earlier: Codes | None) -> list[tuple[str, CodeCounts]]:
    """(kind of layer, counts) of every kernel. Dispatched, not waited for; `summarize` fetches them."""
    before = dict(parameters.leaves(earlier)) if earlier is not None else {}
    return [(path[-2], _count(leaf, before.get(path))) for path, leaf in parameters.leaves(codes)]


def summarize(counts: list[tuple[str, CodeCounts]]) -> TernaryStatistics | None:
    """The counts as fractions; None for a model without ternary weights. Waits for the device."""
    if not counts:
        return None
    totals: dict[str, list[int]] = {}
    flips: int | None = 0
    for kind, leaf in jax.device_get(counts):
        kept = totals.setdefault(kind, [0, 0, 0])
        for i in range(3):
            kept[i] += sum(int(row[i]) for row in leaf.values)
        flips = None if leaf.flips is None or flips is None else flips + sum(int(row) for row in leaf.flips)
    overall = [sum(kept[i] for kept in totals.values()) for i in range(3)]
    return TernaryStatistics(_fractions(overall), {kind: _fractions(kept) for kind, kept in totals.items()}, flips, sum(overall))


def _fractions(counts: list[int]) -> tuple[float, float, float]:
    total = sum(counts)
    return counts[0] / total, counts[1] / total, counts[2] / total


@jax.jit
def _count(codes: jax.Array, earlier: jax.Array | None) -> CodeCounts:
    layers = codes.reshape(-1, codes.shape[-2] * codes.shape[-1])
    values = jnp.stack([jnp.sum(layers == value, -1, dtype=jnp.int32) for value in (-1, 0, 1)], -1)
    flips = None if earlier is None else jnp.sum(layers != earlier.reshape(layers.shape), -1, dtype=jnp.int32)
    return CodeCounts(values, flips)
