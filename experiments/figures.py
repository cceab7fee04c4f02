"""Figures of the experiments, the papers' points beside ours. `python -m experiments.tables` draws those that have results.

What a paper prints in bits is drawn in nats. Papers and this repository differ in text, vocabulary and tokens, so heights do not compare
across colours; slopes, and the gap between two models of one colour, do.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax import costs
from experiments.cells import read_results
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
# Spectra (2407.12327), section 4.3: fits in nats over 99 million to 3.9 billion parameters.
_SPECTRA = (Law(185, -0.26, 1.76), Law(159, -0.26, 1.67))
# Perplexities of (BitNet, LLaMA): b1.58 (2402.17764), Table 1; a4.8 (2411.04965), Table 1.
_B158 = {700e6: (12.87, 12.33), 1.3e9: (11.29, 11.25), 3e9: (9.91, 10.04)}
_A48 = {700e6: (12.32, 11.44), 1.3e9: (11.27, 10.82), 3e9: (9.97, 9.61), 7e9: (9.24, 9.20)}

_COLOURS = {"bitnet": "C0", "twin": "C1"}
_LABELS = {"bitnet": "b1.58", "twin": "full precision"}


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
        left.plot(list(_B1), points, "s", color=_COLOURS[side], mfc="none", label=f"{_LABELS[side]}, b1")
        line = np.geomspace(99e6, 3.9e9, 30)
        left.plot(line, law(line), ":", color=_COLOURS[side], label=f"{_LABELS[side]}, Spectra's fit")
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
