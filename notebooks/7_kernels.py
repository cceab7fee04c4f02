# %% [markdown]
# # 7. Kernels
#
# A linear layer of BitNet b1.58 multiplies activations [M, K] by ternary weights [K, N], of which four share a byte. This notebook shows
# how fast such a product can be on a chip, which blocks the kernels cut it into, that the kernels which run here give the right integers,
# and what taking the weights out of their bytes costs.
#
# M is the number of rows: 1 where one sequence adds a token, thousands where prompts are read.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# %matplotlib inline

SMOKE = os.environ.get("SMOKE", "0") not in ("", "0")  # SMOKE=1: small examples, as the tests run this
ROOT = next((folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "experiments" / "results").is_dir()), None)
if importlib.util.find_spec("bitnet_jax") is None:  # as on Colab: from a clone of the repository where there is one
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", str(ROOT or "bitnet-jax")], check=True)

# %%
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import cpu, plotting
from kernels_pallas import IMPLEMENTATIONS, ArgSpec, pack, ternary_matmul, unpack
from kernels_pallas.arg_specs import MATRICES, cost
from kernels_pallas.bench import dense
from kernels_pallas.block_config import TpuConfig
from kernels_pallas.mosaic_gpu.blocks import GpuConfig

CHIPS = ("v5e", "v6e", "h200")
MODEL = {name.removeprefix("2b4t/"): shape for name, shape in MATRICES.items() if name.startswith("2b4t/")}  # (K, N)

# %% [markdown]
# ## Bytes and operations
#
# A call reads weights and activations and writes the result, each at least once. With few rows nearly all of it is weights, and two
# bits a weight in place of sixteen are nearly eight times fewer bytes.

# %%
K, N = MODEL["gate_up"]
calls = {f"M={m}": ArgSpec(m=m, k=K, n=N) for m in (1, 16, 128, 512, 4096)}
costs = {name: cost(call) for name, call in calls.items()}
plotting.bars(
    {name: {"weights": c.weights / 1e6, "activations": c.activations / 1e6, "outputs": c.outputs / 1e6} for name, c in costs.items()},
    "MB",
    f"Bytes of a call, {K} x {N}: gate and up of 2B4T",
    scale="log",
)

# %% [markdown]
# A weight that was read is multiplied M times. A call left of a chip's corner waits for memory, one to the right of it for the matrix unit.

# %%
plotting.roofline(calls, CHIPS)

# %% [markdown]
# The same as time: the least that any kernel needs for the matrices of 2B4T. Lines are flat while the weights take all the time; the
# distance to the dashed line is what packing can save. Hollow points wait for memory, filled ones for the matrix unit.

# %%
plotting.floors(MODEL, CHIPS)

# %% [markdown]
# ## Blocks
#
# A kernel computes the result block by block, while the bytes for the next block are on their way. Large blocks read fewer bytes twice;
# small ones leave room for what is on its way, and give every core something to do. `block_config.tpu_blocks` and `mosaic_gpu.blocks`
# choose, by rule where nothing was measured; a `TpuConfig` or `GpuConfig` chooses otherwise.

# %%
plotting.blocks(MODEL, ("v4", "v5e", "v6e", "h200"))

# %% [markdown]
# ## Correctness
#
# Sums of int8 activations times weights in {-1, 0, 1} are integers, so there is one right answer. Each implementation that runs here is
# held to the plain one, `reference`. Pallas simulates the TPU and GPU kernels; the native one is C++ for this processor.


# %%
def simulator(name):
    """A config for what does not run on this machine itself."""
    if name == "mosaic_tpu":
        return TpuConfig(chip="v6e", interpret=True)
    if name == "mosaic_gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return GpuConfig(chip="h200", interpret=plgpu.InterpretGPUParams())
    return None


cpu.register()
m, k, n = (3, 300, 130) if SMOKE else (17, 1300, 700)  # multiples of no block
rng = np.random.default_rng(0)
x = jnp.asarray(rng.integers(-128, 128, (m, k)).astype(np.int8))
w = pack(jnp.asarray(rng.integers(-1, 2, (k, n)).astype(np.int8)), jnp.ones((), jnp.float32))
places = {"mosaic_tpu": ("tpu", "v6e"), "mosaic_gpu": ("gpu", "h200")}
sums = {}
for name, implementation in IMPLEMENTATIONS.items():
    platform, chip = places.get(name, ("cpu", None))
    if reason := implementation.supported(ArgSpec(m=m, k=k, n=n, out_dtype="float32", platform=platform, chip=chip)):
        print(f"{name} does not run here: {reason}")
    else:
        ones = jnp.ones((m, 1), jnp.float32)
        sums[name] = ternary_matmul(x, w, x_scale=ones, out_dtype=jnp.float32, implementation=name, config=simulator(name))
expected = np.asarray(x).astype(np.int64) @ np.asarray(unpack(w)).astype(np.int64)
assert all(np.array_equal(np.asarray(found), expected) for found in sums.values())
plotting.against(expected, sums, f"Sums over K={k}, of {m} rows and {n} outputs")

# %% [markdown]
# ## What the unpacking costs
#
# **On a TPU.** libtpu compiles the kernel without a TPU. Its schedule says how many instruction words one block takes, and how many
# of them each unit fills at the least: MXU is the matrix unit, and VALU does the unpacking, among other things. Units work side by side, so
# where MXU's bar is the higher one, the unpacking can hide behind the product: with 512 rows on every TPU, with one row on v5e and v5p.
# None of this was run.


# %%
def results(name):
    """A committed result file."""
    return json.loads(Path(ROOT or "", "experiments", "results", "kernels", name).read_text(encoding="utf-8"))["calls"]


def tpu_schedules():
    """Share of the kernel's instruction words that each unit fills."""
    return {
        f"{call['chip']}\n{call['call'].removeprefix('2b4t/')}": {
            unit: call["units"].get(unit, 0) / call["bundles"] for unit in ("MXU", "VALU", "VLOAD", "VSTORE")
        }
        for call in results("tpu_aot.json")
        if call["form"] == "int8" and call["call"] in ("2b4t/gate_up/1", "2b4t/gate_up/512")
    }


NO_RESULTS = "The result files are in a clone of the repository: open this notebook there."
plotting.bars(tpu_schedules(), "share of instruction words", "Static schedules of the TPU kernel (matrix/M)") if ROOT else NO_RESULTS

# %% [markdown]
# **On a GPU.** The same from the machine code for Hopper: instructions of a warp in the whole kernel for each product of the tensor
# cores (IGMMA). LOP3, SHF and IMAD are logical operations, shifts and multiplications: the unpacking, and the arithmetic of addresses. One
# product is of 8 rows at M = 1, of 16 at M = 16 and of 128 beyond, so that one unpacking serves ever more rows. At M = 512 another kernel
# runs, which scales and rounds the result as well. Not run either.


# %%
def gpu_instructions():
    """Instructions of the kernel for each IGMMA."""
    found = {rows: results("gpu_aot.json")[f"2b4t/gate_up/{rows}"]["instructions"] for rows in (1, 16, 128, 512)}
    return {f"M={rows}": {kind: of[kind] / of["IGMMA"] for kind in ("LOP3", "SHF", "IMAD", "LDSM")} for rows, of in found.items()}


plotting.bars(gpu_instructions(), "instructions for each IGMMA", "Machine code of the GPU kernel (2B4T, gate_up)") if ROOT else NO_RESULTS

# %% [markdown]
# **Here.** Packed weights against weights unpacked before, measured on this machine: `native` and `xla` unpack in every call; int8,
# bfloat16 and float32 are XLA's own products. The bars are medians with quartiles.

# %%
K, N = (512, 512) if SMOKE else MODEL["gate_up"]
ternary = rng.integers(-1, 2, (K, N)).astype(np.int8)
packed = pack(jnp.asarray(ternary), jnp.float32(2**-6))
multiply = jax.jit(functools.partial(ternary_matmul, out_dtype=jnp.float32), static_argnames="implementation")
product = jax.jit(dense, static_argnums=3)


def ways(rows):
    """Functions without arguments that multiply `rows` rows, by name."""
    x = jnp.asarray(rng.integers(-127, 128, (rows, K)).astype(np.int8))
    x_scale = jnp.full((rows, 1), 2**-7, jnp.float32)
    found = {}
    for name in ("native", "xla"):
        if name in sums:  # it runs here
            found[f"packed, {name}"] = functools.partial(multiply, x, packed, x_scale=x_scale, implementation=name)
    for dtype in (jnp.int8, jnp.bfloat16, jnp.float32):
        found[jnp.dtype(dtype).name] = functools.partial(product, x, x_scale, jnp.asarray(ternary).astype(dtype), jnp.float32)
    return found


def milliseconds(functions, repeats):
    """Times of each function. They take turns, and the first turn, which compiles, does not count."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: values[1:] for name, values in times.items()}


measured = {f"M={rows}": milliseconds(ways(rows), 5 if SMOKE else 15) for rows in ((1, 16) if SMOKE else (1, 16, 128))}
plotting.bars(measured, "milliseconds", f"A product of {K} x {N} weights on this machine")
