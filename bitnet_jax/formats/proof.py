"""Proof that a conversion is the model it was made from: every weight compared, then logits and greedy tokens, a layer at a time.

Both models run from their files, one layer in memory at a time, so that a model which does not fit in memory can be proved as well.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import dot
from bitnet_jax.array_types import Array, Float
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import DType, Layers, ModelConfig, QuantConfig, Remat, differences
from bitnet_jax.errors import RunError
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Leaf, Weights
from bitnet_jax.norms import normalize
from bitnet_jax.transformer import Block
from kernels_pallas import Encoding, PackedTernary

EXACT = 1e-5
"""Largest difference of logits, as a share of the largest logit, between two models with the same numbers: what is left when a compiler
adds in another order."""
EXACT_BFLOAT16 = 2e-2
"""The same where the model computes in bfloat16, whose step is 2^-8."""
ROUNDED = 5e-2
"""The same where the format rounds scales or embeddings: their own error is below 2^-8, and moves some activations to the next of their
255 codes."""

ROUNDED_FLOATS = 2.0**-7
"""Largest error of a number that a format rounds, as a share of the largest of its leaf: twice that of 8 bits."""

Progress = Callable[[str, int, int | None], object]
"""Called with a stage's name, what is done of it, and of how much."""

_NEW_TOKENS = 8
_HEAD_ROWS = 1 << 14
_PROMPT_TOKENS = 24


def no_progress(stage: str, done: int, total: int | None) -> None:
    """Shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was compared between a model and its conversion.

    Attributes:
        weights: ternary codes compared; 0 where the model has none.
        floats: numbers compared that are not packed, scales included.
        floats_differ: how many are not equal; only a format that rounds them may have any.
        logits: logits compared.
        difference: largest difference of logits, as a share of the largest logit.
        tokens: greedy tokens compared.
        tokens_differ: how many are not equal.
    """

    weights: int
    floats: int
    floats_differ: int
    logits: int
    difference: float
    tokens: int
    tokens_differ: int

    def __str__(self) -> str:
        equal = self.tokens - self.tokens_differ
        return ", ".join(
            [
                f"proof: {self.weights:,} ternary weights equal" if self.weights else "proof: no packed weights",
                f"{self.floats - self.floats_differ:,} of {self.floats:,} other numbers equal",
                f"{self.logits:,} logits within {self.difference:.1e} of the largest",
                f"{equal} of {self.tokens} greedy tokens equal",
            ]
        )


def prove(source: Weights, result: Weights, *, rounds: bool = False, progress: Progress = no_progress) -> Proof:
    """Compares a model with its conversion, read back from where it was written.

    0. Configuration, as far as it decides what is computed, and what stands before a text, ends it, and makes one of a conversation.
    1. Every leaf: ternary codes must be equal, other numbers too unless the format `rounds` them.
    2. Both continue a prompt of random tokens, which no model has learned to expect. The greedy tokens must be equal, and the logits at
       every position, up to the tolerances of this module. A format that rounds may change a token, which is counted.

    Args:
        source: the model.
        result: its conversion.
        rounds: whether the result's format keeps scales and other floats in fewer bits than the source.
        progress: called as the proof goes on.

    Raises:
        RunError: they are not the same model; the message says what differs.
    """
    # Which type a model computes in is the user's choice and not part of every format.
    result = _decoded_once(replace(result, config=replace(result.config, dtype=source.config.dtype)))
    _compare_settings(source, result)
    weights, floats, differ = _compare_leaves(source, result, rounds, progress)
    config = source.config.for_inference
    # An odd stride over the vocabulary: no repetition, every part of it, the same for every run.
    prompt = (np.arange(_PROMPT_TOKENS, dtype=np.int64) * 7919 + 1) % config.vocab_size
    new = min(_NEW_TOKENS, config.max_seq_len - 1)
    length = min(_PROMPT_TOKENS, config.max_seq_len - new)
    ids = np.zeros((1, length + new), np.int32)
    ids[0, :length] = prompt[:length]
    theirs = np.zeros(0)
    for at in range(length, length + new):
        progress("comparing greedy tokens", at - length, new + 1)
        theirs = _logits(result, ids)
        ids[0, at] = int(theirs[at - 1].argmax())
    progress("comparing greedy tokens", new, new + 1)
    mine = _logits(source, ids)
    # The last token was chosen by its position before; logits behind it were not computed from it.
    mine, theirs = mine[: length + new - 1], theirs[: length + new - 1]
    tokens_differ = int((mine[length - 1 :].argmax(-1) != ids[0, length:]).sum())
    if not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
        raise RunError(f"{result.where} is not proved: logits are not finite")
    largest = float(np.abs(mine).max())
    apart = float(np.abs(mine - theirs).max())
    difference = apart / largest if largest else float(apart > 0)
    proof = Proof(
        weights=weights,
        floats=floats,
        floats_differ=differ,
        logits=mine.size,
        difference=difference,
        tokens=new,
        tokens_differ=tokens_differ,
    )
    tolerance = ROUNDED if rounds else EXACT_BFLOAT16 if config.dtype.value == "bfloat16" else EXACT
    if difference > tolerance or (tokens_differ and not rounds):
        raise RunError(
            f"{result.where} is not the model it was made from: logits differ by {difference:.1e} of the largest "
            f"(at most {tolerance:.0e}), {tokens_differ} of {new} greedy tokens differ"
        )
    return proof


def _decoded_once(weights: Weights) -> Weights:
    """The same model, whose packed kernels stay in memory once they were read: some formats are slow to decode, and passes are many."""
    kept: dict[leafwise.Path, PackedTernary] = {}

    def read(path: leafwise.Path) -> Leaf:
        if path in kept:
            return kept[path]
        leaf = weights.read(path)
        if isinstance(leaf, PackedTernary):
            kept[path] = leaf
        return leaf

    return replace(weights, read=read, tree=None)


# --- weights ---------------------------------------------------------------------------------------------------------


def _compare_leaves(source: Weights, result: Weights, rounds: bool, progress: Progress) -> tuple[int, int, int]:
    """(ternary codes, other numbers, how many of those differ)."""
    other = source.config.quant.weight is not result.config.quant.weight  # as of dequantised weights, which absmax restores
    packed = is_ternary(source.config) and is_ternary(result.config) and (source.encoding or result.encoding or other)
    # Beside packed weights, what the model computes in decides: the rest is cast to it at use.
    compute = np.dtype(source.config.dtype.value) if result.encoding is not None else None
    if packed:
        source, result = leafwise.packed(source, Encoding.TWO_BIT), leafwise.packed(result, Encoding.TWO_BIT)
    weights = floats = differ = 0
    paths = leafwise.paths(source.config)
    for number, path in enumerate(paths):
        progress("comparing weights", number, len(paths))
        mine, theirs = source.read(path), result.read(path)
        name = f"{result.where}: {'/'.join(path)}"
        if tuple(mine.shape) != tuple(theirs.shape):
            raise RunError(f"{name} has shape {tuple(theirs.shape)}: the source has {tuple(mine.shape)}")
        if isinstance(mine, PackedTernary) and isinstance(theirs, PackedTernary):
            weights += mine.k * mine.n
            if not np.array_equal(mine.codes, theirs.codes):
                raise RunError(f"{name} has other ternary weights than the source")
            mine, theirs = _scales(mine, theirs)
        elif compute is not None:
            mine, theirs = np.asarray(mine).astype(compute), np.asarray(theirs).astype(compute)
        numbers = np.asarray(mine)
        found, largest = _different(numbers, np.asarray(theirs))
        if found and (not rounds or largest > ROUNDED_FLOATS):
            raise RunError(f"{name} differs from the source in {found} of {numbers.size} numbers, by {largest:.1e} of its largest")
        floats, differ = floats + numbers.size, differ + found
        source.release()
        result.release()
    return weights, floats, differ


def _compare_settings(source: Weights, result: Weights) -> None:
    found = differences(_deciding(source), _deciding(result))
    if found:
        raise RunError(f"{result.where} has another configuration than the source: {', '.join(found)}")
    mine, theirs = source.assets, result.assets
    for name, same in (
        ("prefix", mine.prefix == theirs.prefix),
        ("chat_template", mine.chat_template == theirs.chat_template),
        ("stop_tokens", set(mine.stop_tokens) <= set(theirs.stop_tokens)),
    ):
        if not same:
            raise RunError(f"{result.where} has another {name} than the source: {getattr(theirs, name)!r:.200}")


def _deciding(weights: Weights) -> ModelConfig:
    """The configuration with everything that decides no number of inference at one value."""
    config = weights.config.for_inference
    quant = QuantConfig(activation=config.quant.activation, activation_bits=config.quant.activation_bits)
    return replace(
        config,
        quant=quant if is_ternary(config) else QuantConfig(),
        norm_eps=float(np.float32(config.norm_eps)),  # some formats keep float32
        rope_theta=float(np.float32(config.rope_theta)),
        layers=Layers.SCAN,
        remat=Remat.NONE,
        init_std=None,
        dtype=DType.FLOAT32,
        logits_dtype=DType.FLOAT32,
    )


def _scales(mine: PackedTernary, theirs: PackedTernary) -> tuple[np.ndarray, np.ndarray]:
    """The scales of two matrices in one shape, whether a matrix or a group has one, and however many inputs a group has."""
    if not mine.scale.ndim and not theirs.scale.ndim:
        return np.asarray(mine.scale), np.asarray(theirs.scale)
    rows = [np.broadcast_to(leaf.scale, (len(leaf.scale) if leaf.scale.ndim else 1, leaf.n)) for leaf in (mine, theirs)]
    groups = math.lcm(*map(len, rows))
    first, second = (np.repeat(scale, groups // len(scale), 0) for scale in rows)
    return first, second


def _different(mine: np.ndarray, theirs: np.ndarray) -> tuple[int, float]:
    """(how many numbers differ, by what at most as a share of the largest), as float32, which holds every type that is read exactly."""
    if mine.ndim == 0:
        mine, theirs = mine[None], theirs[None]
    step = max(1, (1 << 22) // max(1, mine[:1].size))
    count, difference, largest = 0, 0.0, 0.0
    for start in range(0, len(mine), step):
        a, b = (part[start : start + step].astype(np.float32) for part in (mine, theirs))
        if different := int((a != b).sum()):
            count, difference = count + different, max(difference, float(np.abs(a - b).max()))
        largest = max(largest, float(np.abs(a).max()))
    return count, difference / largest if largest else float(count > 0)


# --- logits ----------------------------------------------------------------------------------------------------------


def _logits(weights: Weights, ids: np.ndarray) -> np.ndarray:
    """Logits float32 [T, V] at every position of one row of ids [1, T]."""
    config = replace(weights.config.for_inference, layers=Layers.LOOP)
    embedding = np.asarray(weights.read(("embed", "embedding")))
    x = jnp.asarray(embedding[ids]).astype(config.dtype.value)
    block: dict[str, Any] = {}
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    for path in leafwise.paths(config)[1:]:
        if path[0].startswith("block_"):
            place = block
            for name in path[1:-1]:
                place = place.setdefault(name, {})
            place[path[-1]] = _device(weights.read(path))
            if path[1:3] == ("ffn", "down"):  # the last of a block
                x = _block(config)(block, x, positions)
                block = {}
                x.block_until_ready()
                weights.release()
    gain = jnp.asarray(weights.read(("final_norm", "scale")))
    tied = config.tie_embeddings
    table = embedding if tied else np.asarray(weights.read(("head", "kernel"))).T
    head = _head(config)
    # A part of the vocabulary at a time: some types are widened to float32, and a large table would not fit.
    parts = [table[start : start + _HEAD_ROWS] for start in range(0, config.vocab_size, _HEAD_ROWS)]
    return np.concatenate([np.asarray(head(x, gain, _device(part if tied else part.T)))[0] for part in parts], -1)


def _device(leaf: Leaf) -> Any:
    if isinstance(leaf, np.ndarray) and leaf.dtype == np.float16:
        leaf = leaf.astype(np.float32)
    return jax.device_put(leaf)


@functools.lru_cache(maxsize=4)
def _block(config: ModelConfig) -> Any:
    def run(block: Any, x: Float[Array, "1 T D"], positions: Any) -> Float[Array, "1 T D"]:
        (x, _), _ = Block(config).apply({"params": block}, (x, None), jnp.int32(0), positions)  # pyright: ignore[reportGeneralTypeIssues]
        return x

    return jax.jit(run)


@functools.lru_cache(maxsize=4)
def _head(config: ModelConfig) -> Any:
    def run(x: Float[Array, "1 T D"], gain: Float[Array, "D"], table: Any) -> Float[Array, "1 T V"]:
        hidden = normalize(x, config.norm_kind, config.norm_eps) * gain.astype(x.dtype)[None, None]
        return dot.tied(hidden, table, "float32") if config.tie_embeddings else dot.full(hidden, table, "float32")

    return jax.jit(run)
