"""Freed memory stays with the process when it is asked to."""

import platform
import subprocess
import sys

import pytest

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
