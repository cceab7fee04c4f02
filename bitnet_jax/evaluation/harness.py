"""A model behind the interface of EleutherAI's lm-evaluation-harness. Needs the extra `lm-eval`.

`harness_model` makes an `lm_eval.api.model.LM` of a model: for `evaluation.tasks`, or for the harness's own functions.

Texts become tokens as in the harness's own adapter for transformers: spaces at the end of a context belong to the continuation; both
are encoded as one text and cut where the context's tokens end; the ids that the model's texts begin with stand before a context, and
where there is none the beginning of text does, or else the end of text; the names of special tokens become their ids, for chat templates
write them out; a text whose likelihood is asked as a whole is cut by the harness's own windows. The differences are errors instead of
failed assertions, and that a text which is too long loses its beginning never without a warning.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_jax.config import ModelConfig
from bitnet_jax.data.prepared import check_vocabulary
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.evaluation.answers import Answers, fingerprint
from bitnet_jax.evaluation.likelihood import likelihoods
from bitnet_jax.inference import Sampling, generate
from bitnet_jax.inference.sampling import GREEDY

MAX_NEW_TOKENS = 256
"""New tokens where a task does not say how many, as in the harness; half of the context where that is less."""
_GENERATION_BATCH = 8
"""Prompts computed at a time where the size of a batch is not given."""

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


def harness_model(
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    prefix: Sequence[int] = (),
    stop_tokens: Sequence[int] = (),
    chat_template: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    implementation: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Any:
    """The model as an `lm_eval.api.model.LM`.

    Args:
        params: latent or packed parameters.
        config: the model's configuration.
        tokenizer: its tokenizer, with a beginning or an end of text.
        prefix: ids that its texts begin with.
        stop_tokens: ids that end a generated text; () is the tokenizer's end of text.
        chat_template: Jinja source, for `apply_chat_template`.
        batch_size: requests computed at a time; None is what fits, and 8 for generated texts.
        seed: of the first text that is drawn where a task asks for draws; the next has the next seed.
        implementation: name of the `ternary_matmul` implementation for packed parameters; None chooses.
        cache: file that keeps every answer which is not drawn; what it has of this model is not computed again.
        progress: called with "likelihoods" or "texts", how many are done, and of how many.

    Raises:
        UserError: lm_eval is not installed, a value is out of range, the tokenizer has neither a beginning nor an end of text, or the
            cache is another model's.
    """
    check_vocabulary(tokenizer, config.vocab_size)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    start = prefix[0] if prefix else tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if start is None:
        raise UserError("the tokenizer has neither a beginning nor an end of text: nothing says what a text begins with")
    facts = (config.for_inference, tokenizer.to_json(), tuple(prefix), tuple(stop_tokens))
    return _model_class()(
        params=params,
        config=config,
        tokenizer=tokenizer,
        start=int(start),
        prefix=tuple(map(int, prefix)),
        stop_tokens=tuple(stop_tokens) or None,
        chat_template=chat_template,
        batch_size=batch_size,
        seed=seed,
        implementation=implementation,
        answers=None if cache is None else Answers(cache, fingerprint(params, *facts)),
        progress=progress or (lambda stage, done, total: None),
    )


@functools.cache
def _model_class() -> type:
    """The class of `harness_model`, defined when it is first needed, since its base is in an optional package."""
    need()
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class HarnessModel(TemplateLM):
        def __init__(self, **fields: Any) -> None:
            super().__init__()
            self._ = Fields(**fields)

        @property
        def eot_token_id(self) -> int:
            return self._.start if self._.tokenizer.eos_id is None else self._.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return self._.start

        @property
        def max_length(self) -> int:
            return self._.config.max_seq_len

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self._.encode(string, add_special_tokens)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            def compute(missing: list[Any]) -> Iterator[tuple[int, tuple[float, bool]]]:
                pairs = []
                for request in missing:
                    context, continuation = request.args
                    if continuation == "":
                        raise UserError(f"the continuation of {_short(context)} is empty: must have at least one character")
                    pairs.append(self._pair(context, continuation))
                return self._.likelihoods(pairs)

            return [(float(value), bool(greedy)) for value, greedy in self._through_cache("loglikelihood", requests, compute)]

        def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if context == "":
                ids = self.tok_encode(continuation, add_special_tokens=False)
                before, after = (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)
            else:
                before, after = self._encode_pair(context, continuation)
            if not after:
                raise UserError(f"{_short(continuation)} behind {_short(context)} has no tokens of its own: it cannot be scored")
            return before or [self.prefix_token_id], after

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            found = dict(self._.likelihoods([(context, continuation) for _, context, continuation in requests]))
            return [found[number] for number in range(len(requests))]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            def compute(missing: list[Any]) -> Iterator[tuple[int, float]]:
                pairs, owners = [], []
                for number, request in enumerate(missing):
                    windows = utils.get_rolling_token_windows(
                        self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                    )
                    cut = [utils.make_disjoint_window(window) for window in windows]
                    pairs += cut
                    owners += [number] * len(cut)
                    if not cut:
                        yield number, 0.0  # the empty text is certain
                waiting, parts = Counter(owners), [0.0] * len(pairs)
                for number, (parts[number], _) in self._.likelihoods(pairs):
                    owner = owners[number]
                    waiting[owner] -= 1
                    if waiting[owner] == 0:
                        yield owner, sum(part for part, one in zip(parts, owners, strict=True) if one == owner)

            return self._through_cache("loglikelihood_rolling", requests, compute)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            return self._through_cache("generate_until", requests, self._.texts)

        def _through_cache(self, kind: str, requests: list[Any], compute: Callable[[list[Any]], Iterator[tuple[int, Any]]]) -> list[Any]:
            """The answers of the file, and those of `compute`, which are kept there and with the harness's own cache, if it has one."""
            answers = self._.answers
            kept = [answers is not None and not (kind == "generate_until" and _drawn(request.args[1])) for request in requests]
            found = [
                answers.get(kind, request.args) if answers is not None and keep else None
                for request, keep in zip(requests, kept, strict=True)
            ]
            missing = [number for number, answer in enumerate(found) if answer is None]
            for done, (number, answer) in enumerate(compute([requests[number] for number in missing]), 1):
                number = missing[number]
                found[number] = answer
                if answers is not None and kept[number]:
                    answers.put(kind, requests[number].args, answer)
                self.cache_hook.add_partial(kind, requests[number].args, answer)
                self._.progress("texts" if kind == "generate_until" else "likelihoods", done, len(missing))
            return found

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            from bitnet_jax.inference import chat_template

            if self._.chat_template is None:
                raise UserError("the model has no chat template")
            names = {"bos_token": self._.name(self._.start), "eos_token": self._.name(self._.tokenizer.eos_id)}
            return chat_template.render(self._.chat_template, chat_history, add_generation_prompt=add_generation_prompt, **names)

        @property
        def tokenizer_name(self) -> str:
            return fingerprint({}, self._.tokenizer.to_json(), self._.chat_template)

    return HarnessModel


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What a harness model has, and what it does with tokens."""

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer
    start: int
    prefix: tuple[int, ...]
    stop_tokens: tuple[int, ...] | None
    chat_template: str | None
    batch_size: int | None
    seed: int
    implementation: str | None
    answers: Answers | None
    progress: Progress

    def name(self, token: int | None) -> str:
        """The text of a special token; '' where there is none."""
        return "" if token is None else self.tokenizer.decode([token], special=True)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text, with the prefix unless it is written out in the text, or `add_special_tokens` says."""
        ids = self.tokenizer.encode(text, special=True).tolist()
        if add_special_tokens is None:
            add_special_tokens = tuple(ids[: len(self.prefix)]) != self.prefix
        return [*self.prefix, *ids] if add_special_tokens else ids

    def likelihoods(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(number, (log-probability, greedy)) of pairs of ids, as they are done."""
        options = {"batch_size": self.batch_size, "vocabulary": self.tokenizer.vocab_size, "implementation": self.implementation}
        for number, found in likelihoods(self.params, self.config, pairs, **options):
            yield number, (found.log_probability, found.greedy)

    def texts(self, requests: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """(number, text) of requests for texts, those with the same arguments and of similar lengths together."""
        groups: dict[str, list[tuple[list[int], int]]] = {}
        plans: dict[str, tuple[int, tuple[str, ...], Sampling]] = {}
        cut = [0]
        for number, request in enumerate(requests):
            context, arguments = request.args
            plan = _plan(arguments, self.config.max_seq_len)
            room = self.config.max_seq_len - plan[0]
            ids = self.encode(context) or [self.start]
            cut.append(len(ids) - room)
            plans[repr(plan)] = plan
            groups.setdefault(repr(plan), []).append((ids[-room:], number))
        if max(cut) > 0:
            logger.warning(
                "%d of %d contexts leave no room for new tokens within max_seq_len=%d and lose their beginning, up to %d tokens of it",
                sum(lost > 0 for lost in cut),
                len(requests),
                self.config.max_seq_len,
                max(cut),
            )
        size = self.batch_size or _GENERATION_BATCH
        for key, group in groups.items():
            limit, until, sampling = plans[key]
            group.sort(key=lambda one: (-len(one[0]), one[0]))
            for first in range(0, len(group), size):
                batch = group[first : first + size]
                # A last batch as large as the others needs no program of its own; the row that is written twice ends when it ends.
                rows = batch + batch[-1:] * (min(size, len(group)) - len(batch))
                found = generate(
                    self.params,
                    self.config,
                    [ids for ids, _ in rows],
                    max_new_tokens=limit,
                    sampling=sampling,
                    tokenizer=self.tokenizer,
                    stop_tokens=self.stop_tokens,
                    stop_strings=until,
                    seed=[(self.seed + number) % 2**32 for _, number in rows],
                    implementation=self.implementation,
                )
                for (_, number), row in zip(batch, found.rows, strict=False):
                    yield number, row.text or ""


def _drawn(arguments: Mapping[str, Any]) -> bool:
    sample = arguments.get("do_sample")
    return bool(sample) or (sample is None and bool(arguments.get("temperature")))


def _plan(arguments: Mapping[str, Any], max_seq_len: int) -> tuple[int, tuple[str, ...], Sampling]:
    """New tokens at most, stop strings and sampling of a task's generation arguments.

    Raises:
        UserError: an argument is unknown or its value means nothing here, or the context has no room for so many tokens.
    """
    known = dict(arguments)
    until = known.pop("until", None) or []
    until = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    limits = [known.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")]
    limit = next((int(value) for value in limits if value is not None), min(MAX_NEW_TOKENS, max_seq_len // 2))
    if not 1 <= limit < max_seq_len:
        raise UserError(f"max_gen_toks={limit} of a task must be from 1 to {max_seq_len - 1}, below max_seq_len={max_seq_len}")
    drawn = _drawn(arguments)
    known.pop("do_sample", None)
    temperature = float(known.pop("temperature", None) or 0.0)
    if drawn and temperature == 0:
        raise UserError("do_sample of a task needs a temperature above 0")
    if known.pop("num_beams", 1) != 1:
        raise UserError(f"num_beams={arguments['num_beams']} of a task must be 1: there is no beam search here")
    filters = {name: known.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in known}
    if known:
        raise UserError(f"the generation argument {next(iter(known))!r} of a task is unknown here")
    if not drawn:
        filters = {name: value for name, value in filters.items() if name == "repetition_penalty"}
        return limit, until, Sampling(**filters) if filters else GREEDY
    return limit, until, Sampling(temperature=temperature, **filters)


def need() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("tasks need the package lm-eval: pip install 'bitnet-jax[lm-eval]'") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"…{text[-60:]}")
