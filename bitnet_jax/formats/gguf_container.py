"""The GGUF container, versions 2 and 3, little-endian: metadata, a list of tensors, and their bytes behind it.

    "GGUF"    4 bytes, then u32 version, u64 number of tensors, u64 number of metadata entries
    metadata  for each entry: string key, u32 type, value. A string is u64 bytes and UTF-8; an array is u32 type, u64 length, values
    tensors   for each: string name, u32 dimensions, u64 sizes (the fastest first), u32 type, u64 offset
    data      from the next multiple of `general.alignment` (32 where it is not given) on; offsets count from there

Sources: ggml's `docs/gguf.md` and `ggml/src/gguf.cpp`. A file is checked whole before a tensor is looked at, and more strictly than the
programs do: no entry twice, no arrays in arrays, and between tensors nothing but the padding that the alignment asks for.
"""

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitnet_jax.errors import UserError
from bitnet_jax.formats.files import Mapped, whole_file
from bitnet_jax.formats.gguf_blocks import BY_NUMBER, OTHER_TYPES, BlockType

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_UINT32, _INT32, _FLOAT32 = 4, 5, 6
_MAX_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_STRINGS = 1 << 22  # in all arrays together; the largest vocabularies have a quarter of a million tokens and half a million merges
_MAX_KEY = (1 << 16) - 1  # bytes, by the format
_MAX_NAME = 64  # bytes, by ggml
_MAX_ALIGNMENT = 1 << 20
_ALIGNMENT = 32


class Info(NamedTuple):
    """A tensor of a file: type, shape with the fastest axis last, and its first and last byte plus one from the start of the file."""

    kind: BlockType
    shape: tuple[int, ...]
    start: int
    stop: int


class File:
    """A file that was checked and mapped.

    Attributes:
        path: the file.
        metadata: bool, int, float, str; an array is a list of str or a read-only NumPy array.
        tensors: type, shape and place of every tensor.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header of `path`; no tensor is looked at.

        Raises:
            UserError: the file is missing or no GGUF file, or its header lies: about a count, a length, a type, a size, a place.
        """
        self.path = path
        self._mapped = Mapped(path)
        self.metadata, self.tensors = _Parser(path, self._mapped.data).parse()

    def raw(self, name: str) -> np.ndarray:
        """The bytes of the tensor `name`, mapped, uint8 [bytes]."""
        info = self.tensors[name]
        return self._mapped.data[info.start : info.stop]

    def release(self) -> None:
        """Gives back the memory that reading has taken."""
        self._mapped.release()


class _Parser:
    """A place in the bytes of a file, and what is read from there on."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.view, self.place, self.size = path, data, memoryview(data), 0, data.size
        self.strings_left = _MAX_STRINGS

    def parse(self) -> tuple[dict[str, Any], dict[str, Info]]:
        if self.size < 24 or self.take(4, "the magic").tobytes() != b"GGUF":
            raise UserError(f"{self.path} is no GGUF file: it must begin with 'GGUF' and have at least 24 bytes")
        version = self.number("<u4", "the version")
        if version not in (2, 3):
            kind = "it is big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise UserError(f"{self.path} is a GGUF file that is not read ({kind}): must be version 2 or 3, little-endian")
        tensors = self.count("tensors", 24, _MAX_TENSORS)
        entries = self.count("metadata entries", 13, _MAX_ENTRIES)
        metadata: dict[str, Any] = {}
        for number in range(entries):
            key = self.string(f"key {number}", _MAX_KEY)
            if key in metadata:
                raise self.wrong(f"metadata {_short(key)!r} occurs twice")
            metadata[key] = self.value(self.number("<u4", _short(key)), _short(key))
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.wrong(f"general.alignment={_short(str(alignment))} must be a power of two from 8 to {_MAX_ALIGNMENT}")
        infos: dict[str, Info] = {}
        for number in range(tensors):
            name = self.string(f"name of tensor {number}", _MAX_NAME)
            if name in infos:
                raise self.wrong(f"tensor {_short(name)!r} occurs twice")
            infos[name] = self.info(_short(name), alignment)
        return metadata, self.placed(infos, alignment)

    def wrong(self, text: str) -> UserError:
        return UserError(f"{self.path}: {text}")

    def take(self, count: int, what: str) -> np.ndarray:
        """The next `count` bytes, as they lie in the file."""
        if count > self.size - self.place:
            raise self.wrong(f"{what} needs {count} bytes at byte {self.place}: the file has {self.size - self.place} more")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, dtype: str, what: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(kind.itemsize, what), kind)[0].item()

    def count(self, what: str, least: int, limit: int) -> int:
        """A number of things that take at least `least` bytes each."""
        found = self.number("<u8", f"the number of {what}")
        most = min(limit, self.size // least)
        if found > most:
            raise self.wrong(f"has {found} {what}: must be at most {most}")
        return found

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number("<u8", what)
        if limit is not None and not 0 < length <= limit:
            raise self.wrong(f"{what} has {length} bytes: must be from 1 to {limit}")
        return self.text(self.take(length, what).tobytes(), what)

    def text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], key)
        if kind == _BOOL:
            found = self.number("u1", key)
            if found > 1:
                raise self.wrong(f"{key} is the byte {found}: a boolean must be 0 or 1")
            return bool(found)
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            raise self.wrong(f"{key} has type {kind}: must be from 0 to 12")
        inner, length = self.number("<u4", key), self.number("<u8", key)
        if inner == _STRING:
            return self.strings(length, key)
        if inner not in _SCALARS and inner != _BOOL:
            raise self.wrong(f"{key} is an array of type {inner}: must be of numbers, booleans or strings")
        dtype = np.dtype(_SCALARS.get(inner, "u1"))
        found = np.frombuffer(self.take(length * dtype.itemsize, key), dtype)
        if inner == _BOOL and (found > 1).any():
            raise self.wrong(f"{key} holds {found.max()}: a boolean must be 0 or 1")
        return found.view(np.bool_) if inner == _BOOL else found

    def strings(self, count: int, key: str) -> list[str]:
        """A loop that does nothing needless: vocabularies have hundreds of thousands."""
        most = min(self.strings_left, (self.size - self.place) // 8)
        if count > most:
            raise self.wrong(f"{key} has {count} strings: must be at most {most}")
        self.strings_left -= count
        found, view, place, size, length_at = [], self.view, self.place, self.size, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = place + 8
                place = start + length_at(view, place)[0] if start <= size else size + 1
                if place > size:
                    raise self.wrong(f"string {len(found)} of {key} ends behind the file")
                found.append(str(view[start:place], "utf-8"))
        except UnicodeDecodeError:
            raise self.wrong(f"string {len(found)} of {key} is not UTF-8") from None
        self.place = place
        return found

    def info(self, name: str, alignment: int) -> Info:
        """Type, shape and place of a tensor, the place counted from the start of the data."""
        where = f"tensor {name!r}"
        rank = self.number("<u4", where)
        if not 1 <= rank <= 4:
            raise self.wrong(f"{where} has {rank} dimensions: must be from 1 to 4")
        shape = tuple(int(size) for size in np.frombuffer(self.take(8 * rank, where), "<u8"))[::-1]
        number, offset = self.number("<u4", where), self.number("<u8", where)
        if number not in BY_NUMBER:
            name = OTHER_TYPES.get(number, "unknown")
            raise self.wrong(f"{where} has type {number} ({name}): must be one of {', '.join(kind.name for kind in BlockType)}")
        kind = BY_NUMBER[number]
        if 0 in shape or shape[-1] % kind.weights:
            raise self.wrong(f"{where} has shape {list(shape)}: must have no 0, and rows of a multiple of {kind.weights} for {kind.name}")
        if offset % alignment:
            raise self.wrong(f"{where} starts at {offset}: must be a multiple of the alignment {alignment}")
        return Info(kind, shape, offset, offset + kind.size(math.prod(shape)))

    def placed(self, infos: dict[str, Info], alignment: int) -> dict[str, Info]:
        """The tensors with places counted from the start of the file, if they lie end to end."""
        first, place = _padded(self.place, alignment), 0
        for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
            if info.start != _padded(place, alignment):
                kind = "overlaps the tensor before it" if info.start < place else "leaves a hole before it"
                raise self.wrong(f"tensor {_short(name)!r} {kind}: it starts at {info.start}, must start at {_padded(place, alignment)}")
            place = info.stop
        if infos and self.size not in (first + place, first + _padded(place, alignment)):
            raise self.wrong(f"has {self.size} bytes: must be {first + place}, as its tensors say")
        return {name: info._replace(start=first + info.start, stop=first + info.stop) for name, info in infos.items()}


def _padded(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _short(text: str) -> str:
    """At most 100 characters of a stranger's text, on one line."""
    text = text if len(text) <= 100 else text[:100] + "…"
    return text if text.isprintable() else repr(text)[1:-1]


# --- writing ---------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor to be written: its bytes are those of the arrays that `pieces()` gives, end to end, made when their turn comes."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]


def write(path: Path, metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> int:
    """Writes a file, one piece in memory at a time, and returns its size in bytes. It appears whole or not at all.

    Args:
        path: the file.
        metadata: bool, int (as uint32), float (as float32), str; list of str; list of int (as int32) or of float (as float32).
        tensors: in the order of the file.

    Raises:
        UserError, RunError: as `files.whole_file`.
    """
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    place = 0
    for tensor in tensors:
        assert len(tensor.name.encode()) < _MAX_NAME
        sizes = tensor.shape[::-1]
        header += _string(tensor.name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.kind.number, place)
        place += _padded(_bytes(tensor), _ALIGNMENT)
    with whole_file(path) as file:
        file.write(header + bytes(-len(header) % _ALIGNMENT))
        for tensor in tensors:
            written = sum(file.write(np.ascontiguousarray(piece).data) for piece in tensor.pieces())
            assert written == _bytes(tensor), f"{tensor.name}: {written} bytes"
            file.write(bytes(-written % _ALIGNMENT))
        return file.tell()


def _bytes(tensor: Tensor) -> int:
    return tensor.kind.size(math.prod(tensor.shape))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    kind = next((kind for type_, kind in ((int, _INT32), (float, _FLOAT32)) if value and isinstance(value[0], type_)), _STRING)
    body = b"".join(map(_string, value)) if kind == _STRING else np.asarray(value, _SCALARS[kind]).tobytes()
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + body
