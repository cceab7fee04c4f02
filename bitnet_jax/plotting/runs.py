"""Pictures of runs, from what they logged, and of the schedules that they follow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bitnet_jax.config import OptimizerConfig
from bitnet_jax.errors import UserError
from bitnet_jax.params import LINEAR
from bitnet_jax.plotting.figures import CODES
from bitnet_jax.plotting.figures import figure as new_figure
from bitnet_jax.training import logs, run_directory, schedules

Runs = Mapping[str, Path | Sequence[Path]]
"""Label → folder of a run, or of several that differ in their seed: those are drawn as their mean with a band of one standard deviation."""

_AXES = {
    "loss": "loss\n(nats per token)",
    "validation_loss": "held-out loss\n(nats per token)",
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "grad_norm": "norm of the gradient",
    "flip_fraction": "share of codes that\nchanged between lines",
    "tokens_per_second": "tokens a second",
    "ternary/all/zero": "share of codes\nthat are 0",
}


def loss_curves(runs: Runs, title: str = "") -> Any:
    """Training loss against step for each run, with its evaluations as points.

    Args:
        runs: what is compared.
        title: stands above the picture.
    """
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for number, (label, directories) in enumerate(runs.items()):
        color = f"C{number}"
        _draw(axes, _numbers(directories, "loss"), color, f"{label}, training", linewidth=1.2)
        held_out = _numbers(directories, "validation_loss")
        if held_out[0].size:
            _draw(axes, held_out, color, f"{label}, held-out", linestyle="--", marker="o", markersize=4, linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def logged(runs: Runs, names: Sequence[str] | Mapping[str, str], title: str = "") -> Any:
    """Logged numbers against the step, a panel each.

    Args:
        runs: what is compared.
        names: names in metrics.jsonl, those of nested objects joined by "/", such as "ternary/all/zero"; or each with what stands beside
            its axis.
        title: stands above the picture.

    Raises:
        UserError: no run logged a name.
    """
    figure = new_figure(7, 1 + 1.6 * len(names), title)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        for number, (label, directories) in enumerate(runs.items()):
            _draw(axes, _numbers(directories, name), f"C{number}", label, linewidth=1.2)
        if not any(line.get_xdata().size for line in axes.lines):
            known = sorted({name for directories in runs.values() for line in _lines(directories)[0] for name, _ in logs.numbers(line)})
            raise UserError(f"name={name!r} was logged by no run: must be one of {', '.join(known)}")
        axes.set_ylabel(names[name] if isinstance(names, Mapping) else _AXES.get(name, name), fontsize="small")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    panels[0].legend(fontsize="small")
    return figure


def codes_over_time(run: Path, title: str = "") -> Any:
    """Shares of -1, 0 and +1 against the step, for each kind of linear layer and for all together: a panel each.

    Args:
        run: folder of a run.
        title: stands above the picture.

    Raises:
        UserError: the run has no ternary weights.
    """
    lines = [line for line in _lines(run)[0] if line.get("ternary")]
    if not lines:
        raise UserError(f"{run} logged no ternary weights: must be a run of ternary layers")
    kinds = [kind for kind in ("all", *LINEAR) if kind in lines[0]["ternary"]]
    figure = new_figure(9, 4.2, title)
    panels = figure.subplots(2, -(-len(kinds) // 2), sharex=True, sharey=True, squeeze=False).flat
    steps = [line["step"] for line in lines]
    for kind, axes in zip(kinds, panels, strict=False):
        shares = [[line["ternary"][kind][name] for line in lines] for name in ("minus", "zero", "plus")]
        axes.stackplot(steps, shares, labels=("-1", "0", "+1"), colors=CODES)
        axes.set(title=kind, xlim=(steps[0], steps[-1]) if len(steps) > 1 else None, ylim=(0, 1))
    for axes in panels:
        axes.set_axis_off()  # a panel too many
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("share of the codes", fontsize="medium")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", reverse=True)
    return figure


def schedule(optimizers: Mapping[str, OptimizerConfig], steps: int, title: str = "") -> Any:
    """Learning rate and weight decay over a run.

    Args:
        optimizers: label → configuration.
        steps: updates of the whole run.
        title: stands above the picture.
    """
    figure = new_figure(9, 3.2, title)
    left, right = figure.subplots(1, 2)
    updates = jnp.arange(1, steps + 1)
    for label, config in optimizers.items():
        for axes, rate in ((left, schedules.learning_rate), (right, schedules.weight_decay)):
            axes.plot(updates, np.asarray(rate(config, steps)(updates)), linewidth=1.2, label=label)
    left.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    right.set(xlabel="step", ylabel="weight decay", ylim=(0, None))
    left.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize="small")
    return figure


def over_seeds(numbers: Mapping[str, Sequence[float]], unit: str, title: str = "") -> Any:
    """A number of several variants, measured with the same seeds each; and how far it is from the first variant's, seed by seed.

    Points are seeds; the mark with its bar is their mean ± one standard deviation (n - 1). What a seed does to all variants alike
    cancels in the differences, so they show smaller effects than the numbers themselves.

    Args:
        numbers: variant → number of each seed, in the order of the seeds.
        unit: what the numbers are.
        title: stands above the picture.

    Raises:
        UserError: variants differ in how many seeds they have.
    """
    counts = {label: len(values) for label, values in numbers.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise UserError(f"seeds of the variants: {counts} must be the same number, at least one")
    figure = new_figure(9, 1.4 + 0.4 * len(numbers), title)
    left, right = figure.subplots(1, 2, sharey=True)
    reference = np.asarray(next(iter(numbers.values())), np.float64)
    for place, values in enumerate(np.asarray(list(numbers.values()), np.float64)):
        for axes, shown in ((left, values), (right, values - reference)):
            axes.plot(shown, np.full(shown.size, place), ".", color="0.6", markersize=6)
            spread = shown.std(ddof=1) if shown.size > 1 else None
            axes.errorbar(shown.mean(), place, xerr=spread, fmt="o", color=f"C{place}", markersize=6, capsize=4)
    left.set_yticks(range(len(numbers)), list(numbers))
    left.set_ylim(len(numbers) - 0.5, -0.5)
    left.set_xlabel(unit)
    right.set_xlabel("difference from the first of the same seed")
    right.axvline(0, linewidth=0.8, color="0.4", zorder=0)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    return figure


def _lines(directories: Path | Sequence[Path]) -> list[list[logs.Line]]:
    """What each of several runs logged."""
    folders = [directories] if isinstance(directories, Path) else directories
    return [logs.read(folder / run_directory.METRICS) for folder in folders]


def _numbers(directories: Path | Sequence[Path], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which every run logged the number `name` [n], and the number [runs, n]."""
    found = [{line["step"]: value for line in lines for key, value in logs.numbers(line) if key == name} for lines in _lines(directories)]
    steps = [step for step in found[0] if all(step in values for values in found)]
    return np.array(steps, int), np.array([[values[step] for step in steps] for values in found])


def _draw(axes: Any, numbers: tuple[np.ndarray, np.ndarray], color: str, label: str, **style: Any) -> None:
    steps, values = numbers
    mean = values.mean(axis=0)
    axes.plot(steps, mean, color=color, label=label, **style)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
