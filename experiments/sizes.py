"""Time and memory of a token against size: packed ternary weights and the full-precision twin, on this machine's CPU.

    python -m experiments.sizes

The shapes are those of b1.58 (2402.17764), Table 1 and Figure 2, with random weights. For each, `bitnet-jax bench` runs by turns the packed
model through the native kernels and the twin in XLA with weights of float32 and of bfloat16; then the packed model through XLA alone.
Writes experiments/results/sizes/SIZE.json and SIZE-xla.json; what is there, of this code, is not measured again. The machine must be idle,
and have 20 GB of memory. Cost: half an hour on two CPU cores.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bitnet_jax.benchmark.settings import OURS, twin_of
from bitnet_jax.cli import bench

RESULTS = Path(__file__).parent / "results" / "sizes"
PROMPT, GENERATE = 128, 64
PUBLISHED = {
    "700m": (1.18, 0.96, 2.08, 0.80),
    "1.3b": (1.62, 0.97, 3.34, 1.14),
    "3b": (5.07, 1.87, 7.89, 2.22),
    "3.9b": (None, 2.11, None, 2.38),
}
"""b1.58, Table 1: ms a token of LLaMA in fp16 and of b1.58 on a GPU that is not named, GB of both. Of 3.9B there is no LLaMA."""


def main(args: list[str] | None = None) -> int:
    """Measures what is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PUBLISHED, help="one size")
    parsed = parser.parse_args(args)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for size in PUBLISHED if parsed.only is None else (parsed.only,):
        common = ["--shape", f"bitnet-b1.58-{size}", "--threads", "2", "--prompt", str(PROMPT), "--generate", str(GENERATE), "--no-start"]
        # Weights of float32 of the two largest would take 11 and 14 GB, and as much again while they are made.
        twins = ("bfloat16",) if size in ("3b", "3.9b") else ("float32", "bfloat16")
        for name, flags in ((size, ("--twin", *twins)), (f"{size}-xla", ("--implementation", "xla"))):
            code = bench.run([*common, *flags, "--json", str(RESULTS / f"{name}.json")])
            if code:
                return code
    return 0


def table(folder: Path) -> str:
    """Markdown: medians over processes, with the smallest and the largest."""
    lines = [
        "| b1.58 shape | ms a token: native | packed, XLA | twin, bfloat16 | twin, float32 | twin bf16 : native | paper, fp16 : b1.58 "
        "| peak GB: native | packed, XLA | twin, bfloat16 | paper: b1.58 | fp16 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size, (slow, fast, large, small) in PUBLISHED.items():
        ours, xla, half, single = (
            _runs(folder / name, subject)
            for name, subject in (
                (f"{size}.json", OURS),
                (f"{size}-xla.json", OURS),
                (f"{size}.json", twin_of("bfloat16")),
                (f"{size}.json", twin_of("float32")),
            )
        )
        ratio = f"{_median(half) / _median(ours):.2f}" if half and ours else "not run"
        published = f"{slow / fast:.2f}" if slow else "–"
        times = " | ".join(_spread(runs) for runs in (ours, xla, half, single))
        memory = " | ".join(_memory(runs) for runs in (ours, xla, half))
        lines.append(f"| {size} | {times} | {ratio} | {published} | {memory} | {small:.2f} | {f'{large:.2f}' if large else '–'} |")
    return "\n".join(lines)


def _runs(path: Path, subject: str) -> list[dict[str, Any]]:
    """Those of the newest state of the code that the file has."""
    if not path.exists():
        return []
    runs = [run for run in json.loads(path.read_text(encoding="utf-8"))["runs"] if run["subject"] == subject and "failed" not in run]
    return [run for run in runs if run.get("source") == runs[-1].get("source")]


def _milliseconds(runs: list[dict[str, Any]]) -> list[float]:
    return [1e3 / run["decode_tokens_per_second"] for run in runs]


def _median(runs: list[dict[str, Any]]) -> float:
    return statistics.median(_milliseconds(runs))


def _spread(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return "not run"
    return f"{_median(runs):.0f} ({min(_milliseconds(runs)):.0f}–{max(_milliseconds(runs)):.0f})"


def _memory(runs: list[dict[str, Any]]) -> str:
    return f"{statistics.median(run['peak_bytes'] for run in runs) / 1e9:.2f}" if runs else "not run"


if __name__ == "__main__":
    sys.exit(main())
