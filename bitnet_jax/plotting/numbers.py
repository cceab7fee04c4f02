"""Pictures of any numbers: bars in groups, results against the right one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitnet_jax.plotting.figures import figure as new_figure


def bars(table: Mapping[str, Mapping[str, float | Sequence[float]]], unit: str, title: str = "", scale: str = "linear") -> Any:
    """Bars side by side, in groups. A sequence is drawn as its median, with its quartiles as an error bar.

    Where every group has one bar, of one number, the number stands above it.

    Args:
        table: group → name → number, or several measurements of it. A group may lack names.
        unit: what the numbers are; it stands beside the axis.
        title: stands above the picture.
        scale: linear or log.
    """
    names = list(dict.fromkeys(name for group in table.values() for name in group))
    figure = new_figure(max(6, 1.5 + 0.3 * len(table) * (len(names) + 1)), 4)
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        places = [place for place, group in enumerate(table.values()) if name in group]
        numbers = [np.atleast_1d(np.asarray(group[name], np.float64)) for group in table.values() if name in group]
        low, middle, high = np.array([np.percentile(values, (25, 50, 75)) for values in numbers]).T
        errors = [middle - low, high - middle] if any(values.size > 1 for values in numbers) else None
        drawn = axes.bar(np.array(places) + (i + 0.5) * width - 0.4, middle, width, yerr=errors, capsize=2, label=name)
        if len(names) == 1 and errors is None:
            axes.bar_label(drawn, [f"{height:,.4g}" for height in middle], fontsize="small")
    axes.set_xticks(range(len(table)), list(table))
    axes.set(ylabel=unit, title=title, yscale=scale)
    axes.grid(axis="y", alpha=0.3)
    if len(names) > 1:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def against(expected: Any, found: Mapping[str, Any], title: str = "") -> Any:
    """Every number of several results against the one that it should be, a panel each, with how many differ.

    Args:
        expected: the right result.
        found: label → result of the same shape.
        title: stands above the picture.
    """
    figure = new_figure(2.4 * len(found), 2.9, title)
    right = np.asarray(expected).reshape(-1)
    ends = [right.min(), right.max()]
    for axes, (label, result) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        values = np.asarray(result).reshape(-1)
        axes.plot(ends, ends, linewidth=0.8, color="0.6")
        axes.plot(right, values, ".", markersize=3)
        axes.set_title(f"{label}\n{np.count_nonzero(values != right):,} of {right.size:,} differ", fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.set_aspect("equal", "datalim")
    figure.supxlabel("expected", fontsize="small")
    figure.supylabel("found", fontsize="small")
    return figure
