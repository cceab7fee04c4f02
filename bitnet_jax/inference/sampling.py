"""Choosing the next token from logits: pure functions on [B, V], and `Sampling`, which says which of them apply.

A filter sets the logits of the tokens that it rules out to -inf, and never those of the most probable one. The order is repetition
penalty, temperature, top-k, top-p, min-p: each filter sees the distribution that the one before it left. Equally probable tokens are
kept or ruled out together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Key, UInt32

from bitnet_jax.array_types import Array, Float32, Int32
from bitnet_jax.errors import UserError

_LEAST_TEMPERATURE = 1e-4
"""Below this, differences of logits divided by the temperature leave float32: greedy is what is meant."""

RowLogits = Float32[Array, "B V"]
RowValues = Float32[Array, "B"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the most probable one."""

    temperature: float = 0.0
    """Divisor of the logits: 0 is greedy, 1 the model's own distribution."""
    top_k: int | None = None
    """Only the k most probable tokens; None is all of them."""
    top_p: float = 1.0
    """Only the most probable tokens that together first reach this probability; 1 is all of them."""
    min_p: float = 0.0
    """Only tokens at least this share as probable as the most probable one; 0 is all of them."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens that the prompt or the text has; 1 is none."""

    def __post_init__(self) -> None:
        """Raises UserError where a value is out of its range."""
        if not (self.temperature == 0 or _LEAST_TEMPERATURE <= self.temperature < math.inf):
            raise UserError(f"temperature={self.temperature} must be 0 (greedy), or from {_LEAST_TEMPERATURE} up and finite")
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            raise UserError(f"top_k={self.top_k} must be from 1 to 2147483647, or none")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must lie above 0 and be at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p} must be from 0 to 1")
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be from 0.001 to 1000")


GREEDY = Sampling()
"""The most probable token, always."""


@partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_k", "top_p", "min_p", "repetition_penalty"], meta_fields=[])
@dataclass(frozen=True)
class Controls:
    """The `Sampling` of each row as arrays [B], so that other values do not compile again. None where no row uses a filter."""

    temperature: RowValues | None
    top_k: Int32[Array, "B"] | None
    top_p: RowValues | None
    min_p: RowValues | None
    repetition_penalty: RowValues | None

    @property
    def greedy(self) -> bool:
        """Whether every row takes the token with the largest logit, as it is."""
        return not jax.tree.leaves(self)

    @staticmethod
    def of(rows: Sequence[Sampling]) -> "Controls":
        """The controls of a batch. Filters do not change what is most probable: greedy rows need none."""

        def floats(values: list[float], neutral: float) -> RowValues | None:
            return None if all(value == neutral for value in values) else jnp.array(values, jnp.float32)

        drawn = [row if row.temperature else Sampling(repetition_penalty=row.repetition_penalty) for row in rows]
        top_k = [2**31 - 1 if row.top_k is None else row.top_k for row in drawn]
        return Controls(
            temperature=floats([row.temperature for row in drawn], 0.0),
            top_k=None if all(row.top_k is None for row in drawn) else jnp.array(top_k, jnp.int32),
            top_p=floats([row.top_p for row in drawn], 1.0),
            min_p=floats([row.min_p for row in drawn], 0.0),
            repetition_penalty=floats([row.repetition_penalty for row in drawn], 1.0),
        )


def sample(
    logits: RowLogits,
    keys: Key[Array, "B"],
    seen: Bool[Array, "B V"] | None,
    controls: Controls,
    among: tuple[Int32[Array, "B V"], int] | None = None,
) -> Int32[Array, "B"]:
    """One token for each row. A row depends on its own logits, key and controls alone.

    Args:
        logits: [B, V] float32; -inf for tokens that are out of the question.
        keys: one random key for each row.
        seen: tokens that the repetition penalty applies to; needed where a row has one.
        controls: see `Sampling`.
        among: ids of the tokens that `logits` are of, and the size of the vocabulary, where not all of it is given; the result is a
            column of `logits` then, and that of the token which would be chosen from all logits if the others were -inf.
    """
    if controls.repetition_penalty is not None:
        assert seen is not None
        logits = repetition_penalty(logits, seen, controls.repetition_penalty)
    best = greedy(logits)
    if controls.temperature is None:
        return best
    drawing = controls.temperature > 0
    logits = temperature(logits, jnp.where(drawing, controls.temperature, 1.0))
    logits = logits if controls.top_k is None else top_k(logits, controls.top_k)
    logits = logits if controls.top_p is None else top_p(logits, controls.top_p)
    logits = logits if controls.min_p is None else min_p(logits, controls.min_p)
    return jnp.where(drawing, draw(logits, keys, among), best)


# --- choosing --------------------------------------------------------------------------------------------------------


def greedy(logits: RowLogits) -> Int32[Array, "B"]:
    """The most probable token of each row, the one with the smallest id among equals."""
    return jnp.argmax(logits, -1).astype(jnp.int32)


def draw(logits: RowLogits, keys: Key[Array, "B"], among: tuple[Int32[Array, "B V"], int] | None = None) -> Int32[Array, "B"]:
    """A token of each row with probability softmax(logits), drawn with that row's key: the largest of logits + Gumbel noise."""
    size = logits.shape[-1] if among is None else among[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32))(keys)
    if among is not None:
        noise = jnp.take_along_axis(noise, among[0], 1)
    return jnp.argmax(logits + noise, -1).astype(jnp.int32)


# --- filters ---------------------------------------------------------------------------------------------------------


def repetition_penalty(logits: RowLogits, seen: Bool[Array, "B V"], penalty: RowValues) -> RowLogits:
    """logits / penalty where seen and positive, logits * penalty where seen and negative (CTRL, section 4.1, for both signs)."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: RowLogits, value: RowValues) -> RowLogits:
    """(logits - max logits) / value; the subtraction changes no probability and keeps small temperatures from overflowing."""
    return (logits - jnp.max(logits, -1, keepdims=True)) / value[:, None]


def top_k(logits: RowLogits, k: Int32[Array, "B"]) -> RowLogits:
    """Tokens that fewer than k tokens are more probable than: the k most probable, and those equal to the last of them."""
    floor = _floor(logits, jnp.ones(logits.shape, jnp.int32), k)
    return jnp.where(_sortable(logits) >= floor, logits, -jnp.inf)


def top_p(logits: RowLogits, p: RowValues) -> RowLogits:
    """Tokens for which the more probable ones have a probability of less than p together (nucleus sampling, Holtzman et al. 2020).

    That is the smallest set of most probable tokens that reaches p, and those equal to the last of them.
    """
    floor = _floor(logits, jax.nn.softmax(logits, -1), p)
    # The sum may round to 1 before the last token, and p = 1 must keep them all.
    return jnp.where((_sortable(logits) >= floor) | (p[:, None] >= 1), logits, -jnp.inf)


def min_p(logits: RowLogits, share: RowValues) -> RowLogits:
    """Tokens whose probability is at least `share` of the largest: logits >= max logits + ln(share)."""
    floor = jnp.max(logits, -1, keepdims=True) + jnp.log(share)[:, None]  # ln 0 = -inf keeps everything
    return jnp.where(logits >= floor, logits, -jnp.inf)


def _floor(logits: RowLogits, weights: Float32[Array, "B V"] | Int32[Array, "B V"], limit: Array) -> UInt32[Array, "B 1"]:
    """The lowest logit of each row above which the weights sum to less than `limit`, as a `_sortable` number.

    Found bit by bit: 32 sums, where sorting a large vocabulary takes far longer.
    """
    keys = _sortable(logits)
    none = jnp.zeros((), weights.dtype)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        above = jnp.sum(jnp.where(keys > middle, weights, none), -1, keepdims=True)
        enough = above < limit[:, None]
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    highest = jnp.max(keys, -1, keepdims=True)  # above which there is nothing, whatever the limit
    return jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(highest), highest))[1]


def _sortable(x: Float32[Array, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers in the order of the numbers: IEEE 754 bits, the negative ones inverted."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
