import os
import signal
import threading

import pytest

from bitnet_jax.training.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_a_request_and_the_second_would_end_the_process(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal is number
        assert [signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT)] == [signal.SIG_DFL, signal.SIG_DFL]


def test_handlers_are_put_back() -> None:
    def mine(number: int, frame: object) -> None:
        pass

    before = {number: signal.signal(number, mine) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
        after = [signal.getsignal(number) for number in before]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert after == [mine, mine]


def test_nothing_is_caught_in_another_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
