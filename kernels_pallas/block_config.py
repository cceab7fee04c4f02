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

from kernels_pallas.arg_specs import CHIPS, SIZES, ArgSpec
from kernels_pallas.packing import bytes_per_row

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


# --- TPU -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuBlocks:
    """One block of the result of `mosaic_tpu`: rows of activations times whole K times outputs."""

    rows: int
    outputs: int


def tpu_blocks(spec: ArgSpec, config: TpuConfig | None = None, measured: bool = True) -> TpuBlocks:
    """The blocks of a call: those that `config` names, else measured ones where they are wanted, else by rule.

    The rule for few rows. Time is about that of the first load, total / steps, and the cost of each step: least for
    steps = sqrt(total / step), where `_STEP_BYTES` could be read in the time that a step costs.
    For many rows: 512 x 512, which keeps the matrix unit busy, with fewer rows where K is large (compiling takes minutes otherwise) or
    vector memory small.
    """
    config = config or TpuConfig()
    chip = CHIPS[spec.chip] if spec.chip else None
    kinds = chip.kinds if chip and measured else ()
    found = next((blocks for kind in kinds if (blocks := tuned("mosaic_tpu", spec, kind, TpuConfig))), TpuConfig())
    rows, outputs = config.rows or found.rows, config.outputs or found.outputs
    by_rule = TpuBlocks(rows=512 if spec.k <= 8192 else 256, outputs=512)
    if spec.m <= 32:
        cores = chip.cores if chip else 1
        steps = cores * max(1, round(math.sqrt(spec.n * bytes_per_row(spec.k, spec.encoding) / cores / _STEP_BYTES)))
        by_rule = TpuBlocks(rows=32, outputs=_round_up(spec.n / steps, 128))
    blocks = TpuBlocks(
        rows=min(rows or by_rule.rows, _round_up(spec.m, 32)), outputs=min(outputs or by_rule.outputs, _round_up(spec.n, 128))
    )
    # The last quarter is for what the compiler puts there where registers do not suffice.
    while chip and chip.vmem and not (rows or outputs) and tpu_vmem_bytes(spec, blocks) > chip.vmem * 3 // 4:
        if blocks.rows > 64:
            blocks = dataclasses.replace(blocks, rows=_round_up(blocks.rows / 2, 32))
        elif blocks.outputs > 128:
            blocks = dataclasses.replace(blocks, outputs=_round_up(blocks.outputs / 2, 128))
        else:
            break
    # Few rows are one block without a rest: it may be smaller than a tile.
    return dataclasses.replace(blocks, rows=spec.m) if spec.m <= 32 else blocks


_STEP_BYTES = 1 << 19
"""Of 640 to 3456 outputs in a block, those that this gives have the least estimated cycles (v5e and v6e, 2560 x 2560 and x 13824)."""


def _round_up(size: float, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def tpu_vmem_bytes(spec: ArgSpec, blocks: TpuBlocks) -> int:
    """Vector memory that a call may take: every block twice, since the next one is loaded meanwhile, and values between the steps.

    An upper bound: the larger type wherever two are possible, and the quantised rows that only the fused form keeps.
    """
    rows, outputs, k = _round_up(blocks.rows, 32), _round_up(blocks.outputs, 128), 4 * bytes_per_row(spec.k, spec.encoding)
    operand = 1 if spec.x_dtype == "int8" and spec.chip and CHIPS[spec.chip].int8 else 2
    loaded = rows * k * SIZES[spec.x_dtype] + rows * 128 * 4 + k // 4 * outputs + rows * outputs * SIZES[spec.out_dtype]
    return 2 * loaded + rows * k * operand + rows * 128 * 4 + 2 * rows * outputs * 4 + _VMEM_SLACK


_VMEM_SLACK = 1 << 20


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
    blocks = min(serving, key=lambda e: e["m"])["blocks"]
    known = set(vars(config())) - {"chip", "interpret"}
    if unknown := sorted(set(blocks) - known):
        raise ValueError(f"{TUNED / file_name(kind)}.json is not a file of tuned blocks: {', '.join(unknown)} must be of {sorted(known)}")
    return config(**blocks)


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
        if not all(type(entry["m"]) is int and isinstance(entry["blocks"], dict) for entry in entries):
            raise ValueError("m must be a whole number and blocks an object")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a file of tuned blocks: {error}") from None
    return entries
