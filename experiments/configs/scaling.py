"""Loss against size: BitNet b1.58 and its full-precision twin, each at its own best learning rate.

Source: BitNet b1 (2310.11453), section 4.1 and Figure 3 (the fit L(N) = a N^b + c of both); b1.58 (2402.17764), Table 1 (the gap closes
with size); Spectra (2407.12327), section 4.3 (the same of ternary weights without quantised activations).

Command: python -m experiments.run scaling, then python -m experiments.tables

Cost: about 50 runs and 3 to 3.5 hours on two cores of a Zen 3 server. From the pace of a few steps beside other work, and for 10m from
experiments/results/throughput (76 GFLOP/s in a step): 0.5 min a run of 0.1m, 1 of 0.2m, 1.3 of 0.5m, 2.1 of 1m, 6 of 3m, 15 to 20 of 10m,
and 20 seconds for each to compile and evaluate.

Expected: the twin is better at every size, and the gap narrows. b1 prints no coefficients; read from its figure, in bits:
2114 N^-0.391 + 3.786 and 1686 N^-0.399 + 3.733. Spectra, in nats: 185 N^-0.26 + 1.76 and 159 N^-0.26 + 1.67.

Ours differs: 1,048,576 tokens a run instead of 10 to 300 billion, which is one token a parameter at 1m and a tenth of one at 10m; 38
plays (less than one epoch of them) with a vocabulary of 1,024; sizes from 0.1 to 10 million instead of 0.1 to 30 billion; sub-norms and
tied embeddings as in 2B4T; gradients clipped to a norm of 1.

Equal tokens, equal order of the data, equal initial parameters for equal seeds. The seeds of a size are 0, 1 and 2 (10m: 0).

Sweep: rates are 6e-3 times powers of two. The smallest size tries three about `FIRST`, each larger one the best of the size before it and
half of that; where the lowest rate is the best one, half of it is tried as well (and twice the highest, at the smallest size), `TRIES`
rates at most. Rates are chosen on seed 0, by the held-out loss that is reported, which favours both sides by as much.
"""

from dataclasses import replace
from typing import Any

from bitnet_jax.config import DataConfig, Linear, ModelConfig, OptimizerConfig, OutputConfig, Schedule, TrainConfig
from experiments.cells import Cell, Results, validation_loss

SIDES = {"bitnet": Linear.BIT, "twin": Linear.FULL}
FIRST = {"bitnet": 1.2e-2, "twin": 6e-3}
"""Middle of the rates that the smallest size tries."""
STEPS = 1024
DATA = DataConfig(source="shakespeare", seq_len=128)
SEEDS = (0, 1, 2)
SWEEP_SEED = 0
VOCAB = 1024


def small(name: str, **changes: int) -> ModelConfig:
    return replace(ModelConfig.preset(name), vocab_size=VOCAB, **changes)


# Parameters in all: 105,040; 226,496; 542,944; 986,240; 2,888,960; 9,251,840
SIZES = {
    "0.1m": small("ladder-0.2m", hidden_size=48, ffn_size=128, num_layers=2, head_dim=24),
    "0.2m": small("ladder-0.2m"),
    "0.5m": small("ladder-1m", hidden_size=96, ffn_size=256, num_heads=3, num_kv_heads=3),
    "1m": small("ladder-1m"),
    "3m": small("ladder-3m"),
    "10m": small("ladder-10m"),
}
ONE_SEED = ("10m",)
TRIES = {"0.1m": 6, "10m": 2}
"""Learning rates tried at most, 4 where nothing is said."""


def optimizer(linear: Linear, rate: float, steps: int) -> OptimizerConfig:
    """Each side's published recipe (FAQ of b1.58, Table 2) at another peak: two linear stages, the second at two thirds, with weight decay
    in the first; or one linear stage with weight decay throughout."""
    if linear is Linear.BIT:
        return OptimizerConfig(
            learning_rate=rate, second_learning_rate=rate * 2 / 3, final_learning_rate=rate / 50, warmup_steps=steps // 16
        )
    return OptimizerConfig(
        schedule=Schedule.LINEAR, learning_rate=rate, second_learning_rate=None, final_learning_rate=0.0, warmup_steps=steps // 16
    )


def train_config(
    model: ModelConfig, rate: float, seed: int, steps: int = STEPS, data: DataConfig = DATA, batch_size: int = 8, accumulation: int = 1
) -> TrainConfig:
    """The run of `model` by the recipe of its side."""
    return TrainConfig(
        model=model,
        data=data,
        optimizer=optimizer(model.linear, rate, steps),
        output=OutputConfig(log_every=max(1, steps // 64), checkpoint_every=max(1, steps // 8), tensorboard=False),
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        non_finite_limit=steps,  # a rate that is too large ends with a bad loss, and the sweep goes on
        seed=seed,
    )


def cells(results: Results) -> list[Cell]:
    """The sweep of every size up to the first that is not finished, and the seeds of the best rate of the others."""
    return plan(results, SIZES, {size: SEEDS[: 1 if size in ONE_SEED else None] for size in SIZES}, TRIES, FIRST)


def plan(
    results: Results,
    sizes: dict[str, ModelConfig],
    seeds: dict[str, tuple[int, ...]],
    tries: dict[str, int],
    first: dict[str, float],
    **training: Any,
) -> list[Cell]:
    """`cells` for any sizes, smallest first; `training` is passed on to `train_config`."""
    found: list[Cell] = []
    for (size, side), (asked, best) in rates(results, tuple(sizes), tries, first).items():
        runs = [(rate, SWEEP_SEED) for rate in asked]
        runs += [(best, seed) for seed in seeds[size] if best is not None and seed != SWEEP_SEED]
        model = replace(sizes[size], linear=SIDES[side])
        found += [Cell(name=name(size, side, rate, seed), config=train_config(model, rate, seed, **training)) for rate, seed in runs]
    return found


def rates(
    results: Results, sizes: tuple[str, ...], tries: dict[str, int], first: dict[str, float]
) -> dict[tuple[str, str], tuple[list[float], float | None]]:
    """The rates to try, and the best of them or None while one has no result, for each (size, side) that can be said from `results`."""
    found = {}
    start = dict(first)
    for number, size in enumerate(sizes):
        for side in list(start):
            asked, best = sweep(results, size, side, start[side], both_ways=number == 0, tries=tries.get(size, 4))
            found[size, side] = asked, best
            if best is None:
                del start[side]  # what larger sizes try is not known yet
            else:
                start[side] = best
    return found


def sweep(results: Results, size: str, side: str, start: float, *, both_ways: bool, tries: int) -> tuple[list[float], float | None]:
    """The rates to try at a size, highest first, and the best of them; None while one of them has no result.

    Args:
        results: finished cells.
        size: name of the size.
        side: name of the side.
        start: rate to begin with.
        both_ways: whether rates above `start` are tried.
        tries: rates at most.
    """
    asked = [2 * start, start, start / 2] if both_ways else [start, start / 2]
    while True:
        found = {rate: results.get(name(size, side, rate, SWEEP_SEED)) for rate in asked}
        ends = {rate: validation_loss(result) for rate, result in found.items() if result is not None}
        if len(ends) < len(asked):
            return asked, None
        best = min(asked, key=lambda rate, ends=ends: ends[rate])
        if len(asked) < tries and best == asked[-1]:
            asked.append(best / 2)
        elif len(asked) < tries and best == asked[0] and both_ways:
            asked.insert(0, 2 * best)
        else:
            return asked, best


def losses(results: Results) -> dict[str, dict[str, dict[int, float]]]:
    """Side → size → seed → held-out loss at the best rate, of what is finished."""
    found: dict[str, dict[str, dict[int, float]]] = {side: {} for side in SIDES}
    for (size, side), (_, best) in rates(results, tuple(SIZES), TRIES, FIRST).items():
        if best is not None:
            done = {seed: results.get(name(size, side, best, seed)) for seed in SEEDS}
            found[side][size] = {seed: validation_loss(result) for seed, result in done.items() if result is not None}
    return found


def name(size: str, side: str, rate: float, seed: int) -> str:
    """Name of a cell."""
    return f"{size}-{side}-lr{rate:.4g}-seed{seed}"
