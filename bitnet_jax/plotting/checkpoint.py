"""Pictures of what is inside a model: ternary weights and activations, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitnet_jax.errors import UserError
from bitnet_jax.evaluation import ActivationStatistics
from bitnet_jax.plotting.figures import figure as new_figure

_COLUMNS = 256


def ternary(rows: Sequence[Mapping[str, Any]], title: str = "") -> Any:
    """The ternary weights of every matrix over the layers: share of zeros, how far +1 and -1 are from balance, and the scale.

    Dashed are the zeros of absmean on weights of a normal distribution, P(|w| < mean|w| / 2) = 0.31, and a balance of 0.

    Args:
        rows: as `statistics.ternary_layers` gives them.
        title: stands above the picture.

    Raises:
        UserError: there are no rows, as of a model in full precision.
    """
    if not rows:
        raise UserError("there are no rows: the model must have ternary weights")
    figure = new_figure(11, 3.6, title)
    zeros, balance, scales = figure.subplots(1, 3)
    for i, name in enumerate(dict.fromkeys(row["matrix"] for row in rows)):
        of = [row for row in rows if row["matrix"] == name]
        layers, style = [row["layer"] for row in of], {"color": f"C{i}", "linewidth": 1, "markersize": 4, "label": name}
        zeros.plot(layers, [row["fractions"][1] for row in of], ".-", **style)
        balance.plot(layers, [row["fractions"][2] - row["fractions"][0] for row in of], ".-", **style)
        scales.plot(layers, [row["scale"] for row in of], ".-", **style)
    for axes, level in ((zeros, _zeros_of_a_normal_distribution()), (balance, 0.0)):
        axes.axhline(level, linestyle="--", linewidth=0.8, color="0.4")
    zeros.set(ylabel="share of weights that are 0")
    balance.set(ylabel="share of +1 less share of -1")
    scales.set(ylabel="scale: what a weight of 1 stands for", ylim=(0, 1.05 * max(row["scale"] for row in rows)))
    _over_layers([zeros, balance, scales])
    scales.legend(fontsize="x-small", ncols=2)
    return figure


def _zeros_of_a_normal_distribution() -> float:
    from math import erf, pi, sqrt

    return erf(sqrt(2 / pi) / 2 / sqrt(2))


def activations(rows: Sequence[ActivationStatistics], title: str = "") -> Any:
    """What the linear layers multiply, over the layers: ranges, tails and zeros.

    Ranges: the largest number of all (solid), the median token's largest (dashed), which its scale follows, and the root mean square
    (dotted); the further these are apart, the fewer of the codes are in use. Tails: kurtosis, beside the 3 of a normal distribution.
    Zeros: as they come (hollow), and those whose code is zero (filled).

    Args:
        rows: as `evaluation.activation_statistics` gives them.
        title: stands above the picture.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(11, 3.8, title)
    ranges, tails, zeros = figure.subplots(1, 3)
    for i, name in enumerate(dict.fromkeys(row.input for row in rows)):
        of, color = [row for row in rows if row.input == name], f"C{i}"
        layers = [row.layer for row in of]
        ranges.plot(layers, [row.absmax for row in of], "-", color=color, linewidth=1.2)
        ranges.plot(layers, [row.token_absmax for row in of], "--", color=color, linewidth=1)
        ranges.plot(layers, [row.rms for row in of], ":", color=color, linewidth=1.2)
        tails.plot(layers, [row.kurtosis for row in of], ".-", color=color, linewidth=1, label=name)
        zeros.plot(layers, [row.zeros for row in of], "o-", color=color, mfc="white", linewidth=0.6, markersize=5)
        coded = [(row.layer, row.zero_codes) for row in of if row.zero_codes is not None]
        if coded:
            zeros.plot(*zip(*coded, strict=True), "o-", color=color, linewidth=1, markersize=3)
    tails.axhline(3, linestyle="--", linewidth=0.8, color="0.4")
    for style, label in (("-", "largest"), ("--", "largest of the median token"), (":", "root mean square")):
        ranges.plot([], [], style, color="0.4", label=label)
    for style, fill, label in (("o-", "white", "zero as it comes"), ("o-", "0.4", "code is zero")):
        zeros.plot([], [], style, color="0.4", mfc=fill, markersize=4, linewidth=0.8, label=label)
    ranges.set(ylabel="size of activations", yscale="log")
    ranges.margins(y=0.2)  # room for the legend
    tails.set(ylabel="kurtosis (normal distribution: 3)", yscale="log")
    zeros.set(ylabel="share of activations", ylim=(-0.03, 1.03))
    _over_layers([ranges, tails, zeros])
    for axes in (ranges, tails):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in (ranges, tails, zeros):
        axes.legend(fontsize="x-small")
    return figure


def channels(rows: Sequence[ActivationStatistics], title: str = "") -> Any:
    """Largest activation of each input feature over the root mean square of all, as a map of layers by features for each input.

    A bright column is a feature that is an outlier in every layer. What is below a thousandth of the brightest is black. Where there are
    more than 256 features a pixel is the largest of several neighbours.

    Args:
        rows: as `evaluation.activation_statistics` gives them.
        title: stands above the picture.
    """
    from matplotlib.colors import LogNorm

    names = list(dict.fromkeys(row.input for row in rows))
    maps = {name: np.stack([_pooled(row.channel_absmax / max(row.rms, 1e-30)) for row in rows if row.input == name]) for name in names}
    top = max(1.0, *(values.max() for values in maps.values()))
    figure = new_figure(11, 1.6 + 0.12 * len(maps[names[0]]), title)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    image = None
    for axes, (name, values) in zip(panels, maps.items(), strict=True):
        features = next(row.channel_absmax.size for row in rows if row.input == name)
        extent = (0, features, len(values) - 0.5, -0.5)
        image = axes.imshow(
            np.maximum(values, top / 1e3), aspect="auto", norm=LogNorm(top / 1e3, top), extent=extent, interpolation="nearest"
        )
        axes.set(title=name, xlabel="input feature")
        axes.yaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="largest / rms", pad=0.01)
    return figure


def _pooled(values: np.ndarray) -> np.ndarray:
    """The largest of neighbours, so that at most `_COLUMNS` numbers are left."""
    width = -(-values.size // _COLUMNS)
    return np.pad(values, (0, -values.size % width)).reshape(-1, width).max(-1)


def _over_layers(panels: Sequence[Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
