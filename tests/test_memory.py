"""Freed memory stays with the process when it is asked to, and large arrays begin where devices take them as they are."""

import platform
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bitnet_jax.memory import large_array

PROGRAM = """
import resource, sys
import numpy as np
from bitnet_jax.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 25)  # 256 MiB, written and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, again = faults(), faults()
print(first, again)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be told")
def test_memory_is_fetched_from_the_system_once():
    counts = {}
    for mode in ("keep", "return"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        counts[mode] = [int(count) for count in done.stdout.split()]
    assert counts["return"][1] > counts["return"][0] / 2
    assert counts["keep"][1] < counts["keep"][0] / 10


@pytest.mark.parametrize("shape", [(0,), (3, 5), (1 << 20, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_large_array_is_zeros_that_a_device_takes_without_a_copy(shape: tuple[int, ...], dtype: type) -> None:
    array = large_array(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert array.flags.writeable
    assert not array.any()
    on_device = jax.device_put(array)
    if array.size and jax.default_backend() == "cpu":
        assert on_device.unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says which pages are huge")
def test_a_large_array_lies_in_huge_pages_where_there_are_any() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text(encoding="ascii"):
        pytest.skip("this system has none")
    array = large_array((64 << 20,), np.uint8)
    array[:] = 1
    pages, inside = 0, False
    with open("/proc/self/smaps", encoding="ascii") as file:
        for line in file:
            words = line.split()
            if "-" in words[0]:
                begin, end = (int(word, 16) for word in words[0].split("-"))
                inside = begin <= array.ctypes.data < end
            elif inside and words[0] == "AnonHugePages:":
                pages = int(words[1]) * 1024
    assert pages > 0  # all of them, where memory is not in pieces
