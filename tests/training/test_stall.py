"""Batches that do not come, and those that do."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bitnet_jax.errors import RunError, UserError
from bitnet_jax.training.stall import Timely


class Source:
    def __init__(self, answers: Iterator[Any]) -> None:
        self.answers, self.given = answers, 0

    def __next__(self) -> Any:
        answer = next(self.answers)
        self.given += 1
        return answer

    def get_state(self) -> int:
        return self.given


def test_batches_come_in_order_and_none_is_fetched_before_it_is_asked_for() -> None:
    timely = Timely(Source(iter([1, 2, 3])), 60, "numbers")
    assert (next(timely), timely.get_state(), next(timely), timely.get_state()) == (1, 1, 2, 2)
    timely.close()


def test_a_patience_of_ages_is_no_error() -> None:
    timely = Timely(Source(iter([1])), 1e12, "numbers")
    assert next(timely) == 1
    timely.close()


def test_what_the_source_raises_is_raised() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise UserError("the file is gone")

    timely = Timely(Source(broken()), 0, "numbers")
    assert next(timely) == 1
    with pytest.raises(UserError, match="the file is gone"):
        next(timely)
    with pytest.raises(StopIteration):
        next(timely)
    timely.close()


def test_a_source_that_hangs_is_named() -> None:
    release = threading.Event()

    def hanging() -> Iterator[int]:
        yield 1
        release.wait(60)
        yield 2

    timely = Timely(Source(hanging()), 0.2, "source=hf:slow")
    assert next(timely) == 1
    with pytest.raises(RunError, match=r"no batch from source=hf:slow for 0.2 s \(stall_timeout\): it hangs"):
        next(timely)
    release.set()
    timely.close()
