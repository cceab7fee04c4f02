"""Memory of the process: keep what was freed, so that the next step need not fetch it from the system again."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # names of glibc's mallopt


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
