"""Figures of the experiments, the papers' points beside ours. `python -m experiments.tables` draws those that have results.

What a paper prints in bits is drawn in nats. Papers and this repository differ in text, vocabulary and tokens, so heights do not compare
across colours; slopes, and the gap between two models of one colour, do.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax import costs
from experiments import papers
from experiments.cells import read_results, validation_loss
from experiments.configs import scaling
from experiments.fit import Fit, Law, fit

# b1 (2310.11453), Figure 3, read from its vector graphics: parameters → bits per token of (BitNet, FP16).
_B1 = {
    125e6: (5.227, 4.724),
    350e6: (4.764, 4.364),
    760e6: (4.499, 4.210),
    1.3e9: (4.346, 4.147),
    2.7e9: (4.227, 4.019),
    6.7e9: (4.093, 3.925),
}
B1_LARGER = {13e9: 4.041, 30e9: 3.954}
"""The BitNets that b1 predicted from the smaller ones: parameters → bits per token."""
_B1_CURVES = (Law(2114, -0.3910, 3.7862), Law(1686, -0.3994, 3.7330))
"""b1's own fits, read from its curves, in bits."""
# Spectra (2407.12327), section 4.3: fits in nats over 99 million to 3.9 billion parameters.
_SPECTRA = (Law(185, -0.26, 1.76), Law(159, -0.26, 1.67))
# Perplexities of (BitNet, LLaMA): b1.58 (2402.17764), Table 1; a4.8 (2411.04965), Table 1.
_B158 = {700e6: (12.87, 12.33), 1.3e9: (11.29, 11.25), 3e9: (9.91, 10.04)}
_A48 = {700e6: (12.32, 11.44), 1.3e9: (11.27, 10.82), 3e9: (9.97, 9.61), 7e9: (9.24, 9.20)}

_COLOURS = {"bitnet": "C0", "twin": "C1"}
_LABELS = {"bitnet": "b1.58", "twin": "full precision"}
_MODELS = {"bitnet": "BitNet", "twin": "full precision"}


# --- by formula ------------------------------------------------------------------------------------------------------


def energy_figure() -> Any:
    """b1's Figure 1, b1.58's Figure 3 and the energy of 2B4T's Table 1: the papers' numbers as marks, `costs.energy` as lines and bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    sizes = {size: costs.parameters(config).linear for size, config in papers.B1_SHAPES.items()}
    ours = {size: papers.joules(size) for size in sizes}
    for number, side in enumerate(("twin", "bitnet")):
        label = {"twin": "fp16", "bitnet": "BitNet"}[side]
        left.plot(list(sizes.values()), [pair[number] for pair in ours.values()], ".-", color=_COLOURS[side], label=f"{label}, formula")
        read = [(sizes[size], pair[number]) for size, pair in papers.B158_JOULES.items()]
        left.plot(*zip(*read, strict=True), "^", color=_COLOURS[side], mfc="none", markersize=8, label=f"{label}, b1.58's Figure 3 (read)")
    left.set(xscale="log", yscale="log", xlabel="parameters of the linear layers", ylabel="joules of 512 tokens, 7 nm")
    middle.plot(list(sizes.values()), [full / ternary for full, ternary in ours.values()], ".-", color="C0", label="formula")
    for marker, colour, label, printed in (
        ("s", "C2", "b1, Figure 1", papers.B1_RATIOS),
        ("^", "C3", "b1.58, Figure 3", papers.B158_RATIOS),
    ):
        middle.plot([sizes[size] for size in printed], list(printed.values()), marker, color=colour, mfc="none", markersize=8, label=label)
    middle.axhline(papers.PRODUCTS_ALONE, linestyle="--", linewidth=0.8, color="0.4", label="products of the linear layers alone")
    for size, count in sizes.items():
        middle.annotate(size, (count, ours[size][0] / ours[size][1]), xytext=(3, -11), textcoords="offset points", fontsize="x-small")
    middle.set(xscale="log", ylim=(0, 76), xlabel="parameters of the linear layers", ylabel="fp16 energy / BitNet energy")
    rows = papers.TABLE_2B4T
    right.barh(range(len(rows)), [costs.energy(row.config).total for row in rows.values()], color="C0", alpha=0.6, label="formula")
    right.plot([row.joules for row in rows.values()], range(len(rows)), "kD", mfc="none", label="2B4T, Table 1")
    right.set_yticks(range(len(rows)), list(rows))
    right.invert_yaxis()
    right.set(xlabel="joules of 512 tokens, 7 nm")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def memory_figure() -> Any:
    """Memory of b1.58's Table 1 and Figure 2 beside that of the weights: both, what is left over, and the ratio of the two models."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    sizes = {size: costs.parameters(config).total for size, config in papers.B158_SHAPES.items()}
    weights = {size: papers.weights(size) for size in sizes}
    for number, side in enumerate(("twin", "bitnet")):
        label = {"twin": "LLaMA, fp16", "bitnet": "b1.58, 2 bits"}[side]
        printed = {size: pair[number] for size, pair in papers.B158_MEMORY.items()}
        known = {size: float(value) for size, value in printed.items() if value is not None}
        counts = [sizes[size] for size in known]
        left.plot(list(sizes.values()), [pair[number] for pair in weights.values()], ".-", color=_COLOURS[side], label=f"{label}: weights")
        left.plot(counts, list(known.values()), "^", color=_COLOURS[side], mfc="none", markersize=8, label=f"{label}: printed")
        rest = [value - weights[size][number] for size, value in known.items()]
        middle.plot(counts, rest, "^-", color=_COLOURS[side], mfc="none", markersize=8, linewidth=0.8, label=label)
    left.set(xscale="log", yscale="log", xlabel="parameters", ylabel="GB")
    middle.set(xscale="log", ylim=(0, 2), xlabel="parameters", ylabel="GB printed less GB of the weights")
    right.plot(list(sizes.values()), [full / ternary for full, ternary in weights.values()], ".-", color="C0", label="weights")
    both = {size: full / ternary for size, (full, ternary) in papers.B158_MEMORY.items() if full is not None}
    right.plot([sizes[size] for size in both], list(both.values()), "^", color="C3", mfc="none", markersize=8, label="printed")
    for size, count in sizes.items():
        right.annotate(size, (count, weights[size][0] / weights[size][1]), xytext=(-4, 7), textcoords="offset points", fontsize="x-small")
    right.set(xscale="log", ylim=(0, 8.5), xlabel="parameters", ylabel="LLaMA's memory / b1.58's")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


# --- scaling ---------------------------------------------------------------------------------------------------------


def scaling_losses(folder: Path) -> dict[str, dict[int, list[float]]]:
    """Side → parameters → held-out losses of the seeds, from the results in `folder`."""
    sizes = {name: costs.parameters(model).total for name, model in scaling.SIZES.items()}
    found = scaling.losses(read_results(folder))
    return {side: {sizes[name]: list(seeds.values()) for name, seeds in found[side].items()} for side in scaling.SIDES}


def scaling_fits(losses: dict[str, dict[int, list[float]]]) -> dict[str, Fit] | None:
    """The law of each side; None before four sizes of both are finished, for three would be met exactly."""
    if min(len(sizes) for sizes in losses.values()) < 4:
        return None
    return {side: fit(sizes) for side, sizes in losses.items()}


def scaling_figure(folder: Path) -> Any:
    """Loss against size with fits and their 95 % bands, and the gap against size; None where nothing is finished."""
    from matplotlib.figure import Figure

    losses = scaling_losses(folder)
    if not all(losses.values()):
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    fits = scaling_fits(losses)
    for side, sizes in losses.items():
        means = [float(np.mean(seeds)) for seeds in sizes.values()]
        spread = [float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0 for seeds in sizes.values()]
        left.errorbar(list(sizes), means, spread, fmt="o", color=_COLOURS[side], capsize=3, label=f"{_LABELS[side]}, here")
        if fits is not None:
            line = np.geomspace(min(sizes), max(sizes), 60)
            low, high = fits[side].band(line)
            left.plot(line, fits[side].law(line), color=_COLOURS[side], linewidth=1)
            left.fill_between(line, low, high, color=_COLOURS[side], alpha=0.15, linewidth=0)
    for number, (side, law) in enumerate(zip(scaling.SIDES, _SPECTRA, strict=True)):
        points = [pair[number] * math.log(2) for pair in _B1.values()]
        left.plot(list(_B1), points, "s", color=_COLOURS[side], mfc="none", label="full precision, in b1" if number else "BitNet b1")
        line = np.geomspace(99e6, 3.9e9, 30)
        left.plot(line, law(line), ":", color=_COLOURS[side], label="full precision, Spectra's fit" if number else "TriLM, Spectra's fit")
    left.set(xscale="log", xlabel="parameters", ylabel="held-out loss, nats per token")
    both = [size for size in losses["bitnet"] if size in losses["twin"]]
    ours = [float(np.mean(losses["bitnet"][size]) / np.mean(losses["twin"][size]) - 1) * 100 for size in both]
    right.plot(both, ours, "o-", color="C0", label="here")
    right.plot(list(_B1), [(bit / full - 1) * 100 for bit, full in _B1.values()], "s", color="C2", mfc="none", label="b1")
    for marker, colour, label, printed in (("^", "C3", "b1.58", _B158), ("v", "C4", "b1.58 in a4.8", _A48)):
        gaps = [(math.log(bit) / math.log(full) - 1) * 100 for bit, full in printed.values()]
        right.plot(list(printed), gaps, marker, color=colour, mfc="none", label=label)
    line = np.geomspace(99e6, 3.9e9, 30)
    right.plot(line, (_SPECTRA[0](line) / _SPECTRA[1](line) - 1) * 100, ":", color="C5", label="Spectra's fits")
    right.axhline(0, color="black", linewidth=0.6)
    right.set(xscale="log", xlabel="parameters", ylabel="loss of b1.58 above full precision, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def sweep_figure(folder: Path) -> Any:
    """Held-out loss against learning rate for every size, a panel a side; None where nothing is finished. A ring marks the best rate."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    results = read_results(folder)
    found: dict[str, dict[str, dict[float, float]]] = {side: {} for side in scaling.SIDES}
    for (size, side), (asked, _) in scaling.rates(results, tuple(scaling.SIZES), scaling.TRIES, scaling.FIRST).items():
        names = {rate: scaling.name(size, side, rate, scaling.SWEEP_SEED) for rate in sorted(asked)}
        ends = {rate: validation_loss(results[name]) for rate, name in names.items() if name in results}
        if ends:
            found[side][size] = ends
    if not any(found.values()):
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (side, sizes) in zip(figure.subplots(1, 2, sharex=True, sharey=True), found.items(), strict=True):
        for number, (size, ends) in enumerate(sizes.items()):
            best = min(ends, key=lambda rate, ends=ends: ends[rate])
            axes.plot(list(ends), list(ends.values()), ".-", color=f"C{number}", label=size)
            axes.plot(best, ends[best], "o", color=f"C{number}", mfc="none", markersize=9)
        axes.set(xscale="log", xlabel="peak learning rate", title=_LABELS[side])
        axes.grid(alpha=0.3)
        if sizes:
            axes.legend(fontsize="small", title="parameters")
    rates = sorted({rate for sizes in found.values() for ends in sizes.values() for rate in ends})
    figure.axes[0].set_xticks(rates, [f"{rate:.3g}" for rate in rates], fontsize="x-small", rotation=45)
    figure.axes[0].xaxis.set_minor_locator(NullLocator())
    figure.axes[1].tick_params(axis="x", labelsize="x-small", labelrotation=45)
    figure.axes[0].set_ylabel("held-out loss, nats per token, seed 0")
    return figure


def b1_fits(sizes: int = len(_B1)) -> dict[str, Fit]:
    """The law fitted here to b1's smallest points, in nats: an example of the fit, and no result of this project."""
    points = list(_B1.items())[:sizes]
    return {side: fit({int(size): [bits[i] * math.log(2)] for size, bits in points}) for i, side in enumerate(scaling.SIDES)}


def b1_figure() -> Any:
    """The example: `b1_fits` with 95 % bands up to 100 billion parameters, b1's own curves, the BitNets that it predicted; and the gap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle("Example: b1's points, fitted here")
    fits, line = b1_fits(), np.geomspace(125e6, 100e9, 80)
    for number, (side, one) in enumerate(fits.items()):
        colour, low_high = _COLOURS[side], one.band(line)
        left.plot(
            list(_B1), [pair[number] * math.log(2) for pair in _B1.values()], "s", color=colour, label=f"{_MODELS[side]}: points of b1"
        )
        left.plot(line, one.law(line), color=colour, linewidth=1, label=f"fit: {one.law.a:.3g} N^{one.law.b:.3f} + {one.law.c:.3f}")
        left.fill_between(line, *low_high, color=colour, alpha=0.15, linewidth=0)
        left.plot(
            line, _B1_CURVES[number](line) * math.log(2), ":", color="black", linewidth=1, label=None if number else "b1's own curves"
        )
    left.plot(list(B1_LARGER), [bits * math.log(2) for bits in B1_LARGER.values()], "s", color="C0", mfc="none", label="not in the fit")
    left.set(xscale="log", xlabel="parameters", ylabel="validation loss, nats per token")
    gaps = np.stack([Law(*bit)(line) - Law(*full)(line) for bit, full in zip(fits["bitnet"].draws, fits["twin"].draws, strict=True)])
    right.plot(list(_B1), [(bit - full) * math.log(2) for bit, full in _B1.values()], "s", color="C2", label="points of b1")
    right.plot(line, fits["bitnet"].law(line) - fits["twin"].law(line), color="C2", linewidth=1, label="of the fits")
    right.fill_between(line, *np.quantile(gaps, (0.025, 0.975), axis=0), color="C2", alpha=0.15, linewidth=0)
    right.plot(100e9, 0.09 * math.log(2), "*", color="black", markersize=10, label="b1, section 4.1: 0.09 bits at 100B")
    right.axhline(0, color="black", linewidth=0.6)
    right.set(xscale="log", xlabel="parameters", ylabel="loss of BitNet less that of fp16, nats")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def coefficients_figure(fits: dict[str, Fit], title: str) -> Any:
    """Exponent b against floor c in every draw of the bootstrap, with the fit itself as a cross."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for side, one in fits.items():
        axes.plot(one.draws[:, 1], one.draws[:, 2], ".", color=_COLOURS[side], markersize=3, alpha=0.4, label=_MODELS[side])
        axes.plot(one.law.b, one.law.c, "x", color="black", markersize=8)
    axes.set(xlabel="exponent b", ylabel="floor c, nats", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", markerscale=4)
    return figure
