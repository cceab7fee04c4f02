"""A rendered conversation as token ids: the template's special tokens become ids, and those that somebody typed stay text.

Both stand in one text when a template has been rendered. So before that, in each message, the first character of whatever spells a
special token gives way to a stand-in, a private character that occurs nowhere else; nothing is found there when special tokens are
looked for. The tokenizer's normaliser then puts the character back. The text is never cut, so that ids are those of the whole.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bitnet_jax.data.tokenizers import Tokenizer

Message = Mapping[str, str]
"""{"role", "content"}"""

StandIns = tuple[tuple[str, str], ...] | None
"""Pairs of a stand-in and the character it stands for; None where no special token was typed in any way."""

_PRIVATE = range(0x100000, 0x10FFFE)
"""Code points of the last private use plane: enough for one to be free in any text that a template may be given."""


class ChatTokens:
    """What a tokenizer needs for conversations.

    Attributes:
        names: the text of each special token by its id. Stop tokens count as special, whatever the tokenizer says of them.
    """

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Sequence[int] = ()) -> None:
        """Of one tokenizer; `stop_tokens` are ids that end a reply."""
        definition = json.loads(tokenizer.to_json())
        added = definition["added_tokens"]
        self.names: dict[int, str] = {
            token["id"]: token["content"] for token in added if token["content"] and (token["special"] or token["id"] in stop_tokens)
        }
        self._tokenizer = tokenizer
        # Such names are looked for in normalised text, where other spellings may have become theirs.
        self._loose = definition["normalizer"] is not None and any(token["normalized"] for token in added if token["id"] in self.names)
        # Looking ahead finds names that overlap, too.
        self._spelled = re.compile(f"(?={'|'.join(map(re.escape, self.names.values()))})") if self.names else None
        self._restoring = functools.lru_cache(maxsize=2)(self._build)

    def name(self, token: int | None) -> str:
        """The text of a special token; '' where there is none."""
        return "" if token is None else self.names.get(token, "")

    def hide(self, messages: Sequence[Message], template: str) -> tuple[list[Message], StandIns]:
        """The messages with stand-ins where their contents spell a special token, and what the stand-ins stand for."""
        contents = [message["content"] for message in messages]
        first = sorted({content[match.start()] for content in contents for match in self._found(content)})
        if not first and not (self._loose and any(self._special_in(content) for content in contents)):
            return list(messages), None
        used = set(template).union(*contents)
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        stand_in = dict(zip(first, free, strict=False))
        hidden: list[Message] = [{**message, "content": self._replace(message["content"], stand_in)} for message in messages]
        return hidden, tuple((private, char) for char, private in stand_in.items())

    def encode(self, text: str, stand_ins: StandIns) -> np.ndarray:
        """The ids of a rendered text, int32 [tokens]."""
        return (self._tokenizer if stand_ins is None else self._restoring(stand_ins)).encode(text, special=True)

    def _found(self, content: str) -> Iterator[re.Match[str]]:
        return iter(()) if self._spelled is None else self._spelled.finditer(content)

    def _special_in(self, content: str) -> bool:
        return not self.names.keys().isdisjoint(self._tokenizer.encode(content, special=True).tolist())

    def _replace(self, content: str, stand_in: Mapping[str, str]) -> str:
        chars = list(content)
        for match in self._found(content):
            chars[match.start()] = stand_in[content[match.start()]]
        return "".join(chars)

    def _build(self, stand_ins: tuple[tuple[str, str], ...]) -> Tokenizer:
        """The tokenizer with a normaliser that replaces stand-ins, and special tokens that are looked for before it does."""
        definition = json.loads(self._tokenizer.to_json())
        for token in definition["added_tokens"]:
            token["normalized"] = token["normalized"] and token["id"] not in self.names
        restore = [{"type": "Replace", "pattern": {"String": private}, "content": char} for private, char in stand_ins]
        rest = [] if definition["normalizer"] is None else [definition["normalizer"]]
        definition["normalizer"] = {"type": "Sequence", "normalizers": [*restore, *rest]}
        return Tokenizer(json.dumps(definition), "tokenizer of the chat")
