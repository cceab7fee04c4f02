"""Block sizes of the Pallas kernels: what they are, a choice by rule, and choices that were measured (`tuned/<device kind>.json`).

A file in `tuned` holds, for each implementation, a list of calls with the block sizes that were fastest there:

    {"jax": "0.12.0.1", "date": "2026-11-23", "mosaic_gpu": [{"m": 16, "k": 2560, "n": 6912, "x_dtype": "int8", "blocks": {...}}]}

An entry serves every M up to its own that no smaller entry serves. A device without a file, or a call without an entry, gets the rule.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, TypeVar

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
class TpuBlocks:
    """A block of the result of `mosaic_tpu`."""

    rows: int
    outputs: int


def tpu_blocks(spec: ArgSpec, config: TpuConfig | None = None) -> TpuBlocks:
    """The blocks of a call: those of `config`, else measured ones, else by rule."""
    config = config or TpuConfig()
    found = tuned("mosaic_tpu", spec, CHIPS[spec.chip].kinds[0], TpuConfig) if spec.chip else None
    rows = config.rows or (found and found.rows) or 256
    outputs = config.outputs or (found and found.outputs) or 512
    return TpuBlocks(rows=min(rows, spec.m), outputs=min(outputs, spec.n))


def tpu_vmem_bytes(spec: ArgSpec, blocks: TpuBlocks) -> int:
    """Vector memory that a call takes: blocks twice, since the next ones are loaded meanwhile."""
    return 32 << 20


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
