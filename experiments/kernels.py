"""The Pallas kernels, without the hardware they are for: what compilers say of them.

    python -m experiments.kernels tpu        needs libtpu (extra `tpu-aot`); about a quarter of an hour on one CPU core
    python -m experiments.kernels gpu        the same for the GPU kernels, as `experiments.kernels_gpu` says

Writes experiments/results/kernels/tpu_aot.json: for matrices of 2B4T and each TPU generation, whether the kernel compiles, the bytes
it takes, and libtpu's static schedule of it, beside XLA's own products of unpacked weights. Every call is compiled in a process of its
own, since libtpu's profiler ends the process where it cannot model an operation.

What the figures are. `bundles` counts the instruction words of one step of the kernel's grid (straight-line code, except for a loop
over rows in the form that quantises). `cycles` is libtpu's estimate for each operation of the program; that of a kernel has the loads
that nothing hides, that of XLA's fusions has no loads from memory at all. Neither was seen on hardware.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from bitnet_jax.training import run_directory
from experiments import kernels_gpu
from experiments.tpu_aot import TOPOLOGIES, compile_for, spec_of
from kernels_pallas.arg_specs import cost, floor_us, named
from kernels_pallas.block_config import tpu_blocks

RESULTS = Path(__file__).parent / "results" / "kernels"
ROWS = (1, 16, 512)
MATRICES = ("2b4t/o", "2b4t/gate_up", "2b4t/down")
FORMS = {chip: ("int8", "fused", "xla bf16", *(("xla int8", "xla int4") if chip in ("v5e", "v6e") else ())) for chip in TOPOLOGIES}
UNMODELLED = ("v4",)
"""TPUs whose transfers libtpu's profiler does not model: it ends the process."""


def main(args: list[str] | None = None) -> None:
    """Measures, or is the process that one call is compiled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["tpu", "gpu"])
    parser.add_argument("--one", nargs=3, metavar=("CHIP", "NAME", "FORM"), help=argparse.SUPPRESS)
    parsed = parser.parse_args(args)
    if parsed.target == "gpu":
        sys.exit(kernels_gpu.main([]))
    jax.config.update("jax_platforms", "cpu")
    if parsed.one:
        print(json.dumps(_one(*parsed.one)))
        return
    facts: dict[str, Any] = {"versions": {"libtpu": version("libtpu")}, "environment": run_directory.environment()}
    names = [name for name, _ in named(ROWS) if name.startswith(MATRICES)]
    calls = []
    for chip in TOPOLOGIES:
        for name in names:
            for form in FORMS[chip]:
                if form == "fused" and name.endswith("/512"):
                    continue  # a norm and its quantisation are one pass of XLA's there
                if name.endswith("/16") and len(FORMS[chip]) == 3:
                    continue
                calls.append({"chip": chip, "call": name, "form": form, **_in_process(chip, name, form)})
                print(chip, name, form, calls[-1].get("cycles"), calls[-1].get("error", ""), file=sys.stderr, flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "tpu_aot.json").write_text(json.dumps({**facts, "calls": calls}, indent=1) + "\n", encoding="utf-8")


def _in_process(chip: str, name: str, form: str) -> dict[str, Any]:
    """What `_one` says; without estimated cycles where the profiler ends the process."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder}/text --xla_jf_dump_llo_text=true"
        profile = f" --xla_jf_dump_static_llo_profile_to={folder}/profile"
        for flags in (dump + profile, dump) if chip not in UNMODELLED else (dump,):
            for sub in ("text", "profile"):
                Path(folder, sub).mkdir(exist_ok=True)
            environment = {**os.environ, "LIBTPU_INIT_ARGS": flags}
            command = [sys.executable, "-m", "experiments.kernels", "tpu", "--one", chip, name, form]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True)
            if ended.returncode == 0:
                return {**json.loads(ended.stdout.splitlines()[-1]), **_bundles(Path(folder, "text")), **_cycles(Path(folder, "profile"))}
    said = [line for line in ended.stderr.splitlines() if "Error" in line or "ERROR" in line or "RESOURCE" in line]
    return {"error": (said or ["no message"])[-1][:200]}


def _one(chip: str, name: str, form: str) -> dict[str, Any]:
    """Compiles one call: seconds, bytes, and for the kernel its blocks and floor."""
    spec = spec_of(dict(named(ROWS))[name], chip, form)
    begun = time.perf_counter()
    memory = compile_for(chip, spec, form).memory_analysis()
    facts: dict[str, Any] = {
        "compile_seconds": round(time.perf_counter() - begun, 2),
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "result": memory.output_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
    }
    if not form.startswith("xla"):
        blocks = tpu_blocks(spec)
        steps = -(-spec.m // blocks.rows) * -(-spec.n // blocks.outputs)
        facts |= {"rows": blocks.rows, "outputs": blocks.outputs, "steps": steps, "bytes_needed": cost(spec).bytes}
        facts["floor_us"] = round(floor_us(spec, chip), 3)
    return facts


def _bundles(folder: Path) -> dict[str, Any]:
    """Instruction words of the kernel, and for each unit the words that its instructions fill at the least."""
    for path in folder.glob("*ternary_matmul*final_hlo-static-per-bundle-utilization.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        names, capacity = lines[1].split(", "), [int(c) for c in lines[2].split()]
        words = [[int(count) for count in line.split()] for line in lines[4:] if line.strip()]
        units = {n.strip(): -(-sum(w[i] for w in words) // c) for i, (n, c) in enumerate(zip(names, capacity, strict=True))}
        return {"bundles": len(words), "units": {unit: count for unit, count in units.items() if count}}
    return {}


def _cycles(folder: Path) -> dict[str, Any]:
    """libtpu's estimate, by operation."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.textproto")):
        match = re.search(r"estimated_cycles: (\d+)", path.read_text(encoding="utf-8"))
        if match and int(match[1]):
            found[path.name.split("_TPU")[0]] = int(match[1])
    return {"cycles": sum(found.values()), "cycles_by_operation": found} if found else {}


if __name__ == "__main__":
    main()
