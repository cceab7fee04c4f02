"""Runs a notebook's .py cell by cell, as Jupyter does: what a cell ends with is shown, and a figure is drawn for that.

    SMOKE=1 python tests/notebooks/cells.py notebooks/7_kernels.py

Says how many figures were drawn.
"""

import ast
import io
import re
import sys
from pathlib import Path
from typing import Any


def cells(text: str) -> list[str]:
    """The code cells of a notebook in percent format, each with as many empty lines before it as it has in the file."""
    marks = [*re.finditer(r"^# %%.*\n", text, re.MULTILINE)]
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [
        "\n" * text.count("\n", 0, mark.end()) + text[mark.end() : end]
        for mark, end in zip(marks, ends, strict=True)
        if "[markdown]" not in mark[0]
    ]


def run(path: Path) -> int:
    """Runs all cells; how many figures they showed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    figures = 0
    for source in cells(path.read_text(encoding="utf-8")):
        if not (body := ast.parse(source).body):
            continue
        *statements, last = body
        shown = None
        if isinstance(last, ast.Expr):
            shown = ast.Expression(last.value)
        else:
            statements.append(last)
        exec(compile(ast.Module(statements, []), path, "exec"), names)
        value = eval(compile(shown, path, "eval"), names) if shown else None
        if hasattr(value, "savefig"):
            value.savefig(io.BytesIO())
            figures += 1
        elif value is not None:
            sys.stdout.write(f"{value}\n")
    return figures


if __name__ == "__main__":
    sys.stdout.write(f"figures: {run(Path(sys.argv[1]))}\n")
