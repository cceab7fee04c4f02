"""What a terminal needs: text that does not command it, and Ctrl-C that ends one thing only."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_CONTROLS = _PICTURES | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def harmless(text: str) -> str:
    """`text` with a picture (U+2400 on, or U+FFFD) for every control character but newline and tab: no escape sequence is left."""
    return text.translate(_CONTROLS)


class Interrupt:
    """A context manager in which Ctrl-C is noted and does nothing else. In a thread other than the main one it notes nothing.

    Attributes:
        noted: whether there was one.
    """

    def __init__(self) -> None:
        self.noted = False

    def __enter__(self) -> Self:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._main:
            signal.signal(signal.SIGINT, signal.default_int_handler if self._before is None else self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.noted = True
