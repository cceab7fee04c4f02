"""Training throughput of a BitNet against its full-precision twin, as a ratio in one run.

    python -m experiments.throughput ladder-10m ladder-100m

The steps are compiled from the training loop's own `compile_step`, given the same batch, and run by turns, one step each, so that a
busy machine slows all of them. The figure is the median of the ratios of neighbouring steps, with its quartiles: BitNet against its
twin, and BitNet with int8 operands (`arithmetic=int8`, the same numbers) against BitNet. Beside it stands the floor: operations of the
step (6 a parameter and token, and attention), and what the same machine reaches in a plain float32 product.

Writes experiments/results/throughput/<preset>-<device>.json. Cost: about 3 minutes for 10m and 10 for 100m on two CPU cores.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import costs
from bitnet_jax.config import Arithmetic, DataConfig, DType, ModelConfig, OptimizerConfig, Remat, TrainConfig
from bitnet_jax.memory import keep_freed_memory
from bitnet_jax.training import loop, run_directory
from bitnet_jax.training.optimizer import make_optimizer
from bitnet_jax.training.step import compile_step

RESULTS = Path(__file__).parent / "results" / "throughput"


def main(args: list[str] | None = None) -> None:
    """Measures the presets named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=20, help="steps of each, by turns")
    parser.add_argument("--dtype", choices=[d.value for d in DType], default="float32")
    parser.add_argument("--remat", choices=[r.value for r in Remat], default="none")
    parsed = parser.parse_args(args)
    keep_freed_memory()  # as the command line does
    for preset in parsed.presets:
        facts = measure(preset, parsed.batch_size, parsed.seq_len, parsed.pairs, DType(parsed.dtype), Remat(parsed.remat))
        device = "".join(c if c.isalnum() else "-" for c in facts["environment"]["device"]["kind"].lower())
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{preset}-{device}.json"
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        low, high = facts["ratio"]["quartiles"]
        print(f"{preset}: BitNet step / twin step = {facts['ratio']['median']:.3f} ({low:.3f} to {high:.3f}) → {path}")


def measure(preset: str, batch_size: int, seq_len: int, pairs: int, dtype: DType, remat: Remat) -> dict[str, Any]:
    """Times `pairs` steps of each by turns."""
    base = TrainConfig(
        model=replace(ModelConfig.preset(preset), dtype=dtype, remat=remat),
        data=DataConfig(seq_len=seq_len),
        optimizer=OptimizerConfig(warmup_steps=1),
        batch_size=batch_size,
        steps=1000,
    )
    ids = np.random.default_rng(0).integers(0, base.model.vocab_size, (batch_size, seq_len + 1), np.int32)
    batch = {"tokens": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}
    steps, states, compiling = {}, {}, {}
    int8 = replace(base.model, quant=replace(base.model.quant, arithmetic=Arithmetic.INT8))
    sides = {"bitnet": base.model, "twin": base.model.twin, "int8": int8}
    for name, model in sides.items():
        config = replace(base, model=model)
        optimizer = make_optimizer(config.optimizer, config.steps)
        states[name] = jax.jit(lambda config=config, optimizer=optimizer: loop.init_run(config, optimizer))()
        begun = time.perf_counter()
        steps[name] = compile_step(config, loop.model_apply(config), optimizer, states[name], batch)
        compiling[name] = time.perf_counter() - begun
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(pairs + 2):
        for name in sorted(sides, key=lambda name: (list(sides).index(name) + turn) % len(sides)):
            begun = time.perf_counter()
            states[name], metrics = steps[name](states[name], batch)
            jax.block_until_ready((states[name], metrics))
            if turn >= 2:  # the first steps warm caches
                seconds[name].append(time.perf_counter() - begun)
        print(f"\r{preset}: pair {turn + 1}/{pairs + 2}", end="" if turn < pairs + 1 else "\n", file=sys.stderr, flush=True)
    tokens = batch_size * seq_len
    flops = costs.train_flops(base.model, seq_len) * tokens
    return {
        "preset": preset,
        "parameters": costs.parameters(base.model).total,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "dtype": dtype.value,
        "remat": remat.value,
        "ratio": _ratio(seconds["bitnet"], seconds["twin"]),
        "int8_ratio": _ratio(seconds["int8"], seconds["bitnet"]),
        "step_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "compile_seconds": compiling,
        "floor": {"flops_per_step": flops, "product_flops_per_second": product_rate(dtype)},
        "environment": run_directory.environment(),
    }


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {"median": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]], "pairs": len(ratios)}


def product_rate(dtype: DType, size: int = 1024) -> float:
    """Operations a second of a plain product of square matrices on this device: the best of ten."""
    x = jnp.ones((size, size), dtype.value)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = min(_timed(product, x) for _ in range(10))
    return 2 * size**3 / best


def _timed(function: Any, *args: Any) -> float:
    begun = time.perf_counter()
    function(*args).block_until_ready()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
