"""Pictures of weights and of what the quantisers make of them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import quant
from bitnet_jax.config import QuantConfig, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.plotting.figures import CODES
from bitnet_jax.plotting.figures import figure as new_figure

_BINS = 80


def weight_histogram(matrices: Mapping[str, tuple[Any, QuantConfig]], title: str = "") -> Any:
    """Latent weights of matrices, each in the colour of its code, above the codes and how many weights have them: a column a matrix.

    The dashed lines are the values ±scale that codes stand for, where there is one scale; those that occur.

    Args:
        matrices: label → latent weights [K, N] and their quantiser.
        title: stands above the picture.

    Raises:
        UserError: a kernel is not a matrix, or a quantiser has no codes.
    """
    kernels = {label: _matrix(kernel) for label, (kernel, _) in matrices.items()}
    figure = new_figure(1 + 3.2 * len(matrices), 4.6, title)
    panels = figure.subplots(2, len(matrices), squeeze=False, sharex="row", sharey="row", height_ratios=(2, 1))
    bins = np.linspace(min(w.min() for w in kernels.values()), max(w.max() for w in kernels.values()), _BINS + 1)
    for column, (label, (_, config)) in zip(panels.T, matrices.items(), strict=True):
        w = kernels[label]
        codes, scale = _quantized(w, config)
        groups = [w[codes == code] for code in (-1, 0, 1)]
        column[0].hist(groups, bins, stacked=True, color=CODES, label=("-1", "0", "+1"))
        if scale.size == 1:
            for value in np.unique(codes[codes != 0]) * scale.item():
                column[0].axvline(value, linestyle="--", linewidth=1, color="black")
        column[0].set(title=label, xlabel="latent weight")
        bars = column[1].bar(range(-1, 2), [group.size / w.size for group in groups], 0.6, color=CODES)
        column[1].bar_label(bars, [f"{bar.get_height():.1%}" for bar in bars], fontsize="small")
        column[1].set(xlabel="code", xticks=range(-1, 2), ylim=(0, 1.15))
    panels[0, 0].set_ylabel("weights")
    panels[1, 0].set_ylabel("share")
    panels[0, 0].legend(title="code", fontsize="small")
    return figure


def straight_through(kernel: Any, quantizers: Mapping[str, QuantConfig], title: str = "") -> Any:
    """What a layer multiplies by against the latent weight, and the gradient that the latent weight gets where that value gets 1.

    Args:
        kernel: latent weights [K, N]; the scale is theirs.
        quantizers: label → quantiser of weights.
        title: stands above the picture.

    Raises:
        UserError: the kernel is not a matrix.
    """
    w = _matrix(kernel)
    figure = new_figure(9, 3.4, title)
    forward, backward = figure.subplots(1, 2)
    order = np.argsort(w.reshape(-1))
    sorted_weights = w.reshape(-1)[order]
    forward.plot(sorted_weights, sorted_weights, linewidth=0.8, color="0.6", label="full precision")
    backward.axhline(0, linewidth=0.8, color="0.6", label="slope of the rounding itself")
    for number, (label, config) in enumerate(quantizers.items()):
        value, pull = jax.vjp(lambda weights, config=config: quant.fake_quantize_weights(weights, config), jnp.asarray(w))
        (gradient,) = pull(jnp.ones_like(value))
        for axes, result in ((forward, value), (backward, gradient)):
            # Ever thinner, so that lines which lie on each other are seen.
            axes.plot(sorted_weights, np.asarray(result).reshape(-1)[order], linewidth=4 / (number + 1), color=f"C{number}", label=label)
    forward.set(xlabel="latent weight", ylabel="weight in the product", title="forward")
    backward.set(xlabel="latent weight", ylabel="gradient that passes", title="backward", ylim=(-0.1, 1.5))
    for axes in (forward, backward):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def scales(kernel: Any, quantizers: Mapping[str, QuantConfig], title: str = "") -> Any:
    """What ternary weights lose, and how many are zero, over the scale s in clip(round(W / s), -1, 1) * s; points are quantisers' scales.

    Args:
        kernel: latent weights [K, N].
        quantizers: label → quantiser of weights with one scale a matrix.
        title: stands above the picture.

    Raises:
        UserError: the kernel is not a matrix, or a quantiser does not round by one scale.
    """
    w = _matrix(kernel)
    chosen = {label: _one_scale(w, config, label) for label, config in quantizers.items()}

    def loss(scale: float) -> tuple[float, float]:
        codes = np.clip(np.round(w / scale), -1, 1)
        return float(np.linalg.norm(w - codes * scale) / np.linalg.norm(w)), float(np.mean(codes == 0))

    figure = new_figure(9, 3.4, title)
    mean = float(np.abs(w).mean())
    over = np.linspace(0.05 * mean, 1.1 * max(3 * mean, *chosen.values()), 120)
    curves = np.array([loss(scale) for scale in over])
    for i, (axes, what) in enumerate(zip(figure.subplots(1, 2), ("|W - s codes| / |W|", "share of zeros"), strict=True)):
        axes.plot(over / mean, curves[:, i], color="0.4", linewidth=1.2)
        for number, (label, scale) in enumerate(chosen.items()):
            axes.plot(scale / mean, loss(scale)[i], "o", color=f"C{number}", label=label)
        axes.set(xlabel="scale s / mean|W|", ylabel=what, ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def latent_histograms(history: Mapping[int, Any], config: QuantConfig, title: str = "") -> Any:
    """Densities of a matrix's latent weights at several steps, in units of its scale then; at ±0.5 the code changes.

    Args:
        history: step → latent weights [K, N].
        config: quantiser of the weights, with one scale a matrix.
        title: stands above the picture.

    Raises:
        UserError: there is no matrix, or the quantiser does not round by one scale.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if not history:
        raise UserError("history={} must have a matrix for at least one step")
    figure = new_figure(7.5, 4, title)
    axes = figure.subplots()
    colours, norm = colormaps["viridis"], Normalize(min(history), max(history))
    bins = np.linspace(-4, 4, _BINS + 1)
    for step, kernel in sorted(history.items()):
        w = _matrix(kernel)
        scaled = w / _one_scale(w, config, "of the history")
        density = np.histogram(scaled, bins)[0] / (scaled.size * np.diff(bins))
        axes.stairs(density, bins, color=colours(norm(step)), linewidth=1.2)
    for threshold in (-0.5, 0.5):
        axes.axvline(threshold, linestyle="--", linewidth=0.8, color="0.4")
    axes.set(xlabel="latent weight / scale", ylabel="density")
    axes.grid(alpha=0.3)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="step")
    return figure


def _matrix(kernel: Any) -> np.ndarray:
    w = np.asarray(kernel, np.float32)
    if w.ndim != 2 or not w.size:
        raise UserError(f"kernel has shape {w.shape}: must be a matrix (K, N)")
    return w


def _quantized(w: np.ndarray, config: QuantConfig) -> tuple[np.ndarray, np.ndarray]:
    if config.weight is WeightQuantizer.NONE:
        raise UserError("weight=none has no codes: must be a quantiser of weights")
    codes, scale = quant.quantize_weights(jnp.asarray(w), config)
    return np.asarray(codes), np.asarray(scale)


def _one_scale(w: np.ndarray, config: QuantConfig, label: str) -> float:
    """The scale by which a whole matrix is rounded to -1, 0 and 1."""
    others = (WeightQuantizer.SIGN, WeightQuantizer.ZERO_ONE, WeightQuantizer.NONE)  # {0, 1} has no code below -0.5
    if config.weight_group is not None or config.weight_shards > 1 or config.weight in others:
        shares = f"weight_group={config.weight_group}, weight_shards={config.weight_shards}"
        raise UserError(f"quantiser {label!r} must round by one scale: weight={config.weight.value}, {shares}")
    return _quantized(w, config)[1].item()
