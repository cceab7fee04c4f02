"""What orbax leaves behind when it fails, kept from the user, who is told in one line."""

import functools
import gc
import logging
import sys
from collections.abc import Callable
from typing import Any

import jax


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """(what `function` returned, None), or (None, why it failed in one line). For reading, where damage surfaces as any exception.

    Raises:
        JaxRuntimeError: of `function`; a device that is full or a process that was lost says nothing about what is read.
    """
    logger = logging.getLogger("asyncio")
    level, hook = logger.level, sys.unraisablehook
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        try:
            return function(), None
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as failure:  # noqa: BLE001 - JSON, key, value and bare Exception
            reason = first_line(failure)
        # Orbax abandons the reads beside the one that failed; when they are collected, each would print a traceback.
        gc.collect()
        return None, reason
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def first_line(error: BaseException) -> str:
    """What an error says first, without orbax's and TensorStore's details."""
    lines = str(error).splitlines()
    return lines[0].split(" See full TensorStore details")[0].rstrip(". ")[:200] if lines and lines[0] else type(error).__name__


def quieten() -> int:
    """Silences absl, through which orbax logs tracebacks of errors that are reported in one line; returns the level it had."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    return level


def ignore_abandoned_writes() -> None:
    """Silences, for the rest of the process, what the writes beside a failed one say when they end.

    A failed save closes its event loop while other arrays are still on their way to disk. Each of them then finds the loop closed, at
    any later moment and on a thread of its own, and would print a traceback beside the one line that says what happened.
    """
    hook = sys.unraisablehook
    if not (isinstance(hook, functools.partial) and hook.func is _unless_loop_closed):
        sys.unraisablehook = functools.partial(_unless_loop_closed, hook)


def _unless_loop_closed(hook: Callable[[Any], object], unraisable: Any) -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        hook(unraisable)
