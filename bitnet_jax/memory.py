"""Memory of the process: arrays that are read fast, and freed memory that is kept for the next step."""

import contextlib
import ctypes
import mmap
from typing import Any

import numpy as np

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # names of glibc's mallopt

_HUGE_PAGE = 2 << 20


def large_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros, in huge pages where the system has them and it fills one: what waits for memory reads those faster.

    It begins at a multiple of 64 bytes, so that a device which shares the host's memory takes it as it is.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        room = np.zeros(size + 64, np.uint8)
        begin = -room.ctypes.data % 64
    else:
        pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a system that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        room = np.frombuffer(pages, np.uint8)
        begin = -room.ctypes.data % _HUGE_PAGE
    return room[begin : begin + size].view(dtype).reshape(shape)


def keep_freed_memory() -> bool:
    """Tells glibc to hand freed memory out again instead of returning it to the system; whether it could be told.

    XLA on a CPU allocates its buffers anew in every step, and large ones are mapped and unmapped by default: the page faults cost a
    good part of a training step (experiments/LOG.md). The price is that the process stays as large as it ever was. For programs, not for
    the library: it holds for the whole process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library or system
        return False
    return all(mallopt(option, value) for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)))
