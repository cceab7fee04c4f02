"""Progress of what happens before the first step (download, tokenizer, tokens), and of conversions."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bitnet_jax.data.cache import Progress


@contextmanager
def stages() -> Iterator[Progress]:
    """A function (stage, done, total) that shows a bar a stage on a terminal, and a line a stage elsewhere."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def line(stage: str, done: int, total: int | None) -> None:
            del done, total
            if stage not in seen:
                seen.add(stage)
                print(stage, file=sys.stderr, flush=True)

        yield line
        return

    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks = {}
        last = 0.0

        def bar(stage: str, done: int, total: int | None) -> None:
            nonlocal last
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            elif time.monotonic() - last < 0.1 and done != total:
                return
            last = time.monotonic()
            bars.update(tasks[stage], completed=done, total=total)

        yield bar
