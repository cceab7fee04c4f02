"""The safetensors container: a JSON header, and the tensors' raw little-endian bytes behind it.

    8 bytes  length of the header, unsigned
    header   {name: {"dtype": …, "shape": […], "data_offsets": [start, stop]}, …, "__metadata__": {string: string}}
    data     the tensors end to end, without holes and without overlap

The `safetensors` package copies what it reads and holds in memory all that it writes. A model of 2 billion parameters is mapped here
and never copied, and is written one layer at a time; that is what this file is for.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bitnet_jax.errors import UserError
from bitnet_jax.formats.files import Mapped, whole_file

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The types that are read and written, by the container's names."""

MAX_HEADER = 100_000_000
"""Longest header in bytes, as in the container's own rules."""
_ALIGNMENT = 64  # bytes: what XLA needs to use mapped memory as it is
_MAX_RANK = 8
_MAX_PARTS = 1 << 20  # lists and objects, whose values take many times the memory of their text


class Info(NamedTuple):
    """A tensor of a file: type by the container's name, shape, and its first and last byte plus one, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class File:
    """A file that was checked and mapped.

    Attributes:
        path: the file.
        tensors: type, shape and place of every tensor.
        metadata: the strings beside them.
    """

    def __init__(self, path: Path) -> None:
        """Checks the header of `path` whole; no tensor is looked at.

        Raises:
            UserError: the file is missing or no safetensors file, or the header lies: about its length, a type, a shape, a place.
        """
        self.path = path
        self._mapped = Mapped(path)
        self.tensors, self.metadata = _parse(path, self._mapped.data)

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, mapped where its place in the file allows, and read-only. Its values are not checked."""
        info = self.tensors[name]
        dtype, raw = DTYPES[info.dtype], self._mapped.data[info.start : info.stop]
        return (raw.copy() if info.start % dtype.itemsize else raw).view(dtype).reshape(info.shape)

    def release(self) -> None:
        """Gives back the memory that reading has taken."""
        self._mapped.release()


def _parse(path: Path, data: np.ndarray) -> tuple[dict[str, Info], dict[str, str]]:
    if data.size < 8:
        raise UserError(f"{path} is no safetensors file: it has {data.size} bytes, fewer than the 8 of the header's length")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER, data.size - 8):
        raise UserError(f"{path} is no safetensors file: its header has {length} bytes: must be at most {min(MAX_HEADER, data.size - 8)}")
    raw = data[8 : 8 + length].tobytes()
    parts = raw.count(b"[") + raw.count(b"{") + raw.count(b",") // 4
    if parts > _MAX_PARTS:
        raise UserError(f"{path} is no safetensors file: its header has {parts} parts: must be at most {_MAX_PARTS}")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file: its header is not JSON: {_short(str(error))}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is no safetensors file: its header must be an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ must be an object of strings")
    first = 8 + length
    tensors = {name: _info(path, name, entry, first) for name, entry in header.items()}
    place = first
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != place:
            kind = "overlaps the tensor before it" if info.start < place else "leaves a hole before it"
            raise UserError(f"{path}: tensor {_short(name)!r} {kind}: it starts at {info.start - first}, must start at {place - first}")
        place = info.stop
    if place != data.size:
        raise UserError(f"{path} has {data.size} bytes: must be {place}, as its header says")
    return tensors, metadata


def _info(path: Path, name: str, entry: Any, first: int) -> Info:
    where = f"{path}: tensor {_short(name)!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where} has type {_short(str(dtype))!r}: must be one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise UserError(f"{where} has shape {_short(str(shape))}: must be at most {_MAX_RANK} sizes, each from 0 to 2^48")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(place) is int and 0 <= place < 2**63 for place in offsets):
        raise UserError(f"{where} has data_offsets {_short(str(offsets))}: must be two positions")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise UserError(f"{where} has data_offsets {offsets}: must span {size} bytes, as {dtype} {shape} needs")
    return Info(dtype, tuple(shape), first + offsets[0], first + offsets[1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{_short(name)!r} occurs twice")
        values[name] = value
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:100] + "…"


# --- writing ---------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor to be written: its bytes are those of the arrays that `pieces()` gives, end to end, made when their turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]


def write(path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> int:
    """Writes a file, one piece in memory at a time, and returns its size in bytes. It appears whole or not at all.

    Tensors whose size is a multiple of 64 bytes come first, so that each of those lies where XLA can use it as it is.

    Raises:
        UserError, RunError: as `files.whole_file`.
    """
    ordered = sorted(tensors, key=lambda tensor: _bytes(tensor) % _ALIGNMENT != 0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for tensor in ordered:
        assert tensor.name not in header
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, place := place + _bytes(tensor)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise UserError(f"{path} would have a header of {len(text)} bytes: must be at most {MAX_HEADER}")
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for piece in tensor.pieces():
                assert piece.dtype == DTYPES[tensor.dtype]
                written += file.write(np.ascontiguousarray(piece).view(np.uint8).data) if piece.size else 0
            assert written == _bytes(tensor), f"{tensor.name}: {written} bytes"
    return 8 + len(text) + place


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def dtype_name(dtype: Any) -> str:
    """The container's name of a NumPy type."""
    return next(name for name, known in DTYPES.items() if known == np.dtype(dtype))
