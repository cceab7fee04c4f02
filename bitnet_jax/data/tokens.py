"""Tokenised corpora: memory-mapped arrays of ids on disk, made once.

    <cache>/tokens/<key>/train.bin, validation.bin   ids, little-endian, uint16 where the vocabulary has at most 65,536 ids, else uint32
    <cache>/tokens/<key>/meta.json                   sizes and checksums

<key> is a hash of the text, the tokenizer, the split and the version of this format. The id of the end of text stands after every
document, so that a model learns where texts end and does not see them as one.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitnet_jax.data import cache, splits
from bitnet_jax.data.cache import Progress, silent
from bitnet_jax.data.corpora import Corpus, Piece
from bitnet_jax.data.splits import Part, Split
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import RunError, UserError

FORMAT_VERSION = 1
_BATCH_CHARACTERS = 1 << 21
_CHECK_IDS = 1 << 22

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenArray:
    """The tokens of one part of a corpus."""

    ids: np.ndarray
    """uint16 or uint32 [tokens], memory-mapped and read-only; an end of text after every document."""
    text_bytes: int
    """UTF-8 bytes of the text that the ids spell. Bits per byte are nats per token * len(ids) / text_bytes / ln 2."""
    documents: int
    """Documents, or ends of documents, in it."""

    def __len__(self) -> int:
        return len(self.ids)


def tokenise(corpus: Corpus, tokenizer: Tokenizer, split: Split, cache_root: Path, progress: Progress = silent) -> dict[Part, TokenArray]:
    """The tokens of both parts of `corpus`, from the cache or newly made. Memory does not grow with the corpus.

    Raises:
        UserError: a tokenizer without an end of text meets several documents, or the cache folder may not be written to.
        RunError: no space left on the disk, or the corpus changed since it was scanned.
    """
    documents = len(split.scan.sizes)
    if tokenizer.eos_id is None and documents > 1:
        raise UserError(f"the tokenizer has no end-of-text token to separate the {documents} documents of source={corpus.name!r}")
    folder = cache_root / "tokens" / key(tokenizer, split)
    if folder.is_dir():
        found, reason = load(folder, tokenizer.vocab_size)
        if found is not None:
            return found
        logger.warning("%s is damaged (%s) and is made again", folder, reason)
        cache.discard(folder)
    with cache.new_folder(folder) as temporary:
        _build(temporary, corpus, tokenizer, split, progress)
    found, reason = load(folder, tokenizer.vocab_size)
    if found is None:
        raise RunError(f"{folder} is damaged though it was just written: {reason}")
    return found


def key(tokenizer: Tokenizer, split: Split) -> str:
    """The name under which these tokens are kept."""
    parts = [FORMAT_VERSION, split.scan.fingerprint, tokenizer.to_json(), split.fraction]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()[:32]


def load(folder: Path, vocab_size: int) -> tuple[dict[Part, TokenArray] | None, str]:
    """The arrays kept in `folder`, or None and the reason why they cannot be used. Every id is looked at."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT_VERSION:
            return None, f"format {meta['format']} is not {FORMAT_VERSION}"
        dtype = _dtype(vocab_size)
        if meta["dtype"] != dtype.name:
            return None, f"dtype {meta['dtype']} is not {dtype.name}"
        found = {}
        for part in Part:
            row = meta["parts"][part.value]
            path, size = folder / f"{part.value}.bin", row["tokens"] * dtype.itemsize
            if path.stat().st_size != size:
                return None, f"{path.name} has {path.stat().st_size} bytes instead of {size}"
            ids = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
            checksum = 0
            for start in range(0, len(ids), _CHECK_IDS):
                some = ids[start : start + _CHECK_IDS]
                checksum = zlib.crc32(some, checksum)
                if some.max() >= vocab_size:
                    return None, f"{path.name} holds id {some.max()}, outside the vocabulary of {vocab_size}"
            if checksum != row["crc32"]:
                return None, f"{path.name} does not have its checksum"
            found[part] = TokenArray(ids=ids, text_bytes=row["text_bytes"], documents=row["documents"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return found, ""


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer, split: Split, progress: Progress) -> None:
    dtype = _dtype(tokenizer.vocab_size)
    rows: dict[Part, dict[str, Any]] = {part: {"tokens": 0, "crc32": 0, "text_bytes": 0, "documents": 0} for part in Part}
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype)
    done = 0
    with cache.writing(folder), _open(folder / "train.bin") as train, _open(folder / "validation.bin") as validation:
        files = {Part.TRAIN: train, Part.VALIDATION: validation}
        for batch in _batches(splits.parts(corpus, split)):
            for (part, piece), ids in zip(batch, tokenizer.encode_batch([piece.text for _, piece in batch]), strict=True):
                data = np.concatenate([ids.astype(dtype), end if piece.ends else end[:0]]).tobytes()
                files[part].write(data)
                size, row = len(piece.text.encode("utf-8")), rows[part]
                row["tokens"] += len(data) // dtype.itemsize
                row["crc32"] = zlib.crc32(data, row["crc32"])
                row["text_bytes"] += size
                row["documents"] += piece.ends
                done += size
            progress("tokenise", done, split.scan.total_bytes)
    meta = {"format": FORMAT_VERSION, "dtype": dtype.name, "parts": {part.value: row for part, row in rows.items()}}
    cache.write_file(folder / "meta.json", json.dumps(meta, indent=1) + "\n")


def _batches(pieces: Iterator[tuple[Part, Piece]]) -> Iterator[list[tuple[Part, Piece]]]:
    batch: list[tuple[Part, Piece]] = []
    characters = 0
    for part, piece in pieces:
        batch.append((part, piece))
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _open(path: Path) -> BinaryIO:
    return path.open("wb")


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
