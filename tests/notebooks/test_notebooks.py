"""Every notebook runs from its first cell to its last, and its .ipynb is what its .py says, without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.notebooks.cells import cells
from tests.notebooks.pairs import NOTEBOOKS, ROOT, ipynb

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


@each_notebook
@pytest.mark.slow
def test_it_runs_in_smoke_mode(path: Path) -> None:
    # Warnings are errors, as in every test.
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "notebooks" / "cells.py"), str(path)]
    environment = {**os.environ, "SMOKE": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert int(ended.stdout.split()[-1]) > 0, ended.stdout


@each_notebook
def test_the_first_cell_of_code_has_the_switch_and_installs_the_package_where_it_is_missing(path: Path) -> None:
    first = cells(path.read_text(encoding="utf-8"))[0]
    assert "SMOKE = " in first
    assert '"pip", "install"' in first


@each_notebook
def test_the_pair_is_in_step(path: Path) -> None:
    """Run `make notebooks` when this fails."""
    assert path.with_suffix(".ipynb").read_text(encoding="utf-8") == ipynb(path)


@each_notebook
def test_there_are_no_outputs(path: Path) -> None:
    notebook = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
