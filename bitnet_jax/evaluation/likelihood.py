"""Log-probabilities of continuations behind contexts, many at a time.

    ln p(c_1 … c_n | context) = sum over i of ln softmax(logits behind context, c_1 … c_{i-1})[c_i]

**What is computed once.** Requests whose tokens but for the last are the same share a row: the answers A, B, C and D behind one question
cost one forward pass. Equal requests are one.

**What is not computed.** Logits of positions that no continuation needs; and none of them leaves the device, only ln p of each
continuation's tokens and the most probable token at their places.

**Few programs.** Rows are sorted by length and padded, on the right, to one of two lengths in every doubling (… 64, 96, 128, 192, …);
continuations of more than one token to 8, 16, 32, …; the number of those that share a row to a power of two.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.array_types import Array, Float32, Int32, Tokens
from bitnet_jax.config import ModelConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.programs import Program
from bitnet_jax.transformer import Output, Transformer

_LOGITS = 1 << 26
"""Logits of a batch at most where its size is not given: 256 MiB."""
_TOKENS_ON_CPU, _TOKENS = 1 << 9, 1 << 13
"""Tokens fed at a time at most where the size of a batch is not given: a CPU computes more of them no faster."""
_UNSCORED = -1

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context and of its continuation."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        log_probability: ln p(continuation | context) in nats.
        greedy: whether each token of it is the most probable one in its place: whether `generate` would write it.
    """

    log_probability: float
    greedy: bool


@dataclass(kw_only=True)
class _Row:
    """Tokens that are fed, and the continuations that end behind them: their last tokens differ, or where they begin."""

    inputs: tuple[int, ...]
    requests: dict[tuple[int, ...], list[int]]
    """Numbers of the requests for each continuation."""

    @property
    def scored(self) -> int:
        return max(map(len, self.requests))


def likelihoods(
    params: Any,
    config: ModelConfig,
    pairs: Sequence[Pair],
    *,
    batch_size: int | None = None,
    vocabulary: int | None = None,
    implementation: str | None = None,
) -> Iterator[tuple[int, Likelihood]]:
    """The likelihood of each continuation behind its context, as (number of the pair, Likelihood), in the order in which they are done.

    Of a context and a continuation that are too long together the beginning is left out, with a warning: `config.max_seq_len` tokens are
    fed, and the last token of the continuation is not one of them. Batches do not change the results, as far as the rounding of
    float32 sums does not depend on their size, and unless the model has one activation scale for a whole batch.

    Args:
        params: latent or packed parameters.
        config: the model's configuration.
        pairs: contexts of at least one token, and continuations of at least one and at most `config.max_seq_len`.
        batch_size: rows computed at a time; None is what fits: 256 MiB of logits, and 512 tokens on a CPU or 8192 elsewhere.
        vocabulary: ids from this one on are never the most probable; None is `config.vocab_size`. Probabilities are over all ids.
        implementation: name of the `ternary_matmul` implementation for packed parameters; None chooses.

    Raises:
        UserError: a context or continuation is empty or holds an id outside the vocabulary, a continuation is too long, or batch_size
            is below 1.
        RunError: a log-probability is not finite.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    rows = _rows(pairs, config)
    longest = _columns(max((row.scored for row in rows), default=1))
    program = _program(config.for_inference, vocabulary or config.vocab_size, implementation)
    params = jax.device_put(params)
    tokens = _TOKENS_ON_CPU if jax.default_backend() == "cpu" else _TOKENS
    waiting = None
    start = 0
    while start < len(rows):
        time = min(_length(len(rows[start].inputs)), config.max_seq_len)
        most = batch_size or max(1, min(tokens // time, _LOGITS // (longest * config.vocab_size)))
        batch = rows[start : start + min(most, len(rows) - start)]
        arrays = _arrays(batch, time, min(most, _power(len(batch))))
        run, _ = program.prepare(params, *arrays)
        found = run(params, *arrays)
        if waiting is not None:  # the batch before is read while this one is under way
            yield from _read(*waiting)
        waiting = batch, found
        start += len(batch)
    if waiting is not None:
        yield from _read(*waiting)


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(pairs: Sequence[Pair], config: ModelConfig) -> list[_Row]:
    """Rows of all pairs, the longest first, so that the one that takes most memory comes first."""
    rows: dict[tuple[int, ...], _Row] = {}
    cut = [0]
    for number, (context, continuation) in enumerate(pairs):
        _check(number, context, continuation, config)
        whole = (*map(int, context), *map(int, continuation))
        cut.append(len(whole) - 1 - config.max_seq_len)
        whole = whole[-(config.max_seq_len + 1) :]
        row = rows.setdefault(whole[:-1], _Row(inputs=whole[:-1], requests={}))
        row.requests.setdefault(whole[-len(continuation) :], []).append(number)
    if max(cut) > 0:
        logger.warning(
            "%d of %d requests are longer than max_seq_len=%d and lose their beginning, up to %d tokens of it",
            sum(lost > 0 for lost in cut),
            len(pairs),
            config.max_seq_len,
            max(cut),
        )
    return sorted(rows.values(), key=lambda row: (-len(row.inputs), row.inputs))


def _check(number: int, context: Sequence[int], continuation: Sequence[int], config: ModelConfig) -> None:
    for name, ids in (("context", context), ("continuation", continuation)):
        if len(ids) == 0:
            raise UserError(f"the {name} of request {number} has no tokens: must have at least 1")
        wrong = min(ids) if min(ids) < 0 else max(ids)
        if not 0 <= wrong < config.vocab_size:
            raise UserError(f"the {name} of request {number} holds token {wrong}: must be from 0 to {config.vocab_size - 1}")
    if len(continuation) > config.max_seq_len:
        raise UserError(
            f"the continuation of request {number} has {len(continuation)} tokens: must be at most max_seq_len={config.max_seq_len}"
        )


def _arrays(batch: Sequence[_Row], time: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs [B, T], positions [B, n] whose logits are needed, and targets [B, n, choices] there, all int32.

    Continuations end in the last column, for that is where those that share a row meet. What no continuation needs has target -1.
    """
    scored = min(_columns(max(row.scored for row in batch)), time)
    inputs = np.zeros((size, time), np.int32)
    positions = np.zeros((size, scored), np.int32)
    targets = np.full((size, scored, _power(max(len(row.requests) for row in batch))), _UNSCORED, np.int32)
    for number, row in enumerate(batch):
        length = len(row.inputs)
        inputs[number, :length] = row.inputs
        positions[number] = np.maximum(np.arange(length - scored, length), 0)
        for choice, continuation in enumerate(row.requests):
            targets[number, scored - len(continuation) :, choice] = continuation
    return inputs, positions, targets


def _read(batch: Sequence[_Row], found: tuple[jax.Array, jax.Array]) -> Iterator[tuple[int, Likelihood]]:
    """Waits for the device. Sums are float64, for float32 would lose digits over a long continuation."""
    logs, best = (np.asarray(array) for array in found)
    for number, row in enumerate(batch):
        for choice, (continuation, requests) in enumerate(row.requests.items()):
            count = len(continuation)
            total = float(logs[number, -count:, choice].sum(dtype=np.float64))
            if not np.isfinite(total):
                raise RunError(f"ln p of request {requests[0]} is {total}: the parameters are damaged, or a sum overflowed")
            one = Likelihood(log_probability=total, greedy=bool(np.array_equal(best[number, -count:], continuation)))
            for request in requests:
                yield request, one


def _length(size: int) -> int:
    """The smallest of 16, 32, 48, 64, 96, 128, 192, … that is not below `size`: two to every doubling from 32 on."""
    step = max(16, _power(size) >> 2)
    return -(-size // step) * step


def _columns(size: int) -> int:
    """1, or the smallest of 8, 16, 32, … that is not below `size`."""
    return 1 if size == 1 else max(8, _power(size))


def _power(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


# --- program ---------------------------------------------------------------------------------------------------------


@functools.cache
def _program(config: ModelConfig, vocabulary: int, implementation: str | None) -> Program:
    return Program(functools.partial(_scores, Transformer(config, implementation=implementation), vocabulary))


def _scores(
    model: Transformer, vocabulary: int, params: Any, inputs: Tokens, positions: Int32[Array, "B n"], targets: Int32[Array, "B n choices"]
) -> tuple[Float32[Array, "B n choices"], Int32[Array, "B n"]]:
    """ln p(target) = logits[target] - logsumexp(logits) at the positions, of no use where there is no target; and the best token there."""
    logits = cast(Output, model.apply({"params": params}, inputs, None, positions)).logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0), -1)
    best = jnp.argmax(logits[..., :vocabulary], -1).astype(jnp.int32)
    return picked - jax.nn.logsumexp(logits, -1, keepdims=True), best
