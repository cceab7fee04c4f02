"""How fast this machine reads memory: what a kernel that waits for memory is held against."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.cpu.native import CpuConfig, call
from bitnet_jax.errors import UserError
from bitnet_jax.memory import large_array


def read_bandwidth(size: int = 1 << 28, threads: int | None = None, repeats: int = 10) -> float:
    """GB/s (1e9 bytes a second) at which `threads` threads of XLA's pool read `size` bytes, the best of `repeats` times.

    Sizes well above that of the last cache measure main memory.

    Raises:
        UserError: `size` or `repeats` is below 1.
    """
    if size < 1 or repeats < 1:
        raise UserError(f"size={size} and repeats={repeats} must be at least 1")
    config = CpuConfig(threads)

    @jax.jit
    def read(block: jax.Array) -> jax.Array:
        return call("bitnet_read", [jax.ShapeDtypeStruct((), jnp.uint32)], block, config=config)[0]

    room = large_array((size,), np.uint8)
    room[:] = 1  # pages that were never written to are one page of zeros
    block = jax.block_until_ready(jax.device_put(room))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(read(block))
        times.append(time.perf_counter() - begin)
    return size / min(times) / 1e9
