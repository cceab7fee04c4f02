"""The README's numbers are those of the result files."""

import json
import math

import numpy as np
import pytest

from bitnet_jax import costs
from bitnet_jax.config import Linear
from experiments import figures, papers, sizes, soak, tables
from experiments.configs import scaling
from experiments.fit import Law


def test_the_readme_is_what_the_results_say():
    """Run `python -m experiments.tables` when this fails."""
    text = (tables.ROOT / "README.md").read_text(encoding="utf-8")
    assert set(tables.TABLES) == {line.split()[2] for line in text.splitlines() if line.startswith("<!-- table:")}
    assert tables.render(text) == text


@pytest.mark.parametrize("name", sorted(tables.TABLES.keys() - set(tables.BY_FORMULA)))
def test_what_was_not_run_says_so(name, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "not run" in tables.TABLES[name]()


def test_a_wrong_number_is_put_right():
    text = "before\n<!-- table: throughput -->\n| 0.01 |\n<!-- end -->\nafter"
    assert tables.render(text) == f"before\n<!-- table: throughput -->\n{tables.throughput()}\n<!-- end -->\nafter"


def test_sizes_are_medians_and_a_ratio(tmp_path):
    def run(subject, pace):
        return {"subject": subject, "source": "a", "decode_tokens_per_second": pace, "peak_bytes": 2.5e8}

    runs = [run("bitnet-jax", pace) for pace in (50, 25, 20)] + [run("full precision in XLA, bfloat16", 10), run("bitnet-jax", 20)]
    (tmp_path / "700m.json").write_text(json.dumps({"runs": [{"subject": "bitnet-jax", "failed": "so"}, *runs]}))
    row = sizes.table(tmp_path).splitlines()[2]
    assert row == "| 700m | 45 (20–50) | not run | 100 (100–100) | not run | 2.22 | 1.23 | 0.25 | not run | 0.25 | 0.80 | 2.08 |"


def test_the_soak_counts_by_kind_and_moment_and_says_what_went_wrong(tmp_path):
    def kill(seconds, late=False):
        return {"kind": "kill one", "moment": "save", "seconds": seconds, "late": late}

    runs = [{"kills": 2, "codes": [0, 0], "equal": True}, {"kills": 1, "codes": [0, 0], "equal": False}, {"codes": [0, 1], "equal": True}]
    facts = {"steps": 9, "seed": 4, "environment": {"commit": None}, "kills": [kill(1.0), kill(9.0, True), kill(2.0)], "runs": runs}
    (tmp_path / "two-processes.json").write_text(json.dumps(facts))
    text = soak.table(tmp_path)
    assert "| kill one | while a checkpoint is written | 3 | 2.0 | 9.0 |" in text
    assert "| kill both | while they start | 0 |  |  |" in text
    assert "3 times in 3 runs of 9 steps, of which 1 had" in text
    assert "1 times a process hung" in text
    assert not soak.well(facts)
    assert not soak.well(facts | {"runs": runs[:1]})  # one hung
    assert soak.well({"kills": [kill(1.0)], "runs": runs[:1]})


@pytest.mark.parametrize("name", tables.BY_FORMULA)
def test_what_follows_from_formulas_needs_no_results(name, monkeypatch, tmp_path):
    text = tables.TABLES[name]()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.TABLES[name]() == text
    assert "not run" not in text


@pytest.mark.parametrize("line", ["| 13b | 3.275 | 0.09943 | 32.9 | 32.9 | 32.9 |", "| LLaMA-3.2-1B | 0.2577 | 0.258 | 1.95 | 2 |"])
def test_the_energy_table_has_formula_and_print(line):
    assert line in tables.energy().splitlines()


@pytest.mark.parametrize(
    "text",
    [
        "\n| 700m | 2.08 | 1.56 | 0.52 | 0.8 | 0.37 | 0.43 |\n",
        "\n| 3.9b |  | 8.93 |  | 2.38 | 1.47 | 0.91 |\n",
        " on both sides to 0.09 GB",
        "(b1.58, Table 3: 16 and 176): 16 and 176,",
        "17 of 18 to the printed digits",
    ],
)
def test_the_memory_table_has_print_weights_and_what_is_left_over(text):
    assert text in tables.memory()


def test_the_figures_of_formulas_hold_formula_and_print(tmp_path):
    left, ratios, table = figures.energy_figure().axes
    np.testing.assert_allclose(ratios.lines[0].get_ydata(), [papers.joules(size)[0] / papers.joules(size)[1] for size in papers.B1_SHAPES])
    assert list(ratios.lines[1].get_ydata()) == list(papers.B1_RATIOS.values())
    assert list(ratios.lines[2].get_ydata()) == list(papers.B158_RATIOS.values())
    # The same sizes stand at the same place, whatever they are taken from.
    assert set(ratios.lines[1].get_xdata()) | set(ratios.lines[2].get_xdata()) == set(ratios.lines[0].get_xdata())
    assert set(left.lines[1].get_xdata()) < set(left.lines[0].get_xdata())
    assert [bar.get_width() for bar in table.patches] == pytest.approx(list(table.lines[0].get_xdata()), rel=0.01)
    gb, rest, _ = figures.memory_figure().axes
    assert list(gb.lines[2].get_ydata()) == [papers.weights(size)[1] for size in papers.B158_SHAPES]
    assert list(gb.lines[3].get_ydata()) == [pair[1] for pair in papers.B158_MEMORY.values()]
    assert len(rest.lines[0].get_ydata()) == len(papers.B158_MEMORY) - 1
    for name, figure in (("energy", figures.energy_figure()), ("memory", figures.memory_figure())):
        figure.savefig(tmp_path / f"{name}.png")


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Results of the scaling experiment as its cells would leave them, by laws that are known."""
    laws = {Linear.BIT: Law(40.0, -0.2, 3.0), Linear.FULL: Law(30.0, -0.2, 2.9)}
    results = {}

    def result(cell):
        model, seed = cell.config.model, cell.config.seed
        size = costs.parameters(model).total
        best = 6e-3 if model.linear is Linear.BIT else 3e-3
        loss = float(laws[model.linear](size)) + 0.001 * (seed - 1) + abs(cell.config.optimizer.learning_rate - best)
        start = {"commit": "0123456789abcdef", "device": {"kind": "Zen"}, "cores": 2, "python": "3.13.0", "packages": {"jax": "0.12"}}
        numbers = {"loss": loss, "perplexity": 1.0, "bits_per_byte": 1.0}
        return {"validation": numbers, "starts": [start], "tokens": 1000, "training_seconds": 3600.0, "non_finite": 0}

    while new := [cell for cell in scaling.cells(results) if cell.name not in results]:
        results[new[0].name] = result(new[0])
    (tmp_path / "scaling").mkdir()
    for name, facts in results.items():
        (tmp_path / "scaling" / f"{name}.json").write_text(json.dumps(facts))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path / "scaling"


def test_the_scaling_table_has_every_size_and_the_laws_that_made_it(swept):
    text = tables.scaling()
    assert "not run" not in text
    assert "| 1m | 986,240 | 3 | 0.006 | 0.003 |" in text
    assert "| 10m | 9,251,840 | 1 |" in text
    fits = figures.scaling_fits(figures.scaling_losses(swept))
    assert fits["bitnet"].law.b == pytest.approx(-0.2, abs=0.02)
    assert f"| b1.58 | {fits['bitnet'].law.a:.4g} (" in text
    assert "runs of 1,000 tokens" in text


def test_a_size_that_is_not_finished_says_so(swept):
    for path in swept.glob("10m-*.json"):
        path.unlink()
    assert "| 10m | 9,251,840 | not run |" in tables.scaling()


def test_the_scaling_figure_is_drawn_with_and_without_a_fit(swept, tmp_path):
    figures.scaling_figure(swept).savefig(tmp_path / "whole.png")
    for size in ("10m", "3m", "1m", "0.5m"):
        for path in swept.glob(f"{size}-*.json"):
            path.unlink()
    assert figures.scaling_fits(figures.scaling_losses(swept)) is None
    figures.scaling_figure(swept).savefig(tmp_path / "part.png")
    for path in swept.glob("*.json"):
        path.unlink()
    assert figures.scaling_figure(swept) is None


def test_the_sweep_is_drawn_with_the_best_rate_ringed(swept, tmp_path):
    figure = figures.sweep_figure(swept)
    figure.savefig(tmp_path / "sweep.png")
    for axes, best in zip(figure.axes, (6e-3, 3e-3), strict=True):
        rings = axes.lines[1::2]
        assert len(rings) == len(scaling.SIZES)
        assert {line.get_xdata()[0] for line in rings} == {best}
        for curve, ring in zip(axes.lines[::2], rings, strict=True):
            assert ring.get_ydata()[0] == min(curve.get_ydata())
    for path in swept.glob("*.json"):
        path.unlink()
    assert figures.sweep_figure(swept) is None


def test_the_example_meets_b1s_own_curves_and_what_they_predict(tmp_path):
    fits = figures.b1_fits()
    assert fits["bitnet"].law.b == pytest.approx(-0.3910, abs=1e-3)
    assert fits["twin"].law.b == pytest.approx(-0.3994, abs=1e-3)
    for one, c in zip(fits.values(), (3.7862, 3.7330), strict=True):
        assert one.law.c / math.log(2) == pytest.approx(c, abs=1e-3)
    assert float(fits["bitnet"].law(100e9) - fits["twin"].law(100e9)) / math.log(2) == pytest.approx(0.09, abs=5e-3)  # section 4.1
    for size, bits in figures.B1_LARGER.items():
        assert float(fits["bitnet"].law(size)) / math.log(2) == pytest.approx(bits, abs=0.025)
    figures.b1_figure().savefig(tmp_path / "b1.png")
    (axes,) = figures.coefficients_figure(fits, "Example").axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), fits["bitnet"].draws[:, 2])


def test_the_ablation_table_compares_equal_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "ablations").mkdir()
    losses = {"default": (4.0, 5.0, 6.0), "weights-sign": (4.2, 5.2, 6.2), "twin": (3.9, 4.9)}
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            start = {"commit": None, "device": {"kind": "Zen"}, "cores": 2, "python": "3.13.0", "packages": {"jax": "0.12"}}
            also = {"ternarised": {"loss": 9.0}} if name == "twin" else {}
            facts = {"validation": {"loss": loss}, "also": also, "starts": [start], "tokens": 1, "training_seconds": 1.0, "non_finite": 0}
            (tmp_path / "ablations" / f"{name}-seed{seed}.json").write_text(json.dumps(facts))
    text = tables.ablations()
    assert "| weights-sign | 5.2000 ± 1.0000 | +0.2000 ± 0.0000 | 3 | |" in text
    assert "| twin | 4.4000 ± 0.7071 | -0.1000 ± 0.0000 | 2 | |" in text
    assert "| twin, ternary after training | 9.0000 ± 0.0000 | +4.5000 ± 0.7071 | 2 | |" in text
    assert "| norm-none | not run |" in text
    assert "| rate-0.006 | 5.0000 ± 1.0000 |  | 3 | |" in text
