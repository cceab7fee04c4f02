"""Pictures of weights hold the quantisers' codes, scales and gradients."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import plotting, quant
from bitnet_jax.config import QuantConfig, WeightQuantizer
from bitnet_jax.errors import UserError
from tests.plotting.drawing import drawn, labels

W = np.random.default_rng(0).normal(0, 0.1, (32, 24)).astype(np.float32)
ABSMEAN = QuantConfig()
ABSMAX = QuantConfig(weight=WeightQuantizer.ABSMAX)
SIGN = QuantConfig(weight=WeightQuantizer.SIGN)
ZERO_ONE = QuantConfig(weight=WeightQuantizer.ZERO_ONE)
GROUPED = QuantConfig(weight_group=16)
NONE = QuantConfig(weight=WeightQuantizer.NONE)


def codes(config: QuantConfig) -> np.ndarray:
    return np.asarray(quant.quantize_weights(jnp.asarray(W), config).codes)


def scale(config: QuantConfig) -> float:
    return float(quant.quantize_weights(jnp.asarray(W), config).scale.item())


def test_weights_stand_under_their_codes() -> None:
    quantizers = {"mean": ABSMEAN, "sign": SIGN, "groups": GROUPED}
    figure = drawn(plotting.weight_histogram({label: (W, config) for label, config in quantizers.items()}, "A matrix"))
    panels = np.array(figure.axes).reshape(2, 3)
    assert [axes.get_title() for axes in panels[0]] == list(quantizers)
    assert labels(panels[0, 0]) == ["-1", "0", "+1"]
    for (upper, lower), config in zip(panels.T, quantizers.values(), strict=True):
        counts = [np.count_nonzero(codes(config) == code) for code in (-1, 0, 1)]
        assert [sum(bar.get_height() for bar in bars) for bars in upper.containers] == counts
        np.testing.assert_allclose([bar.get_height() for bar in lower.containers[0]], np.array(counts) / W.size)
        values = [] if config is GROUPED else [-scale(config), scale(config)]
        np.testing.assert_allclose([line.get_xdata()[0] for line in upper.lines], values)


def test_gradients_pass_and_values_are_those_of_the_forward_pass() -> None:
    forward, backward = drawn(plotting.straight_through(W, {"mean": ABSMEAN, "none": NONE})).axes
    latent = np.sort(W.reshape(-1))
    assert labels(forward) == ["full precision", "mean", "none"]
    for line, expected in zip(forward.lines, (latent, np.sort((codes(ABSMEAN) * scale(ABSMEAN)).reshape(-1)), latent), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), latent)
        np.testing.assert_array_equal(line.get_ydata(), expected)
    slope, *gradients = backward.lines
    assert set(slope.get_ydata()) == {0}
    assert all(set(line.get_ydata()) == {1} and len(line.get_ydata()) == W.size for line in gradients)


def test_quantisers_lie_on_the_curves_of_error_and_zeros() -> None:
    quantizers = {"mean": ABSMEAN, "largest": ABSMAX}
    error, zeros = drawn(plotting.scales(W, quantizers)).axes
    assert labels(zeros) == list(quantizers)
    mean = np.abs(W).mean()
    for i, config in enumerate(quantizers.values()):
        lost = np.linalg.norm(W - codes(config) * scale(config)) / np.linalg.norm(W)
        np.testing.assert_allclose(error.lines[i + 1].get_xydata(), [[scale(config) / mean, lost]], rtol=1e-5)
        np.testing.assert_allclose(zeros.lines[i + 1].get_xydata(), [[scale(config) / mean, np.mean(codes(config) == 0)]], rtol=1e-5)
        for axes in (error, zeros):
            x, y = axes.lines[0].get_data()
            assert x[0] < scale(config) / mean < x[-1]
            assert np.interp(scale(config) / mean, x, y) == pytest.approx(axes.lines[i + 1].get_ydata()[0], abs=0.03)


def test_latent_weights_are_counted_in_units_of_their_scale() -> None:
    history = {0: W, 10: 2 * W, 5: np.concatenate([W, W + 0.1])}
    axes, bar = drawn(plotting.latent_histograms(history, ABSMEAN)).axes
    assert bar.get_ylabel() == "step"
    values, edges, _ = axes.patches[0].get_data()
    assert np.sum(values * np.diff(edges)) == pytest.approx(np.mean(np.abs(W) < 4 * scale(ABSMEAN)))
    zeros = np.sum((values * np.diff(edges))[np.abs(edges[:-1] + edges[1:]) < 1])
    assert zeros == pytest.approx(np.mean(codes(ABSMEAN) == 0), abs=1e-6)
    np.testing.assert_array_equal(axes.patches[2].get_data().values, values)  # the last step: twice the weights, and twice the scale
    assert axes.patches[0].get_edgecolor() != axes.patches[1].get_edgecolor() != axes.patches[2].get_edgecolor()
    assert [line.get_xdata()[0] for line in axes.lines] == [-0.5, 0.5]


@pytest.mark.parametrize("config", [SIGN, ZERO_ONE, NONE, GROUPED, QuantConfig(weight_shards=2)])
def test_a_quantiser_without_one_scale_is_refused_where_there_must_be_one(config: QuantConfig) -> None:
    with pytest.raises(UserError, match=f"must round by one scale: weight={config.weight.value}, weight_group={config.weight_group}"):
        plotting.scales(W, {"this": config})
    with pytest.raises(UserError, match="must round by one scale"):
        plotting.latent_histograms({0: W}, config)


def test_what_is_no_matrix_is_refused() -> None:
    draws: list[Any] = [
        lambda w: plotting.weight_histogram({"mean": (w, ABSMEAN)}),
        lambda w: plotting.straight_through(w, {"mean": ABSMEAN}),
        lambda w: plotting.scales(w, {"mean": ABSMEAN}),
        lambda w: plotting.latent_histograms({0: w}, ABSMEAN),
    ]
    for draw in draws:
        with pytest.raises(UserError, match=r"kernel has shape \(2, 32, 24\): must be a matrix \(K, N\)"):
            draw(np.stack([W, W]))
    with pytest.raises(UserError, match="must have a matrix for at least one step"):
        plotting.latent_histograms({}, ABSMEAN)
    with pytest.raises(UserError, match="weight=none has no codes"):
        plotting.weight_histogram({"none": (W, NONE)})
