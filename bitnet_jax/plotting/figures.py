"""An empty figure, which every picture begins with, and the colours of the codes."""

from typing import Any

CODES = ("tab:blue", "0.75", "tab:red")
"""Colours of the codes -1, 0 and +1."""


def figure(width: float, height: float, title: str = "") -> Any:
    """A Figure of so many inches that pyplot knows nothing of, so that nothing is left in memory when it is dropped."""
    from matplotlib.figure import Figure

    found = Figure(figsize=(width, height), layout="constrained")
    if title:
        found.suptitle(title)
    return found
