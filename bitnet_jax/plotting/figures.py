"""An empty figure, which every picture begins with."""

from typing import Any


def figure(width: float, height: float, title: str = "") -> Any:
    """A Figure of so many inches that pyplot knows nothing of, so that nothing is left in memory when it is dropped."""
    from matplotlib.figure import Figure

    found = Figure(figsize=(width, height), layout="constrained")
    if title:
        found.suptitle(title)
    return found
