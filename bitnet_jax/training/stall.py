"""Batches that come in time, or an error that names where they should come from."""

import queue
import threading
from typing import Any

from bitnet_jax.errors import RunError


class Timely:
    """An iterator over batches that waits for each no longer than `seconds`.

    Batches are fetched in a thread of its own, one when it is asked for, so that the state of `data` is that of what was handed out.
    """

    def __init__(self, data: Any, seconds: float, source: str) -> None:
        """`source` is what the error calls the data; `seconds` of 0 waits for ever."""
        self._data, self._seconds, self._source = data, seconds, source
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        # A daemon: a source that hangs must not keep the process from ending.
        threading.Thread(target=self._fetch, name="batches", daemon=True).start()

    def __next__(self) -> Any:
        """The next batch, or what the source raises.

        Raises:
            RunError: it did not come in time.
        """
        self._asked.put(True)
        try:
            batch, error = self._answers.get(timeout=min(self._seconds, threading.TIMEOUT_MAX) or None)
        except queue.Empty:
            late = f"no batch from {self._source} for {self._seconds:g} s"
            raise RunError(f"{late} (stall_timeout): it hangs, or is slower than that") from None
        if error is not None:
            raise error
        return batch

    def get_state(self) -> Any:
        """Where the source stands."""
        return self._data.get_state()

    def close(self) -> None:
        """Ends the thread, once the source lets go of it."""
        self._asked.put(False)

    def _fetch(self) -> None:
        while self._asked.get():
            try:
                self._answers.put((next(self._data), None))
            except BaseException as error:  # noqa: BLE001 - StopIteration and all else is the caller's
                self._answers.put((None, error))
