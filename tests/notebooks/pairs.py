"""A notebook's .ipynb, which is made from its .py: the same cells, without outputs.

    python -m tests.notebooks.pairs        makes every .ipynb in notebooks/ anew (`make notebooks`)

What was changed in Jupyter is brought into the .py before, by `jupytext --to py:percent notebooks/NAME.ipynb`.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def ipynb(path: Path) -> str:
    """The text of the .ipynb that stands beside the notebook `path`. It follows from the .py and jupytext's version alone."""
    import jupytext

    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # jupytext's own are random
    return jupytext.writes(notebook, fmt="ipynb") + "\n"


def main() -> None:
    """Writes all of them."""
    for path in NOTEBOOKS:
        path.with_suffix(".ipynb").write_text(ipynb(path), encoding="utf-8")


if __name__ == "__main__":
    main()
