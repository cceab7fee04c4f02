"""The safetensors container: what is written is read, by us and by the reference package, and a header that lies is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bitnet_jax.errors import UserError
from bitnet_jax.formats import safetensors

ARRAYS = {
    "embedding": np.arange(96, dtype=np.float32).reshape(12, 8),
    "odd": np.arange(7, dtype=np.uint8),
    "half": np.linspace(-1, 1, 33).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.5, np.float32),
    "none": np.zeros((0, 4), np.int64),
}


def write(path: Path, arrays: dict[str, np.ndarray] = ARRAYS, **metadata: str) -> int:
    tensors = [
        safetensors.Tensor(name, safetensors.dtype_name(array.dtype), array.shape, lambda array=array: [array])
        for name, array in arrays.items()
    ]
    return safetensors.write(path, tensors, metadata)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert write(path, note="ü") == path.stat().st_size
    file = safetensors.File(path)
    assert file.metadata == {"note": "ü"}
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        assert not found.flags.writeable or not np.shares_memory(found, file.read(name))
    file.release()
    assert file.read("odd").tobytes() == ARRAYS["odd"].tobytes()


def test_the_reference_package_reads_what_is_written_and_writes_what_is_read(tmp_path: Path) -> None:
    write(tmp_path / "ours.safetensors")
    for name, array in load_file(tmp_path / "ours.safetensors").items():
        assert np.array_equal(array, ARRAYS[name])
    save_file(ARRAYS, tmp_path / "theirs.safetensors", {"a": "b"})
    file = safetensors.File(tmp_path / "theirs.safetensors")
    assert file.metadata == {"a": "b"}
    for name, array in ARRAYS.items():
        assert file.read(name).tobytes() == array.tobytes()


def test_large_tensors_lie_where_a_device_can_use_them(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"small": np.zeros(3, np.uint8), "large": np.zeros((64, 4), np.float32)}, x="y" * 5)
    file = safetensors.File(tmp_path / "a.safetensors")
    assert file.tensors["large"].start % 64 == 0
    assert file.read("large").ctypes.data % 64 == 0


def test_pieces_are_made_one_after_the_other(tmp_path: Path) -> None:
    alive: list[int] = []

    def pieces() -> Any:
        for i in range(4):
            alive.append(i)
            yield np.full((2, 3), i, np.float32)

    safetensors.write(tmp_path / "a.safetensors", [safetensors.Tensor("stack", "F32", (4, 2, 3), pieces)], {})
    assert safetensors.File(tmp_path / "a.safetensors").read("stack")[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert alive == [0, 1, 2, 3]


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path) -> None:
    def broken() -> Any:
        yield np.zeros(2, np.float32)
        raise UserError("the source is damaged")

    (tmp_path / "a.safetensors").write_bytes(b"before")
    with pytest.raises(UserError, match="the source is damaged"):
        safetensors.write(tmp_path / "a.safetensors", [safetensors.Tensor("x", "F32", (4,), broken)], {})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def raw(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "must be an object"),
        (b"{", "is not JSON"),
        (b"\xff\xff", "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN is no number"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "'dtype' occurs twice"),
        ({"a": 3}, "must have dtype, shape and data_offsets"),
        ({"a": entry() | {"more": 1}}, "must have dtype, shape and data_offsets"),
        ({"a": entry(dtype="F8")}, "has type 'F8'"),
        ({"a": entry(dtype=["F32"])}, "has type"),
        ({"a": entry(shape=[-2])}, "has shape"),
        ({"a": entry(shape=[True, 2])}, "has shape"),
        ({"a": entry(shape=[2.0])}, "has shape"),
        ({"a": entry(shape=[1] * 9)}, "has shape"),
        ({"a": entry(shape=[2**60])}, "has shape"),
        ({"a": entry(shape=[2**40, 2**40, 2**40])}, "must span"),
        ({"a": entry(shape=[2**32, 2**32, 2**2])}, "must span"),
        ({"a": entry(offsets=[0, 12])}, "must span 8 bytes"),
        ({"a": entry(offsets=[8, 0])}, "must span 8 bytes"),
        ({"a": entry(offsets=[0])}, "must be two positions"),
        ({"a": entry(offsets=[-8, 0])}, "must be two positions"),
        ({"a": entry(offsets=[0.0, 8.0])}, "must be two positions"),
        ({"a": entry(offsets=[8, 16])}, "leaves a hole before it: it starts at 8, must start at 0"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "overlaps the tensor before it"),
        ({"a": entry(), "b": entry(offsets=[8, 16])}, "must be"),
        ({}, "must be"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "__metadata__ must be an object of strings"),
        ({"a": entry(), "__metadata__": []}, "__metadata__ must be an object of strings"),
    ],
)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        safetensors.File(raw(tmp_path / "a.safetensors", header))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 101_000_000, 80])
def test_a_length_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(UserError, match=f"header has {length} bytes: must be at most"):
        safetensors.File(raw(tmp_path / "a.safetensors", {"a": entry()}, length=length))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, message in (("missing", "does not exist"), (".", "is no plain file"), ("empty", "is empty")):
        with pytest.raises(UserError, match=message):
            safetensors.File(tmp_path / name)
