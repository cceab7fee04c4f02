"""Text sources as streams of documents: the built-in plays, local files, and Hugging Face data sets.

A corpus is read as often as needed and never held in memory: long documents come in pieces.
"""

import codecs
import contextlib
import glob
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bitnet_jax.data.cache import Progress, silent
from bitnet_jax.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")
PIECE_CHARACTERS = 1 << 18
"""Longest piece of a document that is handled at once, in characters. A longer document is cut after a line end."""
_BLOCK_BYTES = 1 << 20
_ZST_BLOCK_BYTES = 1 << 17


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends: bool
    """Whether the document ends with this piece."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text source that can be read again and again, always in the same order."""

    name: str
    """The source as the user wrote it."""
    read: Callable[[], Iterator[Piece]]
    """Starts reading from the first document. Documents without text are left out."""
    total_bytes: int | None = None
    """UTF-8 bytes of the whole text, where that is known before reading."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the text comes from, and under which licence where that is known: plain JSON values."""


def open_corpus(source: str, *, text_field: str = "text", cache: Path, progress: Progress = silent) -> Corpus:
    """The corpus called `source` (see `DataConfig.source`). Text that comes from the network is kept in the folder `cache`.

    Raises:
        UserError: the source does not exist, is of an unknown kind, or cannot be fetched. What is wrong inside a file is raised when it
            is read.
    """
    if source == "shakespeare":
        from bitnet_jax.data import shakespeare

        return shakespeare.open_plays(cache, progress)
    if source == "stdlib":  # for tests: offline, but the text differs from one Python version to the next
        return Corpus(
            name=source, read=_read_stdlib, provenance={"source": "pydoc_data.topics of the standard library", "licence": "PSF-2.0"}
        )
    if source.startswith("hf:"):
        from bitnet_jax.data import huggingface

        return huggingface.open_dataset(source, text_field, cache, progress)
    return open_files(source, text_field)


def open_files(source: str, text_field: str = "text") -> Corpus:
    """The corpus in a file, in all known files below a folder, or in the files that a glob matches; sorted by path.

    A .txt file is one document; each record of the other kinds is one.

    Raises:
        UserError: nothing matches, or a named file has an unknown suffix.
    """
    files = find_files(source)
    plain = all(path.name.endswith(".txt") for path in files)
    return Corpus(
        name=source,
        read=lambda: (piece for path in files for piece in _READERS[_suffix(path)](path, text_field)),
        total_bytes=sum(path.stat().st_size for path in files) if plain else None,
        provenance={"source": source, "files": len(files)},
    )


def find_files(source: str) -> list[Path]:
    """The files that `source` names, sorted. Hidden files and files of other kinds are passed over in folders only.

    Raises:
        UserError: nothing matches, or a named file has an unknown suffix.
    """
    path = Path(source).expanduser()
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        inside = (found.relative_to(path) for found in path.rglob("*") if found.is_file())
        files = [path / name for name in inside if not any(part.startswith(".") for part in name.parts) and _suffix(name)]
        if not files:
            raise UserError(f"source={source!r} holds no file of kind {kinds}")
        return sorted(files)
    files = [path] if path.is_file() else [Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file()]
    if not files:
        raise UserError(f"source={source!r} matches nothing: must be 'shakespeare', a file, folder or glob of {kinds}, or 'hf:NAME'")
    for found in files:
        if not _suffix(found):
            raise UserError(f"{found} is of an unknown kind: must end in one of {kinds}")
    return sorted(files)


def cut(chunks: Iterable[str]) -> Iterator[Piece]:
    """One document, given in chunks of any size, as pieces that depend on its text alone. No text, no piece."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > PIECE_CHARACTERS:
            end = rest.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
            yield Piece(rest[start:end], ends=False)
            start = end
        rest = rest[start:]
    if rest:  # never empty where a piece was cut off: the loop leaves at least one character
        yield Piece(rest, ends=True)


# --- readers: (file, name of the text field) → pieces ----------------------------------------------------------------


def _read_txt(path: Path, text_field: str) -> Iterator[Piece]:
    return cut(_decoded(path))


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    read = 0
    with reading(path) as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            if b"\0" in block:
                raise UserError(f"{path} is not text: NUL byte at offset {read + block.index(0)}")
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text: invalid byte at offset {read - pending + error.start}") from None
            if not block:
                return
            read += len(block)


def _read_jsonl(path: Path, text_field: str) -> Iterator[Piece]:
    with reading(path) as file:
        yield from _records(path, file, text_field)


def _read_jsonl_zst(path: Path, text_field: str) -> Iterator[Piece]:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} needs the package zstandard: pip install 'bitnet-jax[text]'") from None

    def unpacked(file: BinaryIO) -> Iterator[bytes]:
        # Frame by frame, because the package's own stream takes a file that breaks off for one that ends.
        frame = None
        while block := file.read(_ZST_BLOCK_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data
                if frame.eof:
                    frame = None
        if frame is not None:
            raise zstandard.ZstdError("it breaks off")

    with reading(path) as file:
        try:
            yield from _records(path, _lines(unpacked(file)), text_field)
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is not a whole Zstandard file: {error}") from None


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _records(path: Path, lines: Iterable[bytes], text_field: str) -> Iterator[Piece]:
    offset = 0
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if b"\0" in line:
            raise UserError(f"{path} is not text: NUL byte at offset {offset + line.index(0)} (line {number})")
        try:
            record = json.loads(line.decode("utf-8")) if line.strip() else {text_field: ""}
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: invalid byte at offset {offset + error.start} (line {number})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where} must be a JSON object, not {type(record).__name__}")
        yield from cut([text_of(record, text_field, where)])
        offset += len(line)


def _read_parquet(path: Path, text_field: str) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install 'bitnet-jax[text]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise UserError(f"{path} lacks column {text_field!r} (text_field): its columns are {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from cut([text_of({text_field: value}, text_field, f"{path}, row {number}")])
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).partition(chr(10))[0]}") from None


def text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in record:
        raise UserError(f"{where} lacks field {text_field!r} (text_field): its fields are {', '.join(map(repr, record)) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} must be text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise UserError(f"{where}: field {text_field!r} holds a lone surrogate at character {error.start}") from None
    return text


def _read_stdlib() -> Iterator[Piece]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield from cut([topics[name]])


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Opens `path`; a UserError says in one line that it cannot be read, now or later."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


_READERS: dict[str, Callable[[Path, str], Iterator[Piece]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
}


def _suffix(path: Path) -> str:
    """The suffix of a known kind that `path` ends in, or ''."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")
