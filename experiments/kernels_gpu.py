"""The GPU kernels compiled ahead of time to Hopper's machine code (sm_90a), on a machine without a GPU: compiled, not run.

    python -m experiments.kernels_gpu

Needs the extra `gpu-aot` (JAX's CUDA plug-in, and NVIDIA's assembler and disassembler), no driver and no GPU. For every named matrix and
number of rows: the blocks by rule, registers, spilled bytes and shared memory as the assembler reports them, and how many of each
instruction of interest the machine code has. Writes experiments/results/kernels/gpu_aot.json; cost: about ten minutes on one core.
"""

import argparse
import collections
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "kernels"

PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm")

INSTRUCTIONS = ("IGMMA", "LDSM", "LOP3", "SHF", "IMAD", "UTMALDG", "UTMASTG", "LDG", "STG", "LDL", "STL", "WARPGROUP", "BAR")
"""Counted by the part of their names before the first dot. IGMMA is wgmma of integers, UTMALDG a load by the copy engine."""

H200: dict[str, Any] = {
    # CUDA C++ Programming Guide, table of technical specifications, compute capability 9.0.
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "shared_memory_per_block": 48 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
    "shared_memory_per_core": 228 * 1024,
    "registers_per_block_limit": 65_536,
    "registers_per_core_limit": 65_536,
    # NVIDIA H100 white paper (multiprocessors, float32 lanes, second-level cache) and H200 data sheet (memory).
    "core_count": 132,
    "fpus_per_core": 128,
    "l2_cache_size": 50 * 2**20,
    "memory_bandwidth": 4_800_000_000_000,
    "device_memory_size": 141_000_000_000,
    "clock_rate_ghz": 1.98,
}
"""What XLA is told of the GPU that is not there; names are the fields of its `GpuDeviceInfoProto`."""


def target() -> str:
    """The description of the GPU as protocol buffer text."""
    fields = "\n".join(f"  {name}: {value}" for name, value in H200.items())
    capability = "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }"
    return f'gpu_device_info {{\n{fields}\n  {capability}\n}}\nplatform_name: "CUDA"\ndevice_description_str: "NVIDIA H200"\n'


def missing() -> list[str]:
    """Packages of the extra `gpu-aot` that are not installed."""
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return [name for name in PACKAGES if name not in installed]


def compiled(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compile `calls` (fields of `ArgSpec`, and `blocks` of `GpuConfig`, empty for those by rule) in a process of their own.

    Raises:
        RuntimeError: a package is missing, or the compiler failed; with its last lines.
    """
    if absent := missing():
        raise RuntimeError(f"not installed: {', '.join(absent)} (extra gpu-aot)")
    tools = Path(str(importlib.metadata.distribution("nvidia-cuda-nvcc").locate_file("nvidia/cu13")))
    with tempfile.TemporaryDirectory() as dumps:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "CUDA_ROOT": str(tools),
            "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={tools}",
            "MOSAIC_GPU_DUMP_TO": dumps,
            **{f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTXAS", "SASS", "RESOURCES")},
        }
        command = [sys.executable, "-m", "experiments.kernels_gpu", "--worker"]
        run = subprocess.run(command, env=environment, input=json.dumps(calls), capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError("\n".join((run.stderr or run.stdout).splitlines()[-5:]))
    return json.loads(run.stdout.splitlines()[-1])


def _worker() -> None:
    """Compiles the calls on standard input, and prints what was found as the last line."""
    import jax
    from jax.experimental import topologies

    dumps = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    topology = topologies.get_topology_desc("h200", "cuda", target_config=target(), topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    found = []
    for call in json.load(sys.stdin):
        before, begun = set(dumps.iterdir()), time.perf_counter()
        blocks, text = _compile(call, sharding)
        new = [path for path in sorted(dumps.iterdir()) if path not in before]
        report = {"seconds": round(time.perf_counter() - begun, 1), "blocks": blocks, **_report(new)}
        found.append({**report, "operations": _operations(text)})
    print(json.dumps(found))


def _compile(call: dict[str, Any], sharding: Any) -> tuple[dict[str, Any], str]:
    import jax
    import jax.numpy as jnp

    from kernels_pallas import ArgSpec, pack, ternary_matmul
    from kernels_pallas.mosaic_gpu.blocks import GpuConfig, blocks, shared_memory

    fields = dict(call)
    config = GpuConfig(chip="h200", **fields.pop("blocks", {}))
    spec = ArgSpec(**fields, platform="gpu", chip="h200")
    shapes = (
        jax.ShapeDtypeStruct((spec.m, spec.k), jnp.int8),
        jax.eval_shape(lambda: pack(jnp.zeros((spec.k, spec.n), jnp.int8), jnp.ones((), jnp.float32))),
        jax.ShapeDtypeStruct((spec.m, 1), jnp.float32),
    )
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)

    def product(x: Any, w: Any, x_scale: Any) -> Any:
        return ternary_matmul(x, w, x_scale=x_scale, out_dtype=jnp.bfloat16, implementation="mosaic_gpu", config=config)

    text = jax.jit(product).trace(*placed).lower(lowering_platforms=("cuda",)).compile().as_text() or ""
    config = blocks(spec, config)
    names = ("rows", "outputs", "inputs", "splits", "stages")
    return {name: getattr(config, name) for name in names} | {"shared_memory": shared_memory(config, spec.k, spec.out_dtype)}, text


def _report(dumps: list[Path]) -> dict[str, Any]:
    """What the assembler and the disassembler said of the one kernel in `dumps`."""
    texts = {kind: "".join(path.read_text() for path in dumps if kind in path.name) for kind in ("ptxas", "sass", "resources")}
    counts = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][A-Z0-9]+)", texts["sass"]))
    stack, stores, loads = map(
        int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", texts["ptxas"].split("Function properties")[1])
    )
    return {
        "kernel": re.findall(r"Compiling entry function '(\w+)'", texts["ptxas"])[0],
        "architecture": re.findall(r"for '(sm_\w+)'", texts["ptxas"])[0],
        "registers": int(re.findall(r"Used (\d+) registers", texts["ptxas"])[0]),
        "stack_bytes": stack,
        "spill_bytes": stores + loads,
        "warnings": re.findall(r"Potential Performance Loss: ([^\n]*)", texts["ptxas"]),
        "shared_memory": int(re.findall(r"smem_scratch_bytes=(\d+)", texts["resources"])[0]),
        "instructions": {name: counts[name] for name in INSTRUCTIONS} | {"all": counts.total()},
    }


def _operations(text: str) -> list[str]:
    """What XLA launches besides reshapes: the kernel, and its fusions around it."""
    entry = text[text.index("\nENTRY") :]
    return sorted(re.findall(r"= \S+ (fusion|custom-call|copy|transpose|reduce|pad|concatenate)\(", entry))


def main(args: list[str] | None = None) -> int:
    """Compiles every named call, and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, nargs="+", help="only these numbers of rows, in place of what the file holds of them")
    parsed = parser.parse_args(args)
    if parsed.worker:
        _worker()
        return 0
    import jax

    from kernels_pallas.arg_specs import MATRICES, named

    jax.config.update("jax_platforms", "cpu")
    calls: dict[str, Any] = {}
    for name, spec in named() if parsed.rows is None else named(tuple(parsed.rows)):
        calls[name] = {"m": spec.m, "k": spec.k, "n": spec.n}
    path = RESULTS / "gpu_aot.json"
    held = json.loads(path.read_text(encoding="utf-8"))["calls"] if parsed.rows is not None and path.exists() else {}
    result: dict[str, Any] = {}
    for matrix in MATRICES:
        names = [name for name in calls if name.startswith(f"{matrix}/")]
        try:
            reports = compiled([calls[name] for name in names])
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for name, report in zip(names, reports, strict=True):
            result[name] = report
            print(f"{name}: {report['registers']} registers, {report['spill_bytes']} bytes spilled, {report['shared_memory']} shared")
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"status": "compiled, not run", "target": H200, **_made(), "calls": held | result}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _made() -> dict[str, Any]:
    from bitnet_jax.training import run_directory

    packages = {name: importlib.metadata.version(name) for name in ("jax", *PACKAGES)}
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "environment": run_directory.environment(), "packages": packages}


if __name__ == "__main__":
    sys.exit(main())
