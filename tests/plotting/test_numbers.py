"""Pictures hold the numbers that they are of, and can be drawn."""

import numpy as np
import pytest

from bitnet_jax import plotting
from tests.plotting.drawing import drawn, heights, labels


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_bars_are_as_high_as_their_numbers(scale: str) -> None:
    figure = drawn(plotting.bars({"a": {"p": 1.0, "q": 2}, "b": {"q": 4.0}}, "metres", "Lengths", scale))
    (axes,) = figure.axes
    assert heights(axes) == {"p": [1.0], "q": [2.0, 4.0]}
    assert labels(axes) == ["p", "q"]
    assert (axes.get_ylabel(), axes.get_title(), axes.get_yscale()) == ("metres", "Lengths", scale)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b"]


def test_bars_of_a_group_stand_beside_each_other_under_its_name() -> None:
    (axes,) = plotting.bars({"a": {"p": 1, "q": 2}, "b": {"p": 3, "q": 4}}, "").axes
    places = np.array([[bar.get_x() + bar.get_width() / 2 for bar in bars] for bars in axes.containers])
    np.testing.assert_allclose(places.mean(axis=0), [0, 1], atol=1e-12)
    assert places[0, 0] < places[1, 0] < 0.5 < places[0, 1] < places[1, 1]


def test_measurements_are_drawn_as_median_and_quartiles() -> None:
    (axes,) = drawn(plotting.bars({"a": {"p": [5.0, 1, 2, 3, 4]}, "b": {"p": [7.0]}}, "seconds")).axes
    assert heights(axes)["p"] == [3, 7]
    (segments,) = [bar.get_segments() for bar in axes.collections]
    np.testing.assert_allclose([segment[:, 1] for segment in segments], [[2, 4], [7, 7]])


def test_one_bar_in_each_group_has_its_number_above_it_and_no_legend() -> None:
    (axes,) = drawn(plotting.bars({"a": {"p": 1234.5678}, "b": {"p": 0.5}}, "metres")).axes
    assert [text.get_text() for text in axes.texts] == ["1,235", "0.5"]
    assert axes.get_legend() is None
    for table in ({"a": {"p": [1.0, 2]}}, {"a": {"p": 1.0, "q": 2.0}}):
        (axes,) = plotting.bars(table, "metres").axes
        assert not axes.texts


def test_numbers_that_differ_are_counted() -> None:
    expected = np.arange(6).reshape(2, 3)
    wrong = np.array([[0, 1, 3], [3, 5, 5]])
    figure = drawn(plotting.against(expected, {"right": expected.astype(np.float32), "wrong": wrong}, "Sums"))
    assert [axes.get_title() for axes in figure.axes] == ["right\n0 of 6 differ", "wrong\n2 of 6 differ"]
    np.testing.assert_array_equal(figure.axes[1].lines[1].get_xydata(), [[0, 0], [1, 1], [2, 3], [3, 3], [4, 5], [5, 5]])
