"""Every experiment: its docstring, its cells, and that each of them can be traced at toy size."""

import dataclasses
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax import costs
from bitnet_jax.config import Linear
from bitnet_jax.training.loop import init_run, model_apply
from bitnet_jax.training.optimizer import make_optimizer
from experiments.cells import Cell, smoke
from experiments.configs import ablations, scaling, scaling_gpu
from experiments.run import CONFIGS

MODULES = sorted(path.stem for path in CONFIGS.glob("*.py"))


def complete(module: Any, loss: Callable[[Cell], float]) -> tuple[list[Cell], dict[str, Any]]:
    """All cells of an experiment and their results, where `loss` is what a cell would end with."""
    results: dict[str, Any] = {}
    while new := [cell for cell in module.cells(results) if cell.name not in results]:
        results[new[0].name] = {"validation": {"loss": loss(new[0])}}
    return module.cells(results), results


def bowl(cell: Cell) -> float:
    """A loss whose best rate falls with the size, and is twice as high for a BitNet."""
    model, rate = cell.config.model, cell.config.optimizer.learning_rate
    best = (2 if model.linear is Linear.BIT else 1) * 0.2 / model.hidden_size
    return 3 + (rate / best - best / rate) ** 2 + 100 / model.hidden_size


@pytest.mark.parametrize("name", MODULES)
def test_an_experiment_says_where_it_is_from_and_what_it_costs(name: str) -> None:
    text = importlib.import_module(f"experiments.configs.{name}").__doc__ or ""
    for word in ("Source", "Command: python -m experiments.run", "Cost: ", "differs"):
        assert word in text
    assert re.search(r"[Ee]xpected", text)


@pytest.mark.parametrize("name", MODULES)
def test_names_of_cells_are_different_and_fit_for_files(name: str) -> None:
    cells, _ = complete(importlib.import_module(f"experiments.configs.{name}"), bowl)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in names)


def shapes_of_smoke_runs() -> dict[str, Cell]:
    """One smoke cell for each model that occurs, by name."""
    found: dict[Any, Cell] = {}
    for name in MODULES:
        for cell in importlib.import_module(f"experiments.configs.{name}").cells({}):
            small = smoke(cell)
            found.setdefault(small.config.model, small)
    return {cell.name: cell for cell in found.values()}


@pytest.mark.parametrize("cell", shapes_of_smoke_runs().values(), ids=lambda cell: cell.name)
def test_every_cell_can_be_traced_at_toy_size(cell: Cell) -> None:
    config = cell.config
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.data.seq_len), jnp.int32)
    state = jax.eval_shape(lambda: init_run(config, make_optimizer(config.optimizer, config.steps)))
    logits = jax.eval_shape(model_apply(config), state.params, tokens)
    assert logits.shape == (config.batch_size, config.data.seq_len, config.model.vocab_size)
    for model in cell.also.values():
        other = jax.eval_shape(model_apply(dataclasses.replace(config, model=model)), state.params, tokens)
        assert other.shape == logits.shape


# --- scaling ---------------------------------------------------------------------------------------------------------


def test_sides_of_scaling_differ_in_their_layers_and_recipes_alone() -> None:
    cells, _ = complete(scaling, bowl)
    for seed in scaling.SEEDS:
        for size, model in scaling.SIZES.items():
            mine = [cell.config for cell in cells if cell.name.startswith(f"{size}-") and cell.config.seed == seed]
            assert {dataclasses.replace(config.model, linear=Linear.BIT) for config in mine} <= {model}
            assert len({(config.data, config.steps, config.batch_size) for config in mine}) <= 1


def test_sizes_of_scaling_grow_as_they_are_called() -> None:
    totals = [costs.parameters(model).total for model in scaling.SIZES.values()]
    assert totals == [105_040, 226_496, 542_944, 986_240, 2_888_960, 9_251_840]
    larger = [costs.parameters(model).total / 1e6 for model in scaling_gpu.SIZES.values()]
    assert [round(total, 1) for total in larger] == [13.4, 30.9, 104.7, 196.7, 407.1]


def test_the_sweep_finds_the_best_rate_of_each_size_and_side() -> None:
    cells, results = complete(scaling, bowl)
    chosen = scaling.rates(results, tuple(scaling.SIZES), scaling.TRIES, scaling.FIRST)
    assert set(chosen) == {(size, side) for size in scaling.SIZES for side in scaling.SIDES}
    for (size, side), (asked, best) in chosen.items():
        assert best is not None
        losses = {rate: results[scaling.name(size, side, rate, 0)]["validation"]["loss"] for rate in asked}
        assert losses[best] == min(losses.values())
        seeds = {cell.config.seed for cell in cells if cell.name.startswith(scaling.name(size, side, best, 0).removesuffix("0"))}
        assert seeds == ({0} if size == "10m" else {0, 1, 2})
        assert len(asked) <= scaling.TRIES.get(size, 4)
        if size == "0.1m":  # the bowl's best rate was not at an end
            assert asked[0] > best > asked[-1]
    assert len(results) < 60  # what the docstring says of its cost


def test_the_sweep_goes_up_at_the_smallest_size_and_down_at_all() -> None:
    def sweep(best_rate: float, both_ways: bool, tries: int = 5) -> tuple[list[float], float | None]:
        results = {}
        while True:
            asked, best = scaling.sweep(results, "s", "bitnet", 8e-3, both_ways=both_ways, tries=tries)
            new = [rate for rate in asked if scaling.name("s", "bitnet", rate, 0) not in results]
            if not new:
                return asked, best
            results |= {scaling.name("s", "bitnet", rate, 0): {"validation": {"loss": abs(rate - best_rate)}} for rate in new}

    assert sweep(8e-3, both_ways=True) == ([1.6e-2, 8e-3, 4e-3], 8e-3)
    assert sweep(3.2e-2, both_ways=True) == ([6.4e-2, 3.2e-2, 1.6e-2, 8e-3, 4e-3], 3.2e-2)
    assert sweep(2e-3, both_ways=True) == ([1.6e-2, 8e-3, 4e-3, 2e-3, 1e-3], 2e-3)
    assert sweep(2e-3, both_ways=False) == ([8e-3, 4e-3, 2e-3, 1e-3], 2e-3)
    assert sweep(1.0, both_ways=False) == ([8e-3, 4e-3], 8e-3)
    assert sweep(0.0, both_ways=False, tries=2) == ([8e-3, 4e-3], 4e-3)


# --- ablations -------------------------------------------------------------------------------------------------------


def test_every_ablation_differs_from_the_default_and_from_the_others() -> None:
    runs: dict[Any, str] = {}
    for group in ablations.GROUPS.values():
        for variant, config in group.variants.items():
            assert runs.setdefault(config, ablations.run_name(variant)) == ablations.run_name(variant), f"{variant} is another's double"
    assert len(ablations.cells({})) == len(ablations.SEEDS) * len(runs)


@pytest.mark.parametrize("name", ["ffn-relu2", "ffn-gelu", "norm-none", "group-64", "weights-sign"])
def test_an_ablation_has_the_parameters_of_the_default(name: str) -> None:
    config = next(group.variants[name] for group in ablations.GROUPS.values() if name in group.variants)
    mine, default = costs.parameters(config.model), costs.parameters(ablations.BASE)
    assert (mine.embedding, mine.linear) == (default.embedding, default.linear)


def test_every_variant_is_run_with_one_seed_before_any_is_run_with_the_next() -> None:
    cells = ablations.cells({})
    seeds = [cell.config.seed for cell in cells]
    assert seeds == sorted(seeds)
    assert all(cell.name.endswith(f"-seed{cell.config.seed}") for cell in cells)


def test_the_best_rate_stands_inside_the_ladder() -> None:
    for side, prefix in (("bitnet", "rate-"), ("twin", "twin-rate-")):
        rates = sorted(
            config.optimizer.learning_rate for name, config in ablations.GROUPS["rate"].variants.items() if name.startswith(prefix)
        )
        assert rates[1] < ablations.RATE[side] < rates[-2]


def test_what_is_evaluated_as_well_has_a_row() -> None:
    for cell in ablations.cells({}):
        labels = {*cell.also, *(() if cell.config.optimizer.ema_decay is None else ("ema",))}
        variant = cell.name.removesuffix(f"-seed{cell.config.seed}")
        assert labels == ({ablations.ALSO[variant][0]} if variant in ablations.ALSO else set())


def test_the_docstring_says_how_many_runs_there_are() -> None:
    assert f"Cost: {len(ablations.cells({}))} runs of" in (ablations.__doc__ or "")
    assert f"{costs.parameters(ablations.BASE).total:,} parameters" in Path(ablations.__file__).read_text(encoding="utf-8")
