"""What the tests read from a picture."""

import io
from typing import Any


def drawn(figure: Any) -> Any:
    """The figure, after it was drawn; what cannot be drawn warns or raises then."""
    figure.savefig(io.BytesIO())
    return figure


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def heights(axes: Any) -> dict[str, list[float]]:
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")}
