"""The scaling law L(N) = a N^b + c, fitted by least squares without anything but numpy, with bootstrap intervals.

Source: BitNet b1 (2310.11453), section 4.1: "L(N) = a N^b + c", fitted to losses of one number of tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_EXPONENTS = np.linspace(-2.0, -0.02, 397)
_HALVINGS = 40


class Law(NamedTuple):
    """L(N) = a N^b + c.

    Attributes:
        a: loss above `c` of a model with one parameter.
        b: exponent, negative.
        c: loss that no size gets below.
    """

    a: float
    b: float
    c: float

    def __call__(self, parameters: np.ndarray | float) -> np.ndarray:
        """Loss at `parameters` (N)."""
        return self.a * np.asarray(parameters, np.float64) ** self.b + self.c


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law and what is known of it.

    Attributes:
        law: the least-squares fit to the means of the sizes.
        draws: laws [draws, 3] fitted to losses drawn anew.
        residual: root of the sum of squared residuals over (sizes - 3) degrees of freedom; 0 for three sizes.
        seed_deviation: standard deviation over seeds, pooled over the sizes with several; 0 where no size has.
    """

    law: Law
    draws: np.ndarray
    residual: float
    seed_deviation: float

    def interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Percentile interval of each coefficient."""
        low, high = np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(Law._fields)}

    def band(self, parameters: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Percentile interval of L at each of `parameters`."""
        losses = np.stack([Law(*draw)(parameters) for draw in self.draws])
        low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


def fit(losses: dict[int, list[float]], draws: int = 1000, seed: int = 0) -> Fit:
    """Fits the law to losses by size, N → one loss a seed.

    The law minimises the sum over sizes of (mean loss - L(N))^2: every size counts the same, whatever its number of seeds. For a given b
    the best a and c are those of a straight line through (N^b, loss); b is looked for on a grid from -2 to -0.02 and then between the
    neighbours of the best. A fit whose b stands at an end of that range says that the sizes do not decide it.

    Intervals are of a parametric bootstrap: `draws` times the mean of each size is drawn from a normal distribution about L(N) with
    variance s^2 / n + m^2 and the law is fitted anew. s is the seed deviation (so a size with one seed has the others' spread), n the
    seeds of the size, m^2 = max(0, residual^2 - mean of s^2 / n): how far the sizes are off the law beyond their seeds.

    Args:
        losses: at least three sizes, each with at least one finite loss.
        draws: fits of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than three sizes, a size without losses, or a loss or size that is not positive and finite.
    """
    if len(losses) < 3:
        raise ValueError(f"{len(losses)} sizes: must be at least 3 for three coefficients")
    values = [value for size in losses for value in (size, *losses[size])]
    if any(not seeds for seeds in losses.values()) or not all(np.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"losses={losses}: every size must have positive, finite losses")
    sizes = np.array(sorted(losses), np.float64)
    groups = [np.asarray(losses[int(size)], np.float64) for size in sizes]
    means, seeds = np.array([group.mean() for group in groups]), np.array([len(group) for group in groups])
    law = _least_squares(sizes, means[None])[0]
    freedom = int((seeds - 1).sum())
    variance = sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom if freedom else 0.0
    left = len(sizes) - 3
    residual = ((means - Law(*law)(sizes)) ** 2).sum() / left if left else 0.0
    spread = np.sqrt(variance / seeds + max(0.0, residual - float(np.mean(variance / seeds))))
    drawn = Law(*law)(sizes) + spread * np.random.default_rng(seed).standard_normal((draws, len(sizes)))
    return Fit(
        law=Law(*(float(value) for value in law)),
        draws=_least_squares(sizes, drawn),
        residual=float(np.sqrt(residual)),
        seed_deviation=float(np.sqrt(variance)),
    )


def _least_squares(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """(a, b, c) [rows, 3] of losses [rows, sizes], each row by itself."""
    errors = np.stack([_line(sizes, losses, np.full(len(losses), b))[1] for b in _EXPONENTS])
    best = errors.argmin(axis=0)
    low, high = _EXPONENTS[np.maximum(best - 1, 0)], _EXPONENTS[np.minimum(best + 1, len(_EXPONENTS) - 1)]
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(_HALVINGS):  # golden section, in all rows at once
        left, right = high - golden * (high - low), low + golden * (high - low)
        first = _line(sizes, losses, left)[1] < _line(sizes, losses, right)[1]
        low, high = np.where(first, low, left), np.where(first, right, high)
    b = (low + high) / 2
    (a, c), _ = _line(sizes, losses, b)
    return np.stack([a, b, c], axis=1)


def _line(sizes: np.ndarray, losses: np.ndarray, b: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Best a and c for each row's exponent, and the sum of squared residuals. N is taken relative to its geometric mean, which keeps
    N^b near 1 and the sums exact."""
    unit = np.exp(np.log(sizes).mean())
    x = (sizes / unit) ** b[:, None]
    x_mean, y_mean = x.mean(1, keepdims=True), losses.mean(1, keepdims=True)
    slope = ((x - x_mean) * (losses - y_mean)).sum(1) / ((x - x_mean) ** 2).sum(1)
    constant = y_mean[:, 0] - slope * x_mean[:, 0]
    error = ((slope[:, None] * x + constant[:, None] - losses) ** 2).sum(1)
    return (slope / unit**b, constant), error
