"""Generating text from a batch of prompts, at once or streamed token by token."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import cpu
from bitnet_jax.config import ModelConfig
from bitnet_jax.cpu import RoughTable
from bitnet_jax.data.prepared import check_vocabulary
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.inference import prompts as prompt_arrays
from bitnet_jax.inference.decoding import MOST, Plan, Progress, programs
from bitnet_jax.inference.prompts import Prompt
from bitnet_jax.inference.rows import Generation, Piece, Row
from bitnet_jax.inference.sampling import GREEDY, Controls, Sampling
from bitnet_jax.transformer import KVCache

_CHUNK = 32
"""New tokens between two looks for stop strings when not streaming. Their number changes what is computed in vain, not the text."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where the time of a generation went. Encoding, decoding text and what the consumer of a stream does are not in it.

    Attributes:
        compile_seconds: compiling prefill and decode; next to nothing where a batch of these sizes has run before.
        prefill_seconds: running the prompts and choosing the first token of each.
        decode_seconds: making all further tokens.
        prompt_tokens: tokens of all prompts.
        new_tokens: tokens made for all rows, stop tokens too.
        decoded_tokens: those that decode made: all but the first of each row.
    """

    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    decoded_tokens: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second, all rows together."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens a second behind the first of each row, all rows together; None where there was no second."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens else None


@dataclass(frozen=True, kw_only=True)
class Generations:
    """One `Generation` for each prompt, in their order, and where the time went."""

    rows: tuple[Generation, ...]
    timing: Timing


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    tokenizer: Tokenizer | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    prefix: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    implementation: str | None = None,
    first_pass: RoughTable | None = None,
) -> Generations:
    """Continues every prompt; one `lax.while_loop` on the device, or one for every 32 tokens where there are stop strings.

    A row of a batch gets what it would get alone (as far as the rounding of float32 sums does not depend on the size of the batch, and
    unless the model has one activation scale for a whole batch): with its own seed from a sequence, or greedily, the same tokens.

    Args:
        params: latent or packed parameters.
        config: the model's configuration.
        prompts: texts or token ids, of any lengths.
        max_new_tokens: new tokens of a row at most; with the longest prompt no more than `config.max_seq_len`.
        sampling: for all rows, or one for each.
        tokenizer: gives the results a text; needed for prompts that are text and for stop strings. Ids it lacks are never chosen.
        stop_tokens: ids that end a row and are left out; None is the tokenizer's end of text, where there is one.
        stop_strings: texts that end a row; its text ends before the first of them.
        prefix: ids put before every prompt that is text, as the model was trained; prompts of ids stay as they are.
        seed: for all rows, which then draw differently from one another, or one for each: row b of seeds (s, t, …) draws as the first
            row of its own seed does. The same seed gives the same tokens.
        implementation: name of the `ternary_matmul` implementation for packed parameters; None chooses.
        first_pass: `inference.first_pass(params, config)`, with which text that is greedy or of a small `top_k` costs fewer bytes; the
            tokens are the same.

    Raises:
        UserError: a value is out of range, or a prompt is empty, too long or not of this vocabulary.
        RunError: the model's logits are not finite.
    """
    session = _Session(
        params, config, prompts, max_new_tokens, sampling, tokenizer, stop_tokens, stop_strings, prefix, seed, implementation, first_pass
    )
    for _ in session.pieces(_CHUNK if stop_strings else max_new_tokens):
        pass
    return session.result()


def stream(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    tokenizer: Tokenizer | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    prefix: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    implementation: str | None = None,
    first_pass: RoughTable | None = None,
    sizes: Callable[[int], int] = prompt_arrays.bucket,
) -> "Stream":
    """`generate`, token by token: an iterator over `Piece`s, one for each row that goes on, with the tokens and text of `generate`.

    Arguments and errors are those of `generate`; wrong arguments raise here, not at the first token. `sizes` says to what prompts and
    KV cache are padded: the coarser, the more computed in vain, and the fewer programs compiled where many prompts follow each other.
    """
    return Stream(
        _Session(
            params,
            config,
            prompts,
            max_new_tokens,
            sampling,
            tokenizer,
            stop_tokens,
            stop_strings,
            prefix,
            seed,
            implementation,
            first_pass,
            sizes,
        )
    )


class Stream(Iterator[Piece]):
    """Pieces as they are made. It may be left at any time; nothing is computed ahead."""

    def __init__(self, session: "_Session") -> None:
        """Made by `stream`."""
        self._session = session
        self._pieces = session.pieces(1)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def result(self) -> Generations:
        """What has been generated so far; rows that go on have `finish` None. Raises UserError before the first piece."""
        return self._session.result()


class _Session:
    """One call of `generate` or `stream`: the arrays that go into the programs, and the rows that come out."""

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling],
        tokenizer: Tokenizer | None,
        stop_tokens: Sequence[int] | None,
        stop_strings: Sequence[str],
        prefix: Sequence[int],
        seed: int | Sequence[int],
        implementation: str | None,
        first_pass: RoughTable | None,
        sizes: Callable[[int], int] = prompt_arrays.bucket,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if tokenizer is not None:
            check_vocabulary(tokenizer, config.vocab_size)
        elif stop_strings:
            raise UserError(f"stop_strings={list(stop_strings)!r} need a tokenizer")
        ids = prompt_arrays.encode(prompts, config, tokenizer, max_new_tokens, prefix)
        stops = _stop_tokens(stop_tokens, tokenizer, config.vocab_size)
        self._rows = [Row(i, row, max_new_tokens, tokenizer, stops, stop_strings) for i, row in enumerate(ids)]
        self._sizes = sizes
        self._prompts, self._lengths = prompt_arrays.pad(ids, sizes)
        self._plan = _plan(len(ids), sampling, seed, stops, config.vocab_size if tokenizer is None else tokenizer.vocab_size)
        self._params, self._config, self._limit = params, config.for_inference, max_new_tokens
        self._rough = first_pass if cpu.runs(implementation) and int(self._plan.vocabulary) >= MOST else None
        self._prefill, self._decode = programs(self._config, implementation)
        self._made = self._new_tokens = 0
        self._compile_seconds = self._prefill_seconds = self._decode_seconds = 0.0

    def pieces(self, chunk: int) -> Iterator[Piece]:
        """Runs the generation, looking at it after the first token and then after every `chunk` tokens."""
        params, plan = jax.device_put(self._params), self._plan
        batch, time_padded = self._prompts.shape
        capacity = max(time_padded, self._sizes(int(self._lengths.max()) + self._limit))
        cache = KVCache.empty(self._config, batch, capacity)
        tokens = jnp.zeros((batch, self._sizes(self._limit)), jnp.int32)
        inputs = (params, self._rough, cache, tokens, self._prompts, self._lengths, plan)
        prefill, seconds = self._prefill.prepare(*inputs)
        self._compile_seconds += seconds
        begun = time.perf_counter()
        state, progress = prefill(*inputs)
        count, new = self._look(progress)
        self._prefill_seconds += time.perf_counter() - begun
        del cache, tokens, inputs  # donated
        yield from self._push(new)

        decode = None
        while any(row.finish is None for row in self._rows):
            limit = np.int32(min(count + chunk, self._limit))
            if decode is None:
                decode, seconds = self._decode.prepare(params, self._rough, state, plan, limit)
                self._compile_seconds += seconds
            begun = time.perf_counter()
            state, progress = decode(params, self._rough, state, plan, limit)
            count, new = self._look(progress)
            self._decode_seconds += time.perf_counter() - begun
            yield from self._push(new)

    def _look(self, progress: Progress) -> tuple[int, np.ndarray]:
        """Waits for the device; how many tokens each row has, and those not seen before [B, new]."""
        tokens, count, finite = jax.device_get((progress.tokens, progress.count, progress.finite))
        if not finite:
            raise RunError(f"the logits of new token {count - 1} are not finite: the parameters are damaged, or a sum overflowed")
        new, self._made = tokens[:, self._made : count], int(count)
        return self._made, new

    def _push(self, new: np.ndarray) -> Iterator[Piece]:
        for column in new.T.tolist():
            for row, token in zip(self._rows, column, strict=True):
                if row.finish is None:
                    self._new_tokens += 1
                    yield row.push(token)

    def result(self) -> Generations:
        if self._made == 0:
            raise UserError("nothing has been generated yet: take a piece first")
        return Generations(
            rows=tuple(row.generation() for row in self._rows),
            timing=Timing(
                compile_seconds=self._compile_seconds,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                prompt_tokens=int(self._lengths.sum()),
                new_tokens=self._new_tokens,
                decoded_tokens=max(0, self._new_tokens - len(self._rows)),
            ),
        )


def _stop_tokens(stop_tokens: Sequence[int] | None, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    if stop_tokens is None:
        return () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
    for token in stop_tokens:
        if not 0 <= token < vocab_size:
            raise UserError(f"stop token {token} must be from 0 to {vocab_size - 1}")
    return tuple(int(token) for token in stop_tokens)


def _plan(batch: int, sampling: Sampling | Sequence[Sampling], seed: int | Sequence[int], stops: tuple[int, ...], vocabulary: int) -> Plan:
    samplings = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    seeds = [int(seed)] * batch if isinstance(seed, (int, np.integer)) else [int(one) for one in seed]
    draws = range(batch) if isinstance(seed, (int, np.integer)) else [0] * batch
    for name, values in (("sampling", samplings), ("seed", seeds)):
        if len(values) != batch:
            raise UserError(f"{name} has {len(values)} values: must have one, or one for each of the {batch} prompts")
    for one in seeds:
        if not 0 <= one < 2**32:
            raise UserError(f"seed={one} must be from 0 to 4294967295")
    padded = np.full(4 if len(stops) <= 4 else prompt_arrays.bucket(len(stops)), -1, np.int32)
    padded[: len(stops)] = stops
    return Plan(
        seeds=jnp.array(seeds, jnp.uint32),
        draws=jnp.array(draws, jnp.uint32),
        controls=Controls.of(samplings),
        stops=jnp.asarray(padded),
        vocabulary=jnp.int32(vocabulary),
    )
