"""Times of `ternary_matmul` on this device beside what else could be done, and beside the floor that memory sets.

    python -m kernels_pallas.bench --json experiments/results/kernels/nvidia-h200.json [--models 7b] [--rows 1 16 512]
    python -m kernels_pallas.bench --smoke --json FILE        tiny shapes, on any machine, to see that the program works

For every matrix of 700M, 3B, 2B4T and 7B and every number of rows, by turns and as medians:

- ours: `ternary_matmul`, what `implementation=None` chooses, with int8 activations
- xla: the portable implementation, which is one product per plane of the packed bytes
- bf16: bfloat16 activations and weights, by the vendor's library
- int8: int8 activations and weights, likewise

A time is that of one product in a chain of many inside one compiled loop: each product's input depends on the one before, so that none is
left out or overlaps the next, and starting the program is shared by all. Weights take turns among copies that together exceed the
caches, as the layers of a model do: ours are layers of one stack, those of the others arrays of their own, for they would be cut out of
a stack by a copy. What the dependency itself costs (a sum over the result) is in every time.
The floor is the bytes that must cross memory, at the bandwidth of a large copy measured here.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import mosaic_tpu
from kernels_pallas.api import choose, ternary_matmul
from kernels_pallas.arg_specs import DECODE_ROWS, MATRICES, PREFILL_ROWS, ArgSpec, chip_name, cost, default_device, floor_us, named
from kernels_pallas.packing import PackedLayer, PackedTernary, pack, unpack

MODELS = ("700m", "3b", "2b4t", "7b")
_CACHE = 192 << 20
"""Bytes of weights that take turns: more than any chip's caches hold."""

_DURATION = 0.01
"""Seconds that a chain should take about."""


def operands(spec: ArgSpec, cache: int = _CACHE) -> dict[str, Any]:
    """x int8 [M, K] with its steps, and a stack of random matrices of `cache` packed bytes or more, up to 512 of them."""
    layers = min(512, max(2, math.ceil(cache / (spec.n * spec.k / 4))))
    rng = np.random.default_rng(0)
    one = pack(rng.integers(-1, 2, (spec.k, spec.n)).astype(np.int8), np.asarray(2.0**-6, np.float32))
    # Layers are rows of the first one in another order: as random, and made in no time.
    codes = jnp.stack([jnp.roll(jnp.asarray(one.codes), 7 * layer, axis=0) for layer in range(layers)])
    stack = PackedTernary(codes, jnp.full((layers,), 2.0**-6, jnp.float32), k=spec.k, encoding=one.encoding)
    stack = mosaic_tpu.place(stack) if jax.default_backend() == "tpu" else stack
    x = jnp.asarray(rng.integers(-127, 128, (spec.m, spec.k)).astype(np.int8))
    return {"x": x, "x_scale": jnp.full((spec.m, 1), 2.0**-7, jnp.float32), "stack": stack, "out_dtype": jnp.dtype(spec.out_dtype)}


def ours(implementation: str | None = None, config: Any = None) -> Callable[..., jax.Array]:
    """(x, x_scale, w, out_dtype) → the product."""

    def product(x: jax.Array, x_scale: jax.Array, w: PackedTernary | PackedLayer, out_dtype: Any) -> jax.Array:
        return ternary_matmul(x, w, x_scale=x_scale, out_dtype=out_dtype, implementation=implementation, config=config)

    return product


def dense(x: jax.Array, x_scale: jax.Array, w: jax.Array, out_dtype: Any) -> jax.Array:
    """The same with unpacked weights [K, N], bfloat16 or int8, by the vendor's library."""
    sums = jnp.int32 if w.dtype == jnp.int8 else jnp.float32
    out = jax.lax.dot_general(x.astype(w.dtype), w, (((1,), (0,)), ((), ())), preferred_element_type=sums)
    return (out.astype(jnp.float32) * (x_scale * 2.0**-6)).astype(out_dtype)


def apart(stack: PackedTernary, dtype: Any = None, cache: int = _CACHE) -> tuple[Any, ...]:
    """Matrices of a stack as arrays of their own, packed or unpacked to `dtype`: as many as exceed `cache`, from 4 to 32."""
    size = stack.k * stack.n * (jnp.dtype(dtype).itemsize if dtype else 0.25)
    layers = min(stack.codes.shape[0], 32, max(4, math.ceil(cache / size)))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(layers)]
    return tuple(each if dtype is None else (jnp.asarray(unpack(w)).astype(dtype) for w in each))


@functools.partial(jax.jit, static_argnames=("function", "out_dtype", "rounds"))
def _chain(function: Any, x: jax.Array, x_scale: jax.Array, weights: Any, out_dtype: Any, rounds: int) -> jax.Array:
    def body(i: jax.Array, x_scale: jax.Array) -> jax.Array:
        if isinstance(weights, tuple):
            turns: Any = weights
        else:
            turns = [PackedLayer(weights, (4 * i + j) % weights.codes.shape[0]) for j in range(4)]
        for w in turns:
            out = function(x, x_scale, w, out_dtype)
            # Not foldable, and no change of value: sums are finite, so this adds zero to every step.
            x_scale = x_scale + jnp.where(jnp.isfinite(out.astype(jnp.float32).sum()), 0.0, 1.0).astype(jnp.float32)
        return x_scale

    return jax.lax.fori_loop(0, rounds, body, x_scale)


def seconds(functions: dict[Any, Any], data: dict[str, Any], repeats: int = 7) -> dict[Any, float]:
    """Median seconds of one product of each of `functions`, which take turns; a function may be (function, its own weights)."""
    (m, k), n = data["x"].shape, data["stack"].n
    guess = 5e-6 + 2 * k * n / 1e12 + 2 * m * k * n / 2e14  # launch, bfloat16 weights, and products of a slow accelerator
    runs = {}
    for name, function in functions.items():
        function, weights = function if isinstance(function, tuple) else (function, data["stack"])
        turns = len(weights) if isinstance(weights, tuple) else 4
        run = functools.partial(_chain, function, data["x"], data["x_scale"], weights, data["out_dtype"])
        runs[name] = run, turns, min(256, max(1, math.ceil(_DURATION / guess / turns)))
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first one compiles
        for name, (run, turns, rounds) in runs.items():
            spent = []
            for count in (0, rounds):  # without a product: what starting a program takes
                begun = time.perf_counter()
                jax.block_until_ready(run(count))
                spent.append(time.perf_counter() - begun)
            if repeat:
                times[name].append((spent[1] - spent[0]) / (rounds * turns))
    return {name: statistics.median(values) for name, values in times.items()}


def last(data: dict[str, Any]) -> PackedLayer:
    """The last layer of the stack."""
    return PackedLayer(data["stack"], jnp.int32(data["stack"].codes.shape[0] - 1))


def checked(data: dict[str, Any]) -> jax.Array:
    """What the reference gives for the last layer."""
    return ours("reference")(data["x"], data["x_scale"], last(data), data["out_dtype"])


def agrees(function: Callable[..., jax.Array], data: dict[str, Any], expected: jax.Array) -> bool:
    """Whether `function` gives `expected`, bit for bit."""
    out = jax.jit(function, static_argnums=3)(data["x"], data["x_scale"], last(data), data["out_dtype"])
    return bool((out == expected).all())


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes."""
    array = jnp.zeros((size // 4,), jnp.int32)

    @functools.partial(jax.jit, static_argnums=1)
    def run(a: jax.Array, count: int) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda i, a: a + i, a)

    times = []
    for repeat in range(6):  # the first one compiles
        spent = []
        for count in (0, 20):
            begun = time.perf_counter()
            jax.block_until_ready(run(array, count))
            spent.append(time.perf_counter() - begun)
        times += [spent[1] - spent[0]] if repeat else []
    return 20 * 2 * size / max(statistics.median(times), 1e-9)


def measure(spec: ArgSpec, bandwidth: float, cache: int, repeats: int) -> dict[str, Any]:
    """Microseconds of one call by each way, its floor, and whether ours was right."""
    data = operands(spec, cache)
    functions: dict[str, Any] = {"ours": ours(), "xla": (ours("xla"), apart(data["stack"], None, cache))}
    for name, dtype in (("bf16", jnp.bfloat16), ("int8", jnp.int8)):
        functions[name] = (dense, apart(data["stack"], dtype, cache))
    exact = agrees(functions["ours"], data, checked(data))
    times = seconds(functions, data, repeats)
    device = default_device()
    here = dataclasses.replace(spec, platform=device.platform, chip=chip_name(device.device_kind))
    result: dict[str, Any] = {"m": spec.m, "k": spec.k, "n": spec.n, "ours": choose(here), "exact": exact}
    result["microseconds"] = {name: round(1e6 * value, 3) for name, value in times.items()}
    result["floor_microseconds"] = round(1e6 * cost(spec).bytes / bandwidth, 3)
    if here.chip:
        result["data_sheet_floor_microseconds"] = round(floor_us(spec, here.chip), 3)
    return result


def main(args: list[str] | None = None) -> int:
    """Measures what the command line names, and writes the file after each call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--models", nargs="+", choices=sorted({name.split("/")[0] for name in MATRICES}), default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[*DECODE_ROWS, *PREFILL_ROWS])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; the times mean nothing")
    parsed = parser.parse_args(args)
    if jax.default_backend() == "cpu" and not parsed.smoke:
        print("error: this is a CPU: a GPU or TPU is needed, or --smoke", file=sys.stderr)
        return 2
    calls = [(name, s) for name, s in named(tuple(parsed.rows)) if name.split("/")[0] in parsed.models]
    if parsed.smoke:
        calls = [(f"smoke/{m}", ArgSpec(m=m, k=256, n=64)) for m in (1, 16)]
    if min(parsed.rows) < 1:
        parser.error(f"--rows {min(parsed.rows)}: must be at least 1")
    device = default_device()
    bandwidth = copy_bandwidth(1 << 20 if parsed.smoke else 1 << 30)
    content: dict[str, Any] = {
        "status": "smoke run: tiny shapes, the times mean nothing" if parsed.smoke else "measured",
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "copy_bytes_per_second": round(bandwidth),
        "calls": {},
    }
    for name, spec in calls:
        cache, repeats = (1 << 16, 3) if parsed.smoke else (_CACHE, 7)
        content["calls"][name] = measure(spec, bandwidth, cache, repeats)
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {content['calls'][name]['microseconds']}", flush=True)
    return 0


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
