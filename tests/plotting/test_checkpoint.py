"""Pictures of what is inside a model hold the statistics they are given."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitnet_jax import plotting
from bitnet_jax.errors import UserError
from bitnet_jax.evaluation import ActivationStatistics
from tests.plotting.drawing import drawn, labels


def weights(layers: int, matrix: str, zero: float, scale: float) -> list[dict[str, Any]]:
    plus = (1 - zero) * 0.6
    return [{"layer": i, "matrix": matrix, "fractions": [1 - zero - plus, zero, plus], "scale": scale * (i + 1)} for i in range(layers)]


def row(layer: int, name: str, **changes: Any) -> ActivationStatistics:
    size = 600 if name == "down" else 64
    channels = np.arange(size, dtype=np.float32)
    found = ActivationStatistics(
        layer=layer,
        input=name,
        absmax=size * 1.0,
        token_absmax=size / 2,
        rms=2.0,
        kurtosis=3.0 + layer,
        outliers=0.0,
        zeros=0.1,
        zero_codes=0.25,
        channel_absmax=channels,
    )
    return replace(found, **changes)


ROWS = [row(layer, name) for layer in range(3) for name in ("qkv", "down")]


def test_ternary_weights_are_drawn_by_matrix_over_the_layers() -> None:
    figure = drawn(plotting.ternary([*weights(3, "attn/q", 0.4, 0.1), *weights(3, "ffn/down", 0.2, 2.0)], "Weights"))
    zeros, balance, scales = figure.axes
    assert labels(scales) == ["attn/q", "ffn/down"]
    np.testing.assert_allclose([line.get_ydata() for line in zeros.lines[:2]], [[0.4] * 3, [0.2] * 3])
    np.testing.assert_allclose([line.get_ydata() for line in balance.lines[:2]], [[0.12] * 3, [0.16] * 3])
    np.testing.assert_allclose([line.get_ydata() for line in scales.lines], [[0.1, 0.2, 0.3], [2, 4, 6]])
    assert [list(line.get_xdata()) for line in scales.lines] == [[0, 1, 2]] * 2
    assert figure.get_suptitle() == "Weights"


def test_the_dashed_line_is_what_absmean_makes_of_a_normal_distribution() -> None:
    zeros = plotting.ternary(weights(1, "attn/q", 0.4, 0.1)).axes[0]
    w = np.random.default_rng(0).standard_normal(1_000_000)
    assert zeros.lines[-1].get_ydata()[0] == pytest.approx(np.mean(np.abs(w) < np.abs(w).mean() / 2), abs=2e-3)


def test_a_model_without_ternary_weights_has_no_picture_of_them() -> None:
    with pytest.raises(UserError, match="there are no rows: the model must have ternary weights"):
        plotting.ternary([])


def test_activations_are_drawn_by_input_over_the_layers() -> None:
    ranges, tails, zeros = drawn(plotting.activations(ROWS)).axes
    assert labels(tails) == ["qkv", "down"]
    np.testing.assert_allclose([line.get_ydata() for line in ranges.lines[:6:3]], [[64] * 3, [600] * 3])
    np.testing.assert_allclose([line.get_ydata() for line in ranges.lines[1:6:3]], [[32] * 3, [300] * 3])
    np.testing.assert_allclose([line.get_ydata() for line in ranges.lines[2:6:3]], [[2] * 3] * 2)
    np.testing.assert_allclose([line.get_ydata() for line in tails.lines[:2]], [[3, 4, 5]] * 2)
    np.testing.assert_allclose([line.get_ydata() for line in zeros.lines[:4]], [[0.1] * 3, [0.25] * 3] * 2)
    assert ranges.get_yscale() == tails.get_yscale() == "log"


def test_activations_without_codes_are_drawn_too() -> None:
    zeros = drawn(plotting.activations([replace(one, zero_codes=None) for one in ROWS])).axes[2]
    assert len([line for line in zeros.lines if len(line.get_xdata())]) == 2


def test_channels_are_a_map_of_layers_by_features() -> None:
    figure = drawn(plotting.channels(ROWS, "Channels"))
    for axes, name, features in zip(figure.axes[:2], ("qkv", "down"), (64, 600), strict=True):
        values = axes.images[0].get_array()
        assert axes.get_title() == name
        assert axes.get_xlim() == (0, features)
        width = math.ceil(features / 256)
        largest = np.pad(np.arange(features), (0, -features % width)).reshape(-1, width).max(-1) / 2
        np.testing.assert_allclose(values, np.stack([np.maximum(largest, 599 / 2 / 1e3)] * 3))
        assert axes.images[0].get_clim() == pytest.approx((599 / 2e3, 599 / 2))
