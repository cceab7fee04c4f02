"""The README's numbers are those of the result files."""

import pytest

from experiments import tables


def test_the_readme_is_what_the_results_say():
    """Run `python -m experiments.tables` when this fails."""
    text = (tables.ROOT / "README.md").read_text(encoding="utf-8")
    assert set(tables.TABLES) == {line.split()[2] for line in text.splitlines() if line.startswith("<!-- table:")}
    assert tables.render(text) == text


@pytest.mark.parametrize("name", tables.TABLES)
def test_what_was_not_run_says_so(name, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "not run" in tables.TABLES[name]()


def test_a_wrong_number_is_put_right():
    text = "before\n<!-- table: throughput -->\n| 0.01 |\n<!-- end -->\nafter"
    assert tables.render(text) == f"before\n<!-- table: throughput -->\n{tables.throughput()}\n<!-- end -->\nafter"
