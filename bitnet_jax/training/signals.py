"""Stopping a run from outside: the first SIGTERM or SIGINT asks, the second ends the process.

Python looks at signals between its own steps, so inside a long call, such as compiling, the first waits until that returns. From the
moment it was seen the second needs no Python.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A context manager that catches SIGTERM and SIGINT, and puts back what handled them before.

    Python lets only the main thread handle signals; in another thread nothing is caught.

    Attributes:
        signal: the signal that was caught; None while there was none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._caught) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        del frame
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        if self.signal is not None:  # both came before Python looked: this is the second
            os.kill(os.getpid(), number)
        self.signal = signal.Signals(number)
