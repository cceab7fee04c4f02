"""Compiled programs, kept between processes."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

from bitnet_jax.data.cache import cache_folder
from bitnet_jax.errors import UserError


def keep_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, in one folder for each kind of machine, and find it there again.

    For programs, not for the library, and called before JAX is imported. JAX's own variables, where they are set, decide instead.
    """
    with contextlib.suppress(UserError):  # without a cache folder nothing is kept
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "programs" / _machine()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _machine() -> str:
    """Home folders are shared between machines, and machine code for one ends the process on another. Loops are divided among the cores
    that there were when a program was compiled, which JAX's own name for it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        kind = [platform.machine(), platform.platform()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return hashlib.sha256("\n".join([*kind, f"{cores} cores"]).encode()).hexdigest()[:16]
