"""What happens to one row of a batch on the host: tokens become text, and a stop token, a stop string or the limit ends it."""

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from bitnet_jax.data.tokenizers import TextStream, Tokenizer
from bitnet_jax.inference.stops import StopStrings


class Finish(enum.Enum):
    """Why a row ended."""

    STOP = "stop"  # a stop token or a stop string
    LENGTH = "length"  # as many new tokens as were asked for


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step adds to one row. Joined, the pieces of a row are its `Generation`.

    Attributes:
        row: which prompt.
        token: the new token; None where it was a stop token.
        text: text that has become certain, perhaps empty: half a character and what may be the beginning of a stop string wait.
        finish: None while the row goes on.
    """

    row: int
    token: int | None
    text: str
    finish: Finish | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        prompt: token ids of the prompt, int32.
        tokens: new token ids, int32, without the stop token that ended them. A stop string ends them with the token that completed it.
        text: the text of `tokens` up to the first stop string, special tokens left out; None without a tokenizer.
        finish: why it ended; None where it has not.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    text: str | None
    finish: Finish | None


class Row:
    """One prompt and what has been generated for it so far."""

    def __init__(
        self,
        number: int,
        prompt: np.ndarray,
        limit: int,
        tokenizer: Tokenizer | None,
        stop_tokens: Collection[int],
        stop_strings: Sequence[str],
    ) -> None:
        """`limit`: new tokens at most. Raises UserError as `StopStrings`."""
        self.finish: Finish | None = None
        self._number, self._prompt, self._limit = number, prompt, limit
        self._stop_tokens = frozenset(stop_tokens)
        self._strings = StopStrings(stop_strings)
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._tokens: list[int] = []
        self._text: list[str] = []

    def push(self, token: int) -> Piece:
        """Takes the next token of a row that has not ended."""
        assert self.finish is None
        stopped = token in self._stop_tokens
        text = ""
        if not stopped:
            self._tokens.append(token)
            text = self._strings.push("" if self._stream is None else self._stream.push(token))
        if stopped or self._strings.found is not None or len(self._tokens) == self._limit:
            if self._stream is not None:
                text += self._strings.push(self._stream.flush()) + self._strings.flush()
            self.finish = Finish.STOP if stopped or self._strings.found is not None else Finish.LENGTH
        self._text.append(text)
        return Piece(row=self._number, token=None if stopped else token, text=text, finish=self.finish)

    def generation(self) -> Generation:
        """The row as it stands."""
        text = None if self._stream is None else "".join(self._text)
        return Generation(prompt=self._prompt, tokens=np.array(self._tokens, np.int32), text=text, finish=self.finish)
