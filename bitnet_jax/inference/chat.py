"""Conversations: the model's template around every message, replies as a stream, and a history that fits the context."""

import bisect
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_jax.config import ModelConfig
from bitnet_jax.cpu import RoughTable
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.inference import chat_template
from bitnet_jax.inference.chat_tokens import ChatTokens, Message, StandIns
from bitnet_jax.inference.generation import Generations, Stream, stream
from bitnet_jax.inference.prompts import coarse
from bitnet_jax.inference.rows import Piece
from bitnet_jax.inference.sampling import GREEDY, Sampling

_MARK = "\uf8ff"
"""Stands for a reply where the template is asked what it puts behind one."""


@dataclass
class _Turn:
    user: str
    reply: str = ""


class Chat:
    """A conversation with one model.

    What a person or the model says stays text: "<|eot_id|>" in a message is spelled out for the model and ends nothing. That holds for
    templates that write a message as it is; one that changes its letters, or joins messages without anything between, can make a name anew.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        tokenizer: Tokenizer,
        template: str,
        *,
        system: str | None = None,
        prefix: Sequence[int] = (),
        stop_tokens: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 512,
        seed: int = 0,
        implementation: str | None = None,
        first_pass: RoughTable | None = None,
    ) -> None:
        """Renders the template once, to see that it works and what ends a turn in it.

        Args:
            params: latent or packed parameters.
            config: the model's configuration.
            tokenizer: its tokenizer.
            template: Jinja source, see `chat_template.render`.
            system: a message before all others; None is none.
            prefix: ids that every text of the model begins with; not put before a template that writes them out itself.
            stop_tokens: ids that end a reply, beside the special token that the template puts behind one; () is the end of text.
            sampling: how tokens are chosen.
            max_new_tokens: tokens of a reply at most; fewer where the context has no room for more.
            seed: of the first reply; each further one has the next seed.
            implementation: name of the `ternary_matmul` implementation for packed parameters; None chooses.
            first_pass: as `inference.generate`.

        Raises:
            UserError: a value is out of range, or the template fails.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed} must be from 0 to 4294967295")
        self._config, self._template, self._system = config, template, system
        self._prefix, self._limit, self._seed = tuple(prefix), max_new_tokens, seed
        self._tokens = ChatTokens(tokenizer, stop_tokens)
        self._bos, self._eos = prefix[0] if prefix else tokenizer.bos_id, tokenizer.eos_id
        stops = tuple(stop_tokens) or (() if self._eos is None else (self._eos,))
        self.stop_tokens: tuple[int, ...] = tuple(sorted({*stops, *self._end_of_turn()}))
        """Ids that end a reply."""
        self._stream = functools.partial(
            stream,
            params,
            config,
            tokenizer=tokenizer,
            sampling=sampling,
            stop_tokens=self.stop_tokens,
            implementation=implementation,
            first_pass=first_pass,
            sizes=coarse,
        )
        self._turns: list[_Turn] = []
        self._replies = 0

    @property
    def messages(self) -> list[Message]:
        """What has been said and is not forgotten, the system's message first."""
        return self._messages(self._turns)

    def reset(self) -> None:
        """Forgets all that was said, but not the system's message."""
        self._turns = []

    def reply(self, text: str) -> "Reply":
        """The model's answer to `text`, as it is made.

        The history is what was shown: each piece enters it when it is taken, and where no more are taken the reply ends there. Without
        a first piece nothing was said, and the message does not enter it either. Where the context is full the oldest turns are
        forgotten, so that at least `max_new_tokens`, or half of the context, remain for the answer.

        Raises:
            UserError: the message alone, with the system's, is too long, or the template fails.
        """
        size, turns = self._config.max_seq_len, self._turns
        room = min(self._limit, size // 2)

        @functools.cache
        def ids(dropped: int) -> np.ndarray:
            return self._encode([*self._messages(turns[dropped:]), {"role": "user", "content": text}])

        def fits(dropped: int) -> bool:
            return len(ids(dropped)) + room <= size

        dropped = 0 if fits(0) else 1 + bisect.bisect_left(range(1, len(turns) + 1), True, key=fits)
        if dropped > len(turns):
            raise UserError(
                f"the message has {len(ids(len(turns)))} tokens with all that goes with it: must be at most {size - room}, "
                f"for the context has {size} and the reply needs {room}"
            )
        pieces = self._stream(
            [ids(dropped)], max_new_tokens=min(self._limit, size - len(ids(dropped))), seed=[(self._seed + self._replies) % 2**32]
        )
        return Reply(self, pieces, _Turn(text), turns[dropped:], dropped)

    def _messages(self, turns: Sequence[_Turn]) -> list[Message]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        said = [({"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.reply}) for turn in turns]
        return [*system, *(message for pair in said for message in pair)]

    def _encode(self, messages: Sequence[Message]) -> np.ndarray:
        """The ids of a conversation up to where the model goes on, int32 [tokens], the prefix once before them."""
        ids = self._tokens.encode(*self._render(messages))
        if tuple(ids[: len(self._prefix)].tolist()) == self._prefix:
            return ids
        return np.concatenate([np.array(self._prefix, np.int32), ids])

    def _end_of_turn(self) -> tuple[int, ...]:
        """The special token that the template puts behind a reply, where it puts one."""
        text, _ = self._render(self._messages([_Turn("Hi", _MARK)]), add_generation_prompt=False)
        rest = text.rpartition(_MARK)[2].lstrip() if _MARK in text else ""
        found = [(len(name), token) for token, name in self._tokens.names.items() if rest.startswith(name)]
        return (max(found)[1],) if found else ()

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> tuple[str, StandIns]:
        """The text of a conversation, and what stands in it for characters of names that were typed."""
        hidden, stand_ins = self._tokens.hide(messages, self._template)
        text = chat_template.render(
            self._template,
            hidden,
            bos_token=self._tokens.name(self._bos),
            eos_token=self._tokens.name(self._eos),
            add_generation_prompt=add_generation_prompt,
        )
        return text, stand_ins

    def _said(self, turns: list[_Turn]) -> None:
        """Takes over the history that a reply begins."""
        self._turns = turns
        self._replies += 1


class Reply(Iterator[Piece]):
    """One answer as it is made. It may be left at any time; the history keeps what was taken.

    Attributes:
        dropped: how many turns were forgotten for it, the oldest first.
    """

    def __init__(self, chat: Chat, pieces: Stream, turn: _Turn, before: list[_Turn], dropped: int) -> None:
        """Made by `Chat.reply`."""
        self._chat, self._pieces, self._turn, self._before = chat, pieces, turn, before
        self._begun = False
        self.dropped = dropped

    def __next__(self) -> Piece:
        piece = next(self._pieces)
        if not self._begun:
            self._begun = True
            self._chat._said([*self._before, self._turn])
        self._turn.reply += piece.text
        return piece

    def result(self) -> Generations:
        """The answer so far, and its timing. Raises UserError before the first piece."""
        return self._pieces.result()
