"""Pictures of runs hold what the runs logged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_jax import plotting
from bitnet_jax.config import OptimizerConfig, Schedule
from bitnet_jax.errors import UserError
from bitnet_jax.training import run_directory, schedules
from tests.plotting.drawing import drawn, labels


def run(folder: Path, losses: list[float], held_out: dict[int, float] | None = None, **more: Any) -> Path:
    """A folder with the log of a run: step i + 1 has losses[i]."""
    lines: list[dict[str, Any]] = [{"kind": "train", "step": i + 1, "loss": loss, **more} for i, loss in enumerate(losses)]
    lines += [{"kind": "evaluation", "step": step, "validation_loss": loss} for step, loss in (held_out or {}).items()]
    folder.mkdir()
    (folder / run_directory.METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


# --- logs ------------------------------------------------------------------------------------------------------------


def test_loss_curves_are_what_was_logged(tmp_path: Path) -> None:
    runs = {"one": run(tmp_path / "a", [3, 2], {2: 2.5}), "other": run(tmp_path / "b", [4, 3])}
    (axes,) = drawn(plotting.loss_curves(runs, "Twins")).axes
    assert labels(axes) == ["one, training", "one, held-out", "other, training"]
    assert [points(line) for line in axes.lines] == [[(1, 3), (2, 2)], [(2, 2.5)], [(1, 4), (2, 3)]]
    assert axes.lines[0].get_color() == axes.lines[1].get_color() != axes.lines[2].get_color()
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("step", "loss (nats per token)", "Twins")
    assert not axes.collections


def test_a_number_that_was_not_finite_is_left_out(tmp_path: Path) -> None:
    (axes,) = drawn(plotting.loss_curves({"one": run(tmp_path / "a", [3, None, 1])})).axes  # type: ignore[list-item]
    assert points(axes.lines[0]) == [(1, 3), (3, 1)]


def test_seeds_are_drawn_as_mean_and_standard_deviation_at_the_steps_that_all_have(tmp_path: Path) -> None:
    seeds = [run(tmp_path / "a", [3, 2, 1]), run(tmp_path / "b", [5, 4]), run(tmp_path / "c", [7, 3])]
    (axes,) = drawn(plotting.loss_curves({"three": seeds})).axes
    assert points(axes.lines[0]) == [(1, 5), (2, 3)]
    (band,) = axes.collections
    np.testing.assert_allclose(band.get_datalim(axes.transData).get_points(), [[1, 2], [2, 7]])


def test_logged_numbers_have_a_panel_each(tmp_path: Path) -> None:
    zeros = {"ternary": {"all": {"minus": 0.2, "zero": 0.5, "plus": 0.3}}}
    runs = {"ternary": run(tmp_path / "a", [3, 2], **zeros), "full": run(tmp_path / "b", [4, 3], ternary=None)}
    upper, lower = drawn(plotting.logged(runs, ["loss", "ternary/all/zero"])).axes
    assert [points(line) for line in upper.lines] == [[(1, 3), (2, 2)], [(1, 4), (2, 3)]]
    assert [points(line) for line in lower.lines] == [[(1, 0.5), (2, 0.5)], []]
    assert labels(upper) == ["ternary", "full"]
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("loss\n(nats per token)", "share of codes\nthat are 0")
    assert plotting.logged(runs, {"loss": "nats"}).axes[0].get_ylabel() == "nats"
    assert plotting.logged(runs, ["ternary/all/plus"]).axes[0].get_ylabel() == "ternary/all/plus"


def test_a_number_that_nobody_logged_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name='los' was logged by no run: must be one of loss"):
        plotting.logged({"one": run(tmp_path / "a", [3])}, ["los"])


def test_shares_of_codes_add_up_to_one(tmp_path: Path) -> None:
    shares = {"all": (0.25, 0.5, 0.25), "up": (0.5, 0.125, 0.375), "q": (0.25, 0.25, 0.5)}
    names = ("minus", "zero", "plus")
    ternary = {kind: dict(zip(names, values, strict=True)) for kind, values in shares.items()}
    figure = drawn(plotting.codes_over_time(run(tmp_path / "a", [3, 2], ternary=ternary)))
    assert [axes.get_title() for axes in figure.axes if axes.axison] == ["all", "q", "up"]
    for axes in figure.axes:
        if axes.axison:
            heights = [area.get_datalim(axes.transData).get_points()[:, 1] for area in axes.collections]
            np.testing.assert_allclose([upper - lower for lower, upper in heights], shares[axes.get_title()])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["+1", "0", "-1"]


def test_a_run_without_ternary_weights_has_no_codes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="logged no ternary weights: must be a run of ternary layers"):
        plotting.codes_over_time(run(tmp_path / "a", [3], ternary=None))


# --- schedules -------------------------------------------------------------------------------------------------------


def test_schedules_are_those_of_the_optimiser() -> None:
    optimizers = {"two": OptimizerConfig(warmup_steps=4), "one": OptimizerConfig(warmup_steps=4, schedule=Schedule.COSINE)}
    left, right = drawn(plotting.schedule(optimizers, 20)).axes
    assert labels(right) == ["two", "one"]
    for axes, rate in ((left, schedules.learning_rate), (right, schedules.weight_decay)):
        for line, config in zip(axes.lines, optimizers.values(), strict=True):
            assert list(line.get_xdata()) == list(range(1, 21))
            assert [float(y) for y in line.get_ydata()] == [float(rate(config, 20)(step)) for step in range(1, 21)]


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seeds_are_shown_with_mean_and_spread_and_compared_one_by_one() -> None:
    left, right = drawn(plotting.over_seeds({"base": [1.0, 2, 3], "change": [2.0, 3, 4]}, "nats")).axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["base", "change"]
    assert (left.get_xlabel(), right.get_xlabel()) == ("nats", "difference from the first of the same seed")

    def marks(axes: Any) -> list[float]:
        return [float(bar[0].get_xdata()[0]) for bar in axes.containers]

    def bars(axes: Any) -> list[list[float]]:
        return [[float(x) for x in bar[2][0].get_segments()[0][:, 0]] for bar in axes.containers]

    assert (marks(left), bars(left)) == ([2, 3], [[1, 3], [2, 4]])
    assert (marks(right), bars(right)) == ([0, 1], [[0, 0], [1, 1]])  # what the seeds do cancels


def test_one_seed_has_no_spread() -> None:
    left, _ = drawn(plotting.over_seeds({"base": [1.0], "change": [2.0]}, "nats")).axes
    assert all(not bar.has_xerr for bar in left.containers)


@pytest.mark.parametrize("numbers", [{"base": [1.0, 2], "change": [2.0]}, {"base": []}, {}])
def test_seeds_that_cannot_be_compared_are_an_error(numbers: dict[str, list[float]]) -> None:
    with pytest.raises(UserError, match="must be the same number, at least one"):
        plotting.over_seeds(numbers, "nats")
