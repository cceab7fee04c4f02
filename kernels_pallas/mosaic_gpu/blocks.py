"""Blocks of the GPU kernels: what they are, how much shared memory they take, and which ones a call gets."""

import dataclasses
import math
from typing import Any

import numpy as np

from kernels_pallas.arg_specs import CHIPS, ArgSpec, default_device
from kernels_pallas.block_config import tuned
from kernels_pallas.packing import bytes_per_row

MULTIPROCESSORS = 132
"""Of an H100 or H200 as SXM module (NVIDIA H100 white paper). Another number is slower at most."""

SHARED_MEMORY = 232_448
"""Bytes of shared memory that a block of threads may have (CUDA C++ Programming Guide, compute capability 9.0)."""

_SPLIT_ROWS = 256
"""The largest M that is not pipelined: tiles are too few to occupy the device unless K is split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Blocks of `mosaic_gpu`.

    Raises:
        ValueError: a size is not one that the kernels have.
    """

    rows: int = 0
    """Rows of activations in a tile; a multiple of 8 up to 256. 0: all blocks are those that were measured, or by rule."""
    outputs: int = 128
    """Outputs in a tile: 64, 128 or 256."""
    inputs: int = 256
    """Input features in a step: 256 or 512, so that a row of packed bytes is 64 or 128."""
    splits: int | None = None
    """Parts of K that different blocks of threads sum, each with all of its bytes in flight; None where tiles are pipelined."""
    stages: int = 2
    """Steps that are in flight where tiles are pipelined."""
    chip: str | None = None
    """Name of a GPU in `CHIPS`. None: that of JAX's default device. Named where another one is compiled for, or simulated."""
    interpret: Any = None
    """`plgpu.InterpretGPUParams` where the kernel is simulated; None where it runs."""

    def __post_init__(self) -> None:
        if self.rows not in range(0, 257, 8):
            raise ValueError(f"rows={self.rows} must be a multiple of 8 from 8 to 256")
        if self.outputs not in (64, 128, 256):
            raise ValueError(f"outputs={self.outputs} must be 64, 128 or 256")
        if self.inputs not in (256, 512):
            raise ValueError(f"inputs={self.inputs} must be 256 or 512")
        if self.splits is None and self.outputs < 128:
            raise ValueError(f"outputs={self.outputs} must be at least 128 where tiles are pipelined: 64 for each of two warpgroups")
        if self.splits is not None and self.splits < 1:
            raise ValueError(f"splits={self.splits} must be at least 1")
        if self.stages < 1:
            raise ValueError(f"stages={self.stages} must be at least 1")
        if self.chip is not None and (self.chip not in CHIPS or CHIPS[self.chip].platform != "gpu"):
            raise ValueError(f"chip={self.chip!r} must be one of {', '.join(n for n, chip in CHIPS.items() if chip.platform == 'gpu')}")


def blocks(spec: ArgSpec, config: GpuConfig | None = None) -> GpuConfig:
    """`config`, with blocks where it leaves them open: those that were measured on the device, else by rule."""
    config = config or GpuConfig()
    if config.rows:
        return config
    found = None
    if config.chip is None and default_device().platform == "gpu":
        found = tuned("mosaic_gpu", spec, default_device().device_kind, GpuConfig)
    return dataclasses.replace(found or rule(spec), chip=config.chip, interpret=config.interpret)


def rule(spec: ArgSpec) -> GpuConfig:
    """Blocks by rule, from counts of bytes and tiles; not measured.

    Up to 256 rows: tiles so high that x adds few bytes to the codes, and so many parts of K that each multiprocessor has two blocks of
    threads with all of their bytes in flight, or most have one where there are more than 32 rows. Beyond: the tiles with which the last
    round of blocks wastes least.
    """
    if spec.m > _SPLIT_ROWS:
        tiles = [
            GpuConfig(rows=rows, outputs=outputs, stages=stages) for rows, outputs, stages in ((128, 256, 3), (256, 128, 2), (128, 128, 4))
        ]
        return min(tiles, key=lambda c: math.ceil(_tiles(c, spec) / MULTIPROCESSORS) * (c.rows * c.outputs + 4096))
    rows = min(128, max(8, 1 << (spec.m - 1).bit_length()))
    outputs = 64 if rows <= 8 else 256 if rows == 32 else 128
    inputs = 512 if bytes_per_row(spec.k, spec.encoding) % 128 == 0 and rows <= 16 else 256
    wanted, together = (2 * MULTIPROCESSORS, 2) if rows <= 32 else (96, 1)  # sums of many rows are larger than the codes they come from
    steps = math.ceil(spec.k / inputs)
    found = GpuConfig()
    for splits in range(1, steps + 1):
        found = GpuConfig(rows=rows, outputs=outputs, inputs=inputs, splits=splits)
        if together * (shared_memory(found, spec.k, spec.out_dtype) + 2048) <= SHARED_MEMORY and _tiles(found, spec) * splits >= wanted:
            break
    return found


def _tiles(config: GpuConfig, spec: ArgSpec) -> int:
    return math.ceil(spec.m / config.rows) * math.ceil(spec.n / config.outputs)


def steps_of(config: GpuConfig, k: int) -> int:
    """Steps in which a block of threads takes K inputs, or its part of them."""
    return math.ceil(math.ceil(k / config.inputs) / (config.splits or 1))


def shared_memory(config: GpuConfig, k: int, out_dtype: Any) -> int:
    """Bytes of shared memory that a block of threads takes for arrays; barriers add less than 1 KiB."""
    itemsize = 4 if (config.splits or 1) > 1 else np.dtype(out_dtype).itemsize
    steps = steps_of(config, k) if config.splits is not None else min(config.stages, steps_of(config, k))
    return steps * (config.rows * config.inputs + config.outputs * config.inputs // 4) + config.rows * config.outputs * itemsize
