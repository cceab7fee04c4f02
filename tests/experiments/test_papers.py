"""The papers' printed costs follow from the formulas; `tests/test_costs.py` has their digits."""

import pytest

from bitnet_jax import costs
from experiments import papers


@pytest.mark.parametrize("size", papers.B158_JOULES)
def test_energy_is_that_of_the_figure(size: str) -> None:
    for ours, read in zip(papers.joules(size), papers.B158_JOULES[size], strict=True):
        assert ours == pytest.approx(read, rel=5e-3)


@pytest.mark.parametrize("printed", [papers.B1_RATIOS, papers.B158_RATIOS], ids=["b1", "b1.58"])
def test_ratios_round_to_their_print_where_q_k_and_v_share_the_scaling_of_their_input(printed: dict[str, float]) -> None:
    for size, ratio in printed.items():
        full, ternary = papers.joules(size)
        assert full / ternary == pytest.approx(ratio, abs=0.06)
        if size in ("1.3b", "2.7b"):
            assert round(papers.ratio_scaled_once(size), 2) == {"1.3b": 18.56, "2.7b": 21.67}[size]


def test_the_ratio_of_products_alone_is_the_printed_one_and_above_every_model() -> None:
    assert round(papers.PRODUCTS_ALONE, 1) == 71.4
    assert all(full / ternary < papers.PRODUCTS_ALONE for full, ternary in map(papers.joules, papers.B1_SHAPES))


@pytest.mark.parametrize("name", papers.TABLE_2B4T)
def test_the_table_of_2b4t_has_the_energy_and_memory_of_its_linear_layers(name: str) -> None:
    row = papers.TABLE_2B4T[name]
    assert round(costs.energy(row.config).total, 3) == row.joules
    assert row.weights == pytest.approx(row.memory, rel=0.03)


@pytest.mark.parametrize("size", papers.B158_MEMORY)
def test_printed_memory_is_that_of_the_weights_and_as_much_more_on_both_sides(size: str) -> None:
    (full, ternary), weights = papers.B158_MEMORY[size], papers.weights(size)
    assert 0.4 < ternary - weights[1] < 1.6
    if full is not None:
        assert full - weights[0] == pytest.approx(ternary - weights[1], abs=0.1)


def test_the_shape_of_70b_is_that_of_65b() -> None:
    assert round(costs.parameters(papers.B158_SHAPES["70b"]).total / 1e9, 1) == 65.3
    assert round(costs.parameters(papers.B158_SHAPES["13b"]).total / 1e9, 1) == 13.0


def test_both_printed_batches_fit_and_one_sequence_more_does_not() -> None:
    cards = papers.card_memory()
    for model, batch in zip(papers.B158_MEMORY["70b"], papers.BATCHES.values(), strict=True):
        assert model is not None
        assert cards.batch(model) == batch
        assert model + (batch + 1) * cards.sequence > cards.usable >= model + batch * cards.sequence - 1e-9
    assert cards.usable < 160
    assert cards.cache < cards.sequence < 1.06 * cards.cache
