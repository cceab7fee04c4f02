"""Which text is trained on and which is held out.

The rule: documents are ranked by a hash of their text, and the first `fraction` of them (of the different ones, rounded) is held
out. So neither the order of the documents nor a new one moves the others across by itself, and copies of one document never stand
on both sides. Where the fraction comes to less than half a document, the end of every document is held out instead, cut after a
line end where one is near.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from bitnet_jax.data.cache import Progress, silent
from bitnet_jax.data.corpora import Corpus, Piece
from bitnet_jax.errors import RunError, UserError


class Part(Enum):
    TRAIN = "train"
    VALIDATION = "validation"


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one pass over a corpus finds out. 16 bytes a document."""

    fingerprint: str
    """sha256 of the text and of where its documents end."""
    digests: np.ndarray
    """uint64 [documents]: a hash of each document."""
    sizes: np.ndarray
    """int64 [documents]: UTF-8 bytes of each document."""

    @property
    def total_bytes(self) -> int:
        return int(self.sizes.sum())


@dataclass(frozen=True, kw_only=True)
class Split:
    """The two parts of a scanned corpus."""

    scan: Scan
    fraction: float
    """Share that is held out; 0 holds nothing out."""
    held_out: np.ndarray | None = None
    """bool [documents]; None where the end of every document is held out."""


def scan(corpus: Corpus, progress: Progress = silent) -> Scan:
    """Reads `corpus` once.

    Raises:
        UserError: it holds no text, or something in it is not text.
    """
    whole, digests, sizes = hashlib.sha256(), [], []
    document, size, done = hashlib.blake2b(digest_size=8), 0, 0
    for piece in corpus.read():
        data = piece.text.encode("utf-8")
        whole.update(data)
        document.update(data)
        size += len(data)
        done += len(data)
        if piece.ends:
            whole.update(size.to_bytes(8, "little"))
            digests.append(int.from_bytes(document.digest(), "little"))
            sizes.append(size)
            document, size = hashlib.blake2b(digest_size=8), 0
        progress("read", done, corpus.total_bytes)
    if not sizes:
        raise UserError(f"source={corpus.name!r} is empty: it holds no text")
    return Scan(fingerprint=whole.hexdigest(), digests=np.array(digests, np.uint64), sizes=np.array(sizes, np.int64))


def split(found: Scan, fraction: float) -> Split:
    """Holds out `fraction` of the corpus, by the rule above."""
    if fraction == 0:
        return Split(scan=found, fraction=fraction, held_out=np.zeros(len(found.sizes), bool))
    different = np.unique(found.digests)
    count = round(fraction * len(different))
    if count == 0:
        return Split(scan=found, fraction=fraction)
    return Split(scan=found, fraction=fraction, held_out=found.digests <= different[count - 1])


def parts(corpus: Corpus, division: Split) -> Iterator[tuple[Part, Piece]]:
    """Reads `corpus`, saying of every piece to which part it belongs. A document that is cut ends in both parts.

    Raises:
        RunError: the corpus is no longer what was scanned.
    """
    whole, number, start = hashlib.sha256(), 0, 0
    sizes, held_out = division.scan.sizes, division.held_out
    for piece in corpus.read():
        data = piece.text.encode("utf-8")
        end = start + len(data)
        if number >= len(sizes) or end > sizes[number]:
            raise _changed(corpus)
        whole.update(data)
        if held_out is not None:
            yield Part.VALIDATION if held_out[number] else Part.TRAIN, piece
        else:
            yield from _cut_off(data, start, int(sizes[number]), division.fraction)
        start = end
        if piece.ends:
            whole.update(end.to_bytes(8, "little"))
            number, start = number + 1, 0
    if whole.hexdigest() != division.scan.fingerprint:
        raise _changed(corpus)


def _cut_off(data: bytes, start: int, size: int, fraction: float) -> Iterator[tuple[Part, Piece]]:
    """The pieces of bytes [start, start + len(data)) of a document of `size` bytes whose end is held out."""
    border = size - max(1, int(size * fraction))
    end = start + len(data)
    if end <= border:
        yield Part.TRAIN, Piece(data.decode("utf-8"), ends=end == border)
        return
    if start >= border:
        yield Part.VALIDATION, Piece(data.decode("utf-8"), ends=end == size)
        return
    nearest = max(0, border - start - (size - border))  # at most doubles what is held out
    at = data.rfind(b"\n", nearest, border - start) + 1 or border - start
    while data[at] & 0xC0 == 0x80:  # inside a character
        at -= 1
    if at or start:  # what came before needs its end, even where nothing is left to go with it
        yield Part.TRAIN, Piece(data[:at].decode("utf-8"), ends=True)
    yield Part.VALIDATION, Piece(data[at:].decode("utf-8"), ends=end == size)


def _changed(corpus: Corpus) -> RunError:
    return RunError(f"source={corpus.name!r} changed while it was being read: start again")
