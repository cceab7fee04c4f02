"""Perplexity and bits per byte over all tokens of a text.

**Windows.** Of a text of n tokens, every token but the first is predicted exactly once. Window i feeds tokens [i * stride,
i * stride + window) and predicts the token behind each. Window 0 scores all its predictions, each later one the last `stride` of them,
which no window before it has scored; the last window ends with the text. So a scored token has at least window - stride + 1 tokens
before it, but for the first window. stride = window is the cheapest, a smaller one gives more context.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import partition
from bitnet_jax.array_types import Array, Float32, Tokens
from bitnet_jax.config import ModelConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.programs import Program
from bitnet_jax.transformer import Output, Transformer

_LOGITS = 1 << 26
"""Logits of a batch at most where its size is not given: 256 MiB."""
_UNSCORED = -1


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a text is predicted.

    Attributes:
        nats: sum of -ln p(token) over all predicted tokens.
        tokens: how many were predicted: all but the first.
        window: tokens that a prediction may look back on at most.
        stride: tokens between the beginnings of two windows.
        text_bytes: UTF-8 bytes of the whole text; None where they are not known.
        seconds: computing, without compiling.
        compile_seconds: compiling; next to nothing where the same shapes have run before.
    """

    nats: float
    tokens: int
    window: int
    stride: int
    text_bytes: float | None
    seconds: float
    compile_seconds: float

    @property
    def loss(self) -> float:
        """Mean -ln p in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for a byte of the text, with which models of different tokenizers compare; None where its bytes are not known.

        loss * (tokens + 1) / text_bytes / ln 2: the first token, which nothing predicts, counts as an average one.
        """
        return None if self.text_bytes is None else self.loss * (self.tokens + 1) / self.text_bytes / math.log(2)

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens a second."""
        return self.tokens / self.seconds


def perplexity(
    params: Any,
    config: ModelConfig,
    tokens: np.ndarray,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    text_bytes: float | None = None,
    implementation: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a model over all tokens of a text, by windows as the module says.

    Args:
        params: latent or packed parameters.
        config: the model's configuration.
        tokens: ids [n] of any integer type, memory-mapped if need be.
        window: tokens fed at a time; None is `config.max_seq_len`.
        stride: tokens from window to window; None is `window`.
        batch_size: windows computed at a time; None is as many as keep the logits within 256 MiB. It changes the time, not the result.
        text_bytes: UTF-8 bytes of the text that `tokens` spell, for bits per byte.
        implementation: name of the `ternary_matmul` implementation for packed parameters; None chooses.
        progress: called with the tokens scored so far and all of them.

    Raises:
        UserError: a value is out of range, the text has fewer than two tokens, or a token is outside the vocabulary.
        RunError: a token's loss is not finite.
    """
    window = config.max_seq_len if window is None else window
    stride = window if stride is None else stride
    if not 1 <= window <= config.max_seq_len:
        raise UserError(f"window={window} must be from 1 to max_seq_len={config.max_seq_len}")
    if not 1 <= stride <= window:
        raise UserError(f"stride={stride} must be from 1 to window={window}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if text_bytes is not None and not 0 < text_bytes < math.inf:
        raise UserError(f"text_bytes={text_bytes} must be positive and finite")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens are {tokens.dtype}{list(tokens.shape)}: must be integers in one dimension")
    if len(tokens) < 2:
        raise UserError(f"the text has {len(tokens)} tokens: must have at least 2, for the first is not predicted")

    time_steps = min(window, len(tokens) - 1)
    count = _count(len(tokens), window, stride)
    if batch_size is None:
        batch_size = max(1, min(count, _LOGITS // (time_steps * config.vocab_size)))
    # What lies on devices already stays there: arrays of several processes can only be moved by all of them.
    params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), params)
    program = _program(config.for_inference, implementation)
    total = _Total(len(tokens) - 1, progress)
    run, compile_seconds, waiting = None, 0.0, None
    begun = time.perf_counter()
    for inputs, targets in _batches(tokens, window, stride, batch_size, config.vocab_size):
        if run is None:
            run, compile_seconds = program.prepare(params, inputs, targets)
        losses = run(params, inputs, targets)
        if waiting is not None:  # the batch before is summed while this one is under way
            total.add(*waiting)
        waiting = losses, targets != _UNSCORED
    assert waiting is not None
    total.add(*waiting)
    assert total.tokens == len(tokens) - 1
    return Perplexity(
        nats=total.nats,
        tokens=total.tokens,
        window=window,
        stride=stride,
        text_bytes=text_bytes,
        seconds=time.perf_counter() - begun - compile_seconds,
        compile_seconds=compile_seconds,
    )


def evaluator(
    config: ModelConfig,
    tokens: np.ndarray,
    *,
    window: int,
    text_bytes: float | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
) -> Callable[[Any], dict[str, float]]:
    """A function of the parameters that gives the numbers a training run logs about held-out text.

    They are "validation_loss" in nats per token, "validation_perplexity" and, where `text_bytes` is known,
    "validation_bits_per_byte", over windows that do not overlap. `max_tokens` takes the text's beginning alone, whose bytes are then
    estimated by its share of the tokens.
    """
    part = tokens if max_tokens is None else tokens[:max_tokens]
    part_bytes = None if text_bytes is None else text_bytes * len(part) / len(tokens)

    def evaluate(params: Any) -> dict[str, float]:
        found = perplexity(params, config, part, window=window, batch_size=batch_size, text_bytes=part_bytes)
        numbers = {"validation_loss": found.loss, "validation_perplexity": found.perplexity}
        if found.bits_per_byte is not None:
            numbers["validation_bits_per_byte"] = found.bits_per_byte
        return numbers

    return evaluate


# --- windows ---------------------------------------------------------------------------------------------------------


def _count(length: int, window: int, stride: int) -> int:
    """Windows of a text of `length` tokens."""
    return 1 + max(0, -(-(length - 1 - window) // stride))


def _batches(tokens: np.ndarray, window: int, stride: int, batch_size: int, vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets int32 [B, T] of all windows; what is not scored, and what pads the last window and batch, has target -1."""
    length = len(tokens)
    time_steps = min(window, length - 1)
    starts = [number * stride for number in range(_count(length, window, stride))]
    for first in range(0, len(starts), batch_size):
        inputs = np.zeros((batch_size, time_steps), np.int32)
        targets = np.full((batch_size, time_steps), _UNSCORED, np.int32)
        for row, start in enumerate(starts[first : first + batch_size]):
            ids = tokens[start : start + time_steps + 1].astype(np.int64)
            wrong = ids[(ids < 0) | (ids >= vocab_size)]
            if wrong.size:
                raise UserError(f"the text holds token {wrong[0]}: must be from 0 to {vocab_size - 1}, as the model's vocab_size says")
            inputs[row, : len(ids) - 1] = ids[:-1]
            scored_from = 0 if start == 0 else window - stride
            targets[row, scored_from : len(ids) - 1] = ids[scored_from + 1 :]
        yield inputs, targets


class _Total:
    """The sum over batches, in float64 on the host: float32 would lose digits over a long text."""

    def __init__(self, expected: int, progress: Callable[[int, int], None] | None) -> None:
        self.nats, self.tokens = 0.0, 0
        self._expected, self._progress = expected, progress

    def add(self, losses: jax.Array, counted: np.ndarray) -> None:
        values = np.asarray(losses)[counted].astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            number = self.tokens + int(bad[0]) + 1
            raise RunError(f"the loss of token {number} is {values[bad[0]]}: the parameters are damaged, or a sum overflowed")
        self.nats += float(values.sum())
        self.tokens += values.size
        if self._progress is not None:
            self._progress(self.tokens, self._expected)


# --- program ---------------------------------------------------------------------------------------------------------


@functools.cache
def _program(config: ModelConfig, implementation: str | None) -> Program:
    return Program(functools.partial(_losses, Transformer(config, implementation=implementation)))


def _losses(model: Transformer, params: Any, inputs: Tokens, targets: Tokens) -> Float32[Array, "B T"]:
    """-ln p(target) = logsumexp(logits) - logits[target] at every position, float32; 0 where there is no target."""
    logits = cast(Output, model.apply({"params": params}, inputs)).logits.astype(jnp.float32)
    counted = targets != _UNSCORED
    picked = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], -1)[..., 0]
    return partition.everywhere(jnp.where(counted, jax.nn.logsumexp(logits, -1) - picked, 0.0))
