"""Measures which blocks of the kernels are fastest on this device, and writes them where `block_config.tuned` finds them.

    python -m kernels_pallas.autotune [--models 2b4t 7b] [--rows 1 16 512]

Every named matrix with every number of rows is timed with each candidate that fits. What was measured is written after each call to
kernels_pallas/tuned/<device kind>.json, so the program may be stopped at any time, and goes on where it was; `--again` starts anew.
Entries of another version of JAX are measured anew. A candidate that fails to compile or gives wrong sums is left out and said.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from kernels_pallas import bench
from kernels_pallas.arg_specs import DECODE_ROWS, MATRICES, PREFILL_ROWS, ArgSpec, named
from kernels_pallas.block_config import TUNED, TpuConfig, file_name, tpu_blocks
from kernels_pallas.mosaic_gpu.blocks import SHARED_MEMORY, GpuConfig, rule, shared_memory


def gpu_candidates(spec: ArgSpec) -> list[GpuConfig]:
    """Blocks that may be fastest, those by rule first."""
    found = [rule(spec)]
    if spec.m <= 512:
        rows = sorted({min(256, max(8, 1 << (spec.m - 1).bit_length())), min(128, max(8, -(-spec.m // 8) * 8))})
        for m, outputs, inputs, splits in itertools.product(rows, (64, 128, 256), (256, 512), (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)):
            if splits * inputs <= spec.k + inputs:
                found.append(GpuConfig(rows=m, outputs=outputs, inputs=inputs, splits=splits))
    if spec.m >= 128:
        for rows, outputs, inputs, stages in itertools.product((64, 128, 192, 256), (128, 256), (256, 512), (2, 3, 4, 5)):
            found.append(GpuConfig(rows=rows, outputs=outputs, inputs=inputs, stages=stages))
    return [c for c in dict.fromkeys(found) if shared_memory(c, spec.k, spec.out_dtype) <= SHARED_MEMORY - 2048]


def tpu_candidates(spec: ArgSpec) -> list[TpuConfig]:
    """Blocks that may be fastest, those by rule first."""
    sizes = itertools.product((32, 64, 128, 256, 512), (128, 256, 512, 640, 1024, 1280))
    blocks = tpu_blocks(spec, measured=False)
    found = [TpuConfig(rows=-(-blocks.rows // 32) * 32, outputs=blocks.outputs)]
    found += [TpuConfig(rows=rows, outputs=outputs) for rows, outputs in sizes if rows < max(2 * spec.m, 33) and outputs <= spec.n]
    return list(dict.fromkeys(found))


def main(args: list[str] | None = None) -> int:
    """Tunes what the command line names; 2 where there is nothing to tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted({name.split("/")[0] for name in MATRICES}), help="only these")
    parser.add_argument("--rows", type=int, nargs="+", default=[*DECODE_ROWS, *PREFILL_ROWS], help="only these numbers of rows")
    parser.add_argument("--again", action="store_true", help="measure again what the file holds")
    parsed = parser.parse_args(args)
    if min(parsed.rows) < 1:
        parser.error(f"--rows {min(parsed.rows)}: must be at least 1")
    platform = jax.default_backend()
    if platform not in ("gpu", "tpu"):
        print(f"error: platform {platform} has no blocks to tune: a GPU or TPU is needed", file=sys.stderr)
        return 2
    implementation = f"mosaic_{platform}"
    path = TUNED / f"{file_name(jax.devices()[0].device_kind)}.json"
    wanted = [s for name, s in named(tuple(parsed.rows)) if parsed.models is None or name.split("/")[0] in parsed.models]
    for spec in wanted:
        if parsed.again or not has(path, implementation, spec):
            candidates: Iterable[Any] = gpu_candidates(spec) if platform == "gpu" else tpu_candidates(spec)
            entry = measure(spec, implementation, candidates)
            if entry is not None:
                record(path, implementation, entry)
                print(f"M={spec.m} K={spec.k} N={spec.n}: {entry['blocks']} in {entry['microseconds']} us", flush=True)
    return 0


def measure(spec: ArgSpec, implementation: str, candidates: Iterable[Any]) -> dict[str, Any] | None:
    """The entry of the fastest of `candidates`, or None where none runs. The best four are measured again."""
    operands = bench.operands(spec)
    expected = bench.checked(operands)
    times: dict[Any, float] = {}
    for config in candidates:
        function = bench.ours(implementation, config)
        try:
            if not bench.agrees(function, operands, expected):
                raise ValueError("wrong sums")
            times[config] = bench.seconds({"ours": function}, operands, repeats=3)["ours"]
        except Exception as error:  # noqa: BLE001 - whatever a compiler or a device says of one candidate, the others are measured
            print(
                f"M={spec.m} K={spec.k} N={spec.n}: {config} left out: {' '.join(str(error).split())[:160] or type(error).__name__}",
                file=sys.stderr,
            )
    if not times:
        return None
    finalists = {config: bench.ours(implementation, config) for config in sorted(times, key=times.__getitem__)[:4]}
    again = bench.seconds(finalists, operands, repeats=9)
    best = min(again, key=again.__getitem__)
    blocks = {f.name: getattr(best, f.name) for f in dataclasses.fields(best) if f.name not in ("chip", "interpret")}
    return {"m": spec.m, "k": spec.k, "n": spec.n, "x_dtype": spec.x_dtype, "blocks": blocks, "microseconds": round(again[best] * 1e6, 2)}


def has(path: Path, implementation: str, spec: ArgSpec) -> bool:
    """Whether the file holds this very call, measured with this version of JAX."""
    content = _read(path)
    keys = ("m", "k", "n", "x_dtype")
    found = content.get(implementation, []) if content.get("jax") == jax.__version__ else []
    return any(all(entry[key] == getattr(spec, key) for key in keys) for entry in found)


def record(path: Path, implementation: str, entry: dict[str, Any]) -> None:
    """Put `entry` in the file in place of what it held of the same call; a reader finds the old file or the new one."""
    content = _read(path)
    if content.get("jax") != jax.__version__:
        content = {}
    keys = ("m", "k", "n", "x_dtype")
    entries = [e for e in content.get(implementation, []) if any(e[key] != entry[key] for key in keys)]
    entries = sorted([*entries, entry], key=lambda e: (e["k"], e["n"], e["x_dtype"], e["m"]))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    content = {**content, "jax": jax.__version__, "date": today, implementation: entries}
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
