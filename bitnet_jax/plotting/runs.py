"""Pictures of runs, from what they logged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_jax.plotting.figures import figure as new_figure
from bitnet_jax.training import logs, run_directory


def loss_curves(runs: Mapping[str, Path], title: str = "") -> Any:
    """Training loss against step for each run, with its evaluations as points.

    Args:
        runs: label → folder of a run.
        title: stands above the picture.
    """
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for label, directory in runs.items():
        lines = logs.read(directory / run_directory.METRICS)
        training = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        (drawn,) = axes.plot(*zip(*training, strict=True), label=f"{label}, training", linewidth=1.2)
        held_out = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o--", color=drawn.get_color(), markersize=4, linewidth=0.8, label=f"{label}, held-out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
