"""The fit of L(N) = a N^b + c finds the law that made the losses."""

import numpy as np
import pytest

from experiments.fit import Law, fit

SIZES = np.array([1e5, 2e5, 5e5, 1e6, 3e6, 1e7])
LAWS = [Law(40.0, -0.25, 3.0), Law(1465.0, -0.391, 2.624), Law(8.0, -0.1, 0.5), Law(3e4, -0.9, 1.5)]


def losses(law: Law, deviation: float = 0.0, seeds: int = 1, seed: int = 0) -> dict[int, list[float]]:
    rng = np.random.default_rng(seed)
    return {int(size): list(law(size) + deviation * rng.standard_normal(seeds)) for size in SIZES}


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_exact_losses_give_their_law(law: Law) -> None:
    found = fit(losses(law), draws=20)
    np.testing.assert_allclose(found.law, law, rtol=1e-5)
    assert found.residual < 1e-6
    assert found.seed_deviation == 0
    for name, (low, high) in found.interval().items():
        np.testing.assert_allclose([low, high], getattr(law, name), rtol=1e-4)


def test_the_fit_is_the_least_of_all_squares() -> None:
    data = losses(Law(40.0, -0.25, 3.0), deviation=0.02, seeds=3)
    means = np.array([np.mean(seeds) for seeds in data.values()])

    def squares(law: Law) -> float:
        return float(((means - law(SIZES)) ** 2).sum())

    found = fit(data, draws=1).law
    for name in Law._fields:
        for change in (0.999, 1.001):
            assert squares(found._replace(**{name: getattr(found, name) * change})) > squares(found)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    law = Law(40.0, -0.25, 3.0)
    covered = []
    for trial in range(60):
        interval = fit(losses(law, deviation=0.01, seeds=3, seed=trial), draws=200, seed=trial).interval(0.9)
        covered.append(interval["b"][0] <= law.b <= interval["b"][1])
    assert 0.78 <= np.mean(covered) <= 1.0  # 0.9 within three standard errors


def test_seed_deviation_is_pooled_and_sizes_with_one_seed_have_it_too() -> None:
    data = losses(Law(40.0, -0.25, 3.0))
    data[100_000] = [6.0, 6.2]
    found = fit(data, draws=400)
    assert found.seed_deviation == pytest.approx(np.std([6.0, 6.2], ddof=1))
    low, high = found.band(np.array([1e7]))
    assert high[0] - low[0] > found.seed_deviation


def test_the_same_seed_gives_the_same_intervals() -> None:
    data = losses(Law(40.0, -0.25, 3.0), deviation=0.01, seeds=3)
    np.testing.assert_array_equal(fit(data, draws=20).draws, fit(data, draws=20).draws)
    assert (fit(data, draws=20, seed=1).draws != fit(data, draws=20).draws).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({1: [2.0], 2: [1.0]}, "at least 3"),
        ({1: [2.0], 2: [1.0], 3: []}, "every size"),
        ({1: [2.0], 2: [1.0], 3: [float("nan")]}, "every size"),
        ({0: [2.0], 2: [1.0], 3: [1.0]}, "every size"),
    ],
)
def test_unfit_losses_are_refused(data: dict[int, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(data)
