"""The GGUF container: what is written is read, and a header that lies is refused before anything is built from it."""

import contextlib
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_jax.errors import UserError
from bitnet_jax.formats.gguf_blocks import BlockType
from bitnet_jax.formats.gguf_container import File, Tensor, write

METADATA = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.int": 7,
    "a.float": 0.5,
    "a.strings": ["", "ö", "two words"],
    "a.ints": [1, -2, 3],
    "a.floats": [0.25, -1.0],
    "a.none": [],
}
F32, F16 = BlockType.F32, BlockType.F16


def floats(count, dtype="<f4"):
    return np.arange(count, dtype=dtype)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.gguf"
    tensors = [
        Tensor("one", F32, (3, 5), lambda: [floats(5).view(np.uint8), floats(10).view(np.uint8)]),
        Tensor("two", F16, (7,), lambda: [floats(7, "<f2").view(np.uint8)]),
    ]
    assert write(path, METADATA, tensors) == path.stat().st_size
    return path


def test_what_is_written_is_read(path, tmp_path):
    file = File(path)
    assert {key: list(value) if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()} == METADATA
    assert {name: (info.kind, info.shape, info.start % 32) for name, info in file.tensors.items()} == {
        "one": (F32, (3, 5), 0),
        "two": (F16, (7,), 0),
    }
    np.testing.assert_array_equal(file.raw("one").view("<f4"), [*range(5), *range(10)])
    np.testing.assert_array_equal(file.raw("two").view("<f2"), range(7))
    file.release()
    assert [part.name for part in tmp_path.iterdir()] == ["model.gguf"]


def string(text):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def info(name="t", sizes=(4,), kind=0, offset=0, rank=None):
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes) if rank is None else rank, *sizes, kind, offset)


def gguf(*, magic=b"GGUF", version=3, entries=(), infos=(), data=b"", counts=None, alignment=32):
    tensors, keys = counts or (len(infos), len(entries))
    header = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(entries) + b"".join(infos)
    return header + bytes(-len(header) % alignment) + data


def entry(key="k", kind=4, value=b"\x01\x00\x00\x00"):
    return string(key) + struct.pack("<I", kind) + value


def array(kind, count, values=b""):
    return entry(kind=9, value=struct.pack("<IQ", kind, count) + values)


def aligned(value):
    return entry("general.alignment", 4, struct.pack("<I", value))


LIES = {
    "no GGUF file": [b"", b"GGUF", gguf(magic=b"GGML"), b"\x80\x04" * 40],
    "big-endian": [gguf(version=3 << 24)],
    "version 1": [gguf(version=1)],
    "tensors: must be at most": [gguf(counts=(2**63, 0)), gguf(counts=(1 << 30, 0))],
    "metadata entries: must be at most": [gguf(counts=(0, 2**64 - 1)), gguf(counts=(0, 100))],
    "needs": [
        gguf(entries=[struct.pack("<Q", 60000)]),
        gguf(entries=[entry(kind=8, value=struct.pack("<Q", 2**63))]),
        gguf(entries=[array(4, 2**62)]),
        gguf(infos=[string("t") + struct.pack("<I", 4)]),
    ],
    "must be from 1 to 65535": [gguf(entries=[struct.pack("<Q", 2**64 - 1), bytes(40)]), gguf(entries=[struct.pack("<Q", 0), bytes(40)])],
    "must be from 1 to 64": [gguf(infos=[info("t" * 65)])],
    "not UTF-8": [
        gguf(entries=[entry(b"\xff")]),
        gguf(entries=[entry(kind=8, value=string(b"\xff"))]),
        gguf(entries=[array(8, 1, string(b"\xff"))]),
    ],
    "must be 0 or 1": [gguf(entries=[entry(kind=7, value=b"\x02")]), gguf(entries=[array(7, 2, b"\x01\x03")])],
    "must be from 0 to 12": [gguf(entries=[entry(kind=13)])],
    "must be of numbers, booleans or strings": [gguf(entries=[array(9, 1, struct.pack("<IQ", 4, 0))]), gguf(entries=[array(77, 1)])],
    "strings: must be at most": [gguf(entries=[array(8, 2**61)])],
    "ends behind the file": [gguf(entries=[array(8, 2, string("a") + struct.pack("<Q", 2**63))])],
    "occurs twice": [gguf(entries=[entry(), entry()]), gguf(infos=[info(), info(offset=32)], data=bytes(64))],
    "general.alignment=": [gguf(entries=[aligned(value)]) for value in (0, 1, 4, 24, 1 << 31)],
    "must be from 1 to 4": [gguf(infos=[info(rank=0)]), gguf(infos=[info(sizes=(1,) * 5)]), gguf(infos=[info(rank=2**32 - 1)])],
    "must have no 0": [gguf(infos=[info(sizes=(4, 0))]), gguf(infos=[info(sizes=(200,), kind=35)], data=bytes(4000))],
    "has type 12 (Q4_K)": [gguf(infos=[info(sizes=(256,), kind=12)], data=bytes(256))],
    "has type 99 (unknown)": [gguf(infos=[info(kind=99)], data=bytes(256))],
    "must be a multiple of the alignment": [gguf(infos=[info(offset=4)], data=bytes(64))],
    "leaves a hole": [gguf(infos=[info(offset=32)], data=bytes(64)), gguf(infos=[info(), info("u", offset=2**63)], data=bytes(64))],
    "overlaps": [gguf(infos=[info(sizes=(16,)), info("u", offset=32)], data=bytes(64))],
    "as its tensors say": [
        gguf(infos=[info(sizes=(2**31, 2**31, 2**31, 2**31))], data=bytes(64)),
        gguf(infos=[info()], data=bytes(15)),
        gguf(infos=[info()], data=bytes(40)),
    ],
}


@pytest.mark.parametrize(
    ("message", "raw"),
    [pytest.param(message, raw, id=f"{message} {i}") for message, files in LIES.items() for i, raw in enumerate(files)],
)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path, message, raw):
    path = tmp_path / "lie.gguf"
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        File(path)
    assert message in str(caught.value) or (not raw and "is empty" in str(caught.value))
    assert "\n" not in str(caught.value)


def test_version_two_and_another_alignment_are_read(tmp_path):
    path = tmp_path / "other.gguf"
    for alignment in (8, 256):
        path.write_bytes(gguf(version=2, entries=[aligned(alignment)], infos=[info()], data=bytes(16), alignment=alignment))
        assert File(path).tensors["t"].start % alignment == 0


def test_a_large_vocabulary_is_read_quickly(tmp_path):
    path = tmp_path / "large.gguf"
    write(path, {"tokens": [f"token {i}" for i in range(400_000)]}, [])
    begun = time.process_time()
    assert File(path).metadata["tokens"][399_999] == "token 399999"
    assert time.process_time() - begun < 2


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 400), change=st.binary(min_size=1, max_size=9), cut=st.integers(0, 100))
def test_a_damaged_header_is_read_or_refused_but_never_breaks(tmp_path_factory, place, change, cut):
    folder = tmp_path_factory.getbasetemp()
    whole = folder / "whole.gguf"
    if not whole.exists():
        write(whole, METADATA, [Tensor("one", F32, (3, 5), lambda: [floats(15).view(np.uint8)])])
    raw = bytearray(whole.read_bytes())
    raw[place : place + len(change)] = change
    damaged = folder / "damaged.gguf"
    damaged.write_bytes(raw[: len(raw) - cut])
    with contextlib.suppress(UserError):
        assert len(File(damaged).tensors) <= 1
