"""Text to token ids and back: bytes, a BPE trained on the corpus, or any tokenizer.json.

All three are one class around a `tokenizers.Tokenizer`, so each is saved as a tokenizer.json that other programs read.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bitnet_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
BYTES_VOCAB_SIZE = 257
"""256 bytes and the end of text."""
_EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>")
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_PARALLELISM_SET_BY_USER = _PARALLELISM in os.environ
_process_with_threads: int | None = None
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]")


class Tokenizer:
    """Encodes text to ids and decodes ids to text.

    Text stays text: "<|endoftext|>" written out in it becomes ordinary tokens, unless `special` is asked for.
    """

    def __init__(self, definition: str, where: str = "tokenizer") -> None:
        """From the text of a tokenizer.json.

        Raises:
            UserError: it is none; `where` names it.
        """
        try:
            self._plain = tokenizers.Tokenizer.from_str(definition)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - the package raises bare Exception, and a panic of its core is none at all
            raise UserError(f"{where} is not a tokenizer.json: {' '.join(str(error).split())}") from None
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = True
        self._definition = self._plain.to_str()
        ids = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values(), default=-1) + 1
        """One more than the largest id."""
        self.eos_id: int | None = next((ids[name] for name in _EOS_NAMES if name in ids), None)
        """Id of the end of text, which separates documents; None where the vocabulary holds none of the usual names."""
        self.bos_id: int | None = next((ids[name] for name in _BOS_NAMES if name in ids), None)
        """Id of the beginning of text, which `encode` does not add; None where there is none."""
        model = json.loads(self._definition)["model"]
        self._bytes = model["type"] == "BPE" and not model["merges"] and model["vocab"] == _byte_vocab()

    @functools.cached_property
    def _special(self) -> tokenizers.Tokenizer:
        other = tokenizers.Tokenizer.from_str(self._definition)
        other.encode_special_tokens = False
        return other

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of `text`, int32 [tokens]. Nothing is put before or after them.

        `special`: the names of special tokens in the text become their ids.

        Raises:
            UserError: the text holds a lone surrogate, which is no character.
        """
        data = _utf8(text)
        if self._bytes and not special:
            return np.frombuffer(data, np.uint8).astype(np.int32)
        return np.array((self._special if special else self._plain).encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        if self._bytes:
            return [self.encode(text) for text in texts]
        for text in texts:
            _utf8(text)
        with _all_cores():
            return [np.array(found.ids, np.int32) for found in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `special`: special tokens are written out, not left out.

        Raises:
            UserError: an id is outside the vocabulary.
        """
        values = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if values.size and (values.min() < 0 or values.max() >= self.vocab_size):
            raise UserError(f"token {values.min() if values.min() < 0 else values.max()} must be from 0 to {self.vocab_size - 1}")
        return self._plain.decode(values.tolist(), skip_special_tokens=not special)

    def to_json(self) -> str:
        """The text of a tokenizer.json; `Tokenizer(text)` is the same tokenizer again."""
        return self._definition

    @classmethod
    def from_json(cls, definition: str, where: str = "tokenizer") -> "Tokenizer":
        """The tokenizer that `to_json` wrote; raises UserError where the text is no tokenizer.json."""
        return cls(definition, where)

    @classmethod
    def read(cls, path: Path) -> "Tokenizer":
        """The tokenizer in the file `path`; raises UserError where it cannot be read or is no tokenizer.json."""
        try:
            definition = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        return cls(definition, str(path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._definition == other._definition

    def __hash__(self) -> int:
        return hash(self._definition)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos_id={self.eos_id})"


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 is the end of text."""
    core = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocab(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([END_OF_TEXT])
    return Tokenizer(core.to_str())


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens. Id 0 is the end of text, 1 to 256 are the bytes; a small corpus yields fewer merges.

    The same texts give the same tokenizer, on any number of cores.

    Raises:
        UserError: `vocab_size` leaves no room for the bytes.
    """
    if vocab_size < BYTES_VOCAB_SIZE:
        raise UserError(f"vocab_size={vocab_size} must be at least {BYTES_VOCAB_SIZE} (256 bytes and the end of text) for tokenizer='bpe'")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    with _all_cores():
        core.train_from_iterator(iter(texts), trainer)
    return Tokenizer(core.to_str())


class TextStream:
    """Decodes a growing list of ids: each `push` returns the text that has become certain, never half a character.

    What the pushes and the final `flush` return is, joined, `tokenizer.decode` of all the ids. (Where the ids do not spell UTF-8 and the
    tokenizer falls back to bytes, as LLaMA-2's, the number of U+FFFD can differ: `decode` replaces whole runs of bytes.)
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._decode = functools.partial(tokenizer.decode, special=special)
        # Ids whose text is out already stay as context: what a token looks like may depend on the one before it.
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Takes one id and returns the text that it completes, or ''."""
        self._waiting.append(int(token))
        return self._release(held_back="\N{REPLACEMENT CHARACTER}")

    def flush(self) -> str:
        """The rest, with U+FFFD where a character was never completed."""
        return self._release(held_back=None)

    def _release(self, held_back: str | None) -> str:
        before = self._decode(self._context)
        now = self._decode(self._context + self._waiting)
        if len(now) <= len(before) or (held_back is not None and now.endswith(held_back)):
            return ""
        self._context, self._waiting = self._waiting, []
        return now[len(before) :]


@functools.cache
def _byte_vocab() -> dict[str, int]:
    """Characters by which byte-level tokenizers spell the bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text holds a lone surrogate at character {error.start}: it is no Unicode text") from None


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Lets `tokenizers` use threads here and not afterwards: having used some, it prints a warning in every process forked from this one.

    What the user set in TOKENIZERS_PARALLELISM stays. A forked process stays on one core: it has the threads' locks but not the threads.
    """
    global _process_with_threads
    _process_with_threads = _process_with_threads or os.getpid()
    if _PARALLELISM_SET_BY_USER or _process_with_threads != os.getpid():
        yield
        return
    os.environ[_PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ[_PARALLELISM] = "false"
