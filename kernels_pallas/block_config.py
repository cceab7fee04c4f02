"""Block sizes of the Pallas kernels: what they are, a choice by rule, and choices that were measured (`tuned/<device kind>.json`).

A file in `tuned` holds, for each implementation, a list of calls with the block sizes that were fastest there:

    {"jax": "0.12.0.1", "date": "2026-11-23", "mosaic_gpu": [{"m": 16, "k": 2560, "n": 6912, "x_dtype": "int8", "blocks": {...}}]}

An entry serves every M up to its own that no smaller entry serves. A device without a file, or a call without an entry, gets the rule.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kernels_pallas.arg_specs import CHIPS, ArgSpec

TUNED = Path(__file__).parent / "tuned"

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """Blocks of `mosaic_tpu`, and what it is compiled for.

    Raises:
        ValueError: a size is not a multiple of the tile it is cut in, or the chip has no row.
    """

    rows: int | None = None
    """Rows of activations in a block; a multiple of 32, the rows of an int8 tile. None: by rule."""
    outputs: int | None = None
    """Outputs in a block; a multiple of 128, the lanes of a tile. None: by rule."""
    chip: str | None = None
    """Name of a TPU in `CHIPS`. None: that of JAX's default device. Named where another one is compiled for, or simulated."""
    interpret: Any = False
    """How Pallas simulates the kernel: False (it does not), True, or `pltpu.InterpretParams`."""

    def __post_init__(self) -> None:
        for name, tile in (("rows", 32), ("outputs", 128)):
            size = getattr(self, name)
            if size is not None and (size < tile or size % tile):
                raise ValueError(f"{name}={size} must be a positive multiple of {tile}")
        if self.chip is not None and (self.chip not in CHIPS or CHIPS[self.chip].platform != "tpu"):
            names = ", ".join(name for name, chip in CHIPS.items() if chip.platform == "tpu")
            raise ValueError(f"chip={self.chip!r} must be one of {names}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Blocks of `mosaic_gpu`.

    Raises:
        ValueError: a size is not one that the kernels have.
    """

    rows: int | None = None
    """Rows of activations in a tile; a multiple of 8 up to 256."""
    outputs: int = 64
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
        if self.rows is not None and self.rows not in range(8, 257, 8):
            raise ValueError(f"rows={self.rows} must be a multiple of 8 from 8 to 256")
        if self.outputs not in (64, 128, 256):
            raise ValueError(f"outputs={self.outputs} must be 64, 128 or 256")
        if self.inputs not in (256, 512):
            raise ValueError(f"inputs={self.inputs} must be 256 or 512")
        if self.rows is not None and self.splits is None and self.outputs < 128:
            raise ValueError(f"outputs={self.outputs} must be at least 128 where tiles are pipelined: 64 for each of two warpgroups")
        if self.splits is not None and self.splits < 1:
            raise ValueError(f"splits={self.splits} must be at least 1")
        if self.stages < 1:
            raise ValueError(f"stages={self.stages} must be at least 1")


MULTIPROCESSORS = 132
"""Of an H100 or H200 as SXM module (NVIDIA's H100 white paper)."""


def gpu_blocks(spec: Any, config: GpuConfig | None = None) -> GpuConfig:
    """`config` with what it leaves open: what was measured on the device, or else by rule."""
    config = config or GpuConfig()
    if config.rows is not None:
        return config
    return dataclasses.replace(_gpu_rule(spec), chip=config.chip, interpret=config.interpret)


def _gpu_rule(spec: Any) -> GpuConfig:
    if spec.m > 64:
        rows = 128 if spec.m > 128 or spec.m > 96 else -(-spec.m // 8) * 8
        return GpuConfig(rows=rows, outputs=256 if spec.m > 512 else 128, inputs=256, stages=3 if spec.m > 512 else 4)
    rows = max(8, 1 << (spec.m - 1).bit_length())
    outputs = 64 if rows <= 8 else 128
    inputs = 256
    steps = -(-spec.k // inputs)
    tiles = -(-spec.n // outputs)
    splits = min(steps, max(-(-steps // 8), -(-2 * MULTIPROCESSORS // tiles)))
    return GpuConfig(rows=rows, outputs=outputs, inputs=inputs, splits=splits)


def gpu_steps(config: GpuConfig, k: int) -> int:
    """Steps in which a block of threads takes K inputs, or its part of them."""
    return math.ceil(math.ceil(k / config.inputs) / (config.splits or 1))


def gpu_shared_memory(config: GpuConfig, k: int, out_dtype: Any) -> int:
    """Bytes of shared memory of a block of threads; barriers add less than 1 KiB."""
    itemsize = 4 if (config.splits or 1) > 1 else np.dtype(out_dtype).itemsize
    steps = min(config.stages, gpu_steps(config, k)) if config.splits is None else gpu_steps(config, k)
    return steps * (config.rows * config.inputs + config.outputs * config.inputs // 4) + config.rows * config.outputs * itemsize


# --- measured --------------------------------------------------------------------------------------------------------


def tuned(implementation: str, spec: ArgSpec, kind: str, config: type[Config]) -> Config | None:
    """The measured blocks of a call on a device of `kind` (`jax.Device.device_kind`), or None.

    Raises:
        ValueError: the device's file is not what this module's text says.
    """
    entries = _entries(TUNED / f"{file_name(kind)}.json", implementation)
    serving = [e for e in entries if (e["k"], e["n"], e["x_dtype"]) == (spec.k, spec.n, spec.x_dtype) and e["m"] >= spec.m]
    if not serving:
        return None
    return config(**min(serving, key=lambda e: e["m"])["blocks"])


def file_name(kind: str) -> str:
    """`jax.Device.device_kind` as a file's name: 'NVIDIA H200' is nvidia-h200."""
    return "".join(c if c.isalnum() else "-" for c in kind.lower())


@functools.cache
def _entries(path: Path, implementation: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8")).get(implementation, [])
        if not all({"m", "k", "n", "x_dtype", "blocks"} <= set(entry) for entry in entries):
            raise ValueError("an entry must have m, k, n, x_dtype and blocks")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a file of tuned blocks: {error}") from None
    return entries
