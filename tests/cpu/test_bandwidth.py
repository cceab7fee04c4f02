"""Reading memory: the native function looks at every byte, and the figure is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cpu
from bitnet_jax.cpu.native import call
from bitnet_jax.errors import UserError


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1, 64, 65, 255, 257, 4097, 100_003, 1_000_000])
def test_every_byte_is_read_once(size: int, threads: int) -> None:
    values = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    result = jax.ShapeDtypeStruct((), jnp.uint32)
    total = call("bitnet_read", [result], jnp.asarray(values), config=cpu.CpuConfig(threads))[0]
    words = size // 4 * 4
    assert int(total) == int(values[:words].view(np.uint32).sum(dtype=np.uint32) + values[words:].sum(dtype=np.uint32)) % 2**32


def test_the_figure_is_positive() -> None:
    assert cpu.read_bandwidth(1 << 16, repeats=2) > 0
    assert cpu.read_bandwidth(1 << 16, threads=1, repeats=2) > 0


def test_wrong_input_is_named() -> None:
    with pytest.raises(UserError, match="size=0 and repeats=1 must be at least 1"):
        cpu.read_bandwidth(0, repeats=1)
    with pytest.raises(UserError, match="threads=0 must be from 1"):
        cpu.read_bandwidth(64, threads=0)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="bytes has element type"):
        jax.block_until_ready(call("bitnet_read", [jax.ShapeDtypeStruct((), jnp.uint32)], jnp.zeros((4,), jnp.int8), config=None))
