"""Conversions of a model as large as BitNet b1.58 2B4T through every format: time, peak memory, bytes, proof; and how it opens.

    python -m experiments.conversions bitnet-b1.58-2b4t --folder DISK

A random model (real shapes, names and types; no real weights) is written as a Hugging Face folder, as its authors publish theirs, and
`bitnet-jax convert` takes it from format to format in processes of their own, each from the result of the one before, the last back to
the first, which must end with the same bytes. Peak memory is what the system counts for a process; it includes mapped files, which it
may take back at any time, so the largest amount that was not mapped stands beside it.

Writes experiments/results/conversions/<preset>.json. Needs about 10 GB of disk for 2B4T; cost: about half an hour on two CPU cores.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bitnet_jax.config import ModelConfig
from bitnet_jax.formats import huggingface
from bitnet_jax.formats.files import file_size
from bitnet_jax.formats.random_model import random_packed
from bitnet_jax.training import run_directory

RESULTS = Path(__file__).parent / "results" / "conversions"
STEPS = (
    ("packed.safetensors", ["--to", "packed"]),
    ("base3.safetensors", ["--to", "packed", "--encoding", "base3"]),
    ("i2_s.gguf", ["--to", "gguf", "--type", "i2_s"]),  # embeddings in float16, which holds those of a random model
    ("tq2_0.gguf", ["--to", "gguf", "--type", "tq2_0", "--program", "bitnet.cpp"]),
    ("tq1_0.gguf", ["--to", "gguf", "--type", "tq1_0", "--program", "bitnet.cpp"]),
    ("orbax", ["--to", "orbax"]),
    ("stablehlo", ["--to", "stablehlo", "--capacity", "512"]),
    ("hf-again", ["--to", "hf-packed"]),
)
OPEN = """
import sys, time
import jax
from bitnet_jax import models
jax.devices()
begun = time.perf_counter()
model = models.load(sys.argv[1])
jax.block_until_ready(jax.tree.leaves(model.params))
print(time.perf_counter() - begun)
"""


def main(args: list[str] | None = None) -> int:
    """Runs every conversion of the preset named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder on a disk with room")
    parser.add_argument("--open-only", action="store_true", help="measure again how the files of an earlier run open")
    parsed = parser.parse_args(args)
    result = RESULTS / f"{parsed.preset}.json"
    if parsed.open_only:
        facts = json.loads(result.read_text(encoding="utf-8"))
        result.write_text(json.dumps(facts | {"open": opening(parsed.folder)}, indent=2) + "\n", encoding="utf-8")
        return 0
    parsed.folder.mkdir(parents=True, exist_ok=True)
    first = parsed.folder / "hf"
    huggingface.write(first, random_packed(ModelConfig.preset(parsed.preset)), layout="packed")
    facts: dict[str, Any] = {"preset": parsed.preset, "source_bytes": file_size(first), "steps": []}
    source = first
    for name, flags in STEPS:
        target = parsed.folder / name
        measured = run([sys.executable, "-m", "bitnet_jax", "convert", str(source), str(target), *flags])
        facts["steps"].append({"from": source.name, "to": name, "flags": flags, "bytes": file_size(target), **measured})
        print(f"{source.name} → {name}: {measured['seconds']:.0f} s, {measured['peak_bytes'] / 2**30:.2f} GiB", file=sys.stderr)
        source = target
    facts["open"] = opening(parsed.folder)
    facts["identical"] = digests(first) == digests(source)
    facts["environment"] = run_directory.environment()
    RESULTS.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print("identical" if facts["identical"] else "NOT identical")
    return 0 if facts["identical"] else 1


def opening(folder: Path) -> dict[str, Any]:
    """How long the packed files of `folder` take to be mapped, checked and placed, over five processes each, and their peak memory."""
    found: dict[str, Any] = {"environment": run_directory.environment()}
    for name in ("packed.safetensors", "base3.safetensors"):
        runs = [run([sys.executable, "-c", OPEN, str(folder / name)]) for _ in range(5)]
        seconds = sorted(float(one["output"]) for one in runs)
        found[name] = {
            "load_seconds": seconds,
            "bytes": file_size(folder / name),
            "peak_bytes": max(one["peak_bytes"] for one in runs),
            "peak_bytes_not_mapped": max(one["peak_bytes_not_mapped"] for one in runs),
        }
    return found


def run(command: list[str]) -> dict[str, Any]:
    """Runs a process; its time, peak memory in bytes, peak of what is not mapped from files, and the last line that it printed."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    watcher = threading.Thread(target=_watch, args=(process, peaks))
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "seconds": time.perf_counter() - begun,
        "peak_bytes": peaks["VmHWM"],
        "peak_bytes_not_mapped": peaks["RssAnon"],
        "output": output.strip().splitlines()[-1],
    }


def _watch(process: subprocess.Popen[str], peaks: dict[str, int]) -> None:
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        for name, value in (line.split(":", 1) for line in lines):
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(0.05)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, but for the record of where the model comes from."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


if __name__ == "__main__":
    sys.exit(main())
