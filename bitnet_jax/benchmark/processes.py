"""A measurement's process: on so many cores, and no more memory or time counted than its own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bitnet_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: exit code; -N where signal N ended it.
        output: what it wrote to standard output.
        errors: what it wrote to standard error.
        seconds: from its start to its end.
        peak_bytes: its largest resident memory.
    """

    code: int
    output: str
    errors: str
    seconds: float
    peak_bytes: int

    @property
    def last_line(self) -> str:
        """The last line that says something, on standard error or else on standard output."""
        lines = [line.strip() for text in (self.output, self.errors) for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


def cores() -> list[int]:
    """The cores that this process may use. Raises UserError on a system that cannot say or bind."""
    if sys.platform != "linux":
        raise UserError(f"bench needs Linux, which can bind a process to cores: this is {sys.platform}")
    return sorted(os.sched_getaffinity(0))


def run(command: Sequence[str], threads: int, environment: Mapping[str, str] | None = None) -> Ended:
    """Runs a process to its end on the first `threads` cores; interrupted, it ends the process and all that it started.

    Args:
        command: program and arguments.
        threads: number of cores.
        environment: variables to set beside those of this process.
    """
    allowed = cores()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        begun = time.monotonic()
        process = None
        try:
            with _signals_later():  # one in between would leave a process that nobody knows
                os.sched_setaffinity(0, allowed[:threads])  # inherited before the program's first instruction
                try:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=errors,
                        env={**os.environ, **(environment or {})},
                        start_new_session=True,  # Ctrl-C is for this process to handle
                    )
                finally:
                    os.sched_setaffinity(0, allowed)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            if process is not None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ended(code=process.returncode, output=texts[0], errors=texts[1], seconds=seconds, peak_bytes=usage.ru_maxrss * 1024)


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Puts off SIGINT and SIGTERM to its end."""
    if threading.current_thread() is not threading.main_thread():  # where Python handles none
        yield
        return
    caught: list[int] = []
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in caught:
            signal.raise_signal(number)
