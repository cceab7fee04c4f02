"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere, or warnings only."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from bitnet_jax.config import TrainConfig
from bitnet_jax.training.step import StepMemory


class RunStart(NamedTuple):
    """How a run begins.

    Attributes:
        config: the run's configuration.
        directory: the run's folder.
        step: steps done by earlier starts; 0 where it is new.
        parameters: latent parameters of the model.
        device: name of the device.
    """

    config: TrainConfig
    directory: Path
    step: int
    parameters: int
    device: str


class Reporter(Protocol):
    """Is told what happens in a run. Called by the training loop, in its thread; it must not take long."""

    def started(self, start: RunStart) -> None:
        """The run is about to compile its step."""
        ...

    def compiled(self, seconds: float, memory: StepMemory | None) -> None:
        """The step is compiled, and will need so much memory."""
        ...

    def advanced(self, step: int) -> None:
        """`step` steps are dispatched."""
        ...

    def logged(self, line: Mapping[str, Any]) -> None:
        """A line was written to metrics.jsonl."""
        ...

    def saving(self, step: int) -> None:
        """A checkpoint is being written."""
        ...

    def warned(self, message: str) -> None:
        """Something is wrong, and the run goes on."""
        ...

    def closed(self) -> None:
        """The run is over, well or not; nothing is told after this."""
        ...


class Quiet:
    """Passes warnings to the standard `logging` and nothing else: what a library does when nobody listens."""

    def started(self, start: RunStart) -> None:
        del start

    def compiled(self, seconds: float, memory: StepMemory | None) -> None:
        del seconds, memory

    def advanced(self, step: int) -> None:
        del step

    def logged(self, line: Mapping[str, Any]) -> None:
        del line

    def saving(self, step: int) -> None:
        del step

    def warned(self, message: str) -> None:
        logging.getLogger("bitnet_jax").warning(message)

    def closed(self) -> None:
        pass


class Plain:
    """One line of text for everything but single steps."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._steps = 0

    def started(self, start: RunStart) -> None:
        self._steps = start.config.steps
        self._say(describe(start))

    def compiled(self, seconds: float, memory: StepMemory | None) -> None:
        self._say(f"compiled the training step in {seconds:.1f} s{needs(memory)}")

    def advanced(self, step: int) -> None:
        del step

    def logged(self, line: Mapping[str, Any]) -> None:
        self._say(f"step {line['step']}/{self._steps}  {summarize(line)}")

    def saving(self, step: int) -> None:
        self._say(f"step {step}: writing a checkpoint")

    def warned(self, message: str) -> None:
        self._say(f"warning: {message}")

    def closed(self) -> None:
        self._stream.flush()

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class Bar:
    """A rich progress bar with loss, tokens/s and the time that is left; evaluations and warnings stand above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(file=stream), refresh_per_second=4)
        self._task = self._progress.add_task("compiling", total=None, numbers="")

    def started(self, start: RunStart) -> None:
        self._say(describe(start))
        self._progress.update(self._task, total=start.config.steps, completed=start.step)
        self._progress.start()

    def compiled(self, seconds: float, memory: StepMemory | None) -> None:
        # The clock of the estimate starts here: compilation is not the pace of the steps.
        task = self._progress.tasks[0]
        self._progress.reset(self._task, total=task.total, completed=int(task.completed), description="training", numbers="")
        self._say(f"compiled the training step in {seconds:.1f} s{needs(memory)}")

    def advanced(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def logged(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "train":
            self._progress.update(self._task, numbers=summarize(line))
        else:
            self._say(f"step {line['step']}: {summarize(line)}")

    def saving(self, step: int) -> None:
        del step

    def warned(self, message: str) -> None:
        self._say(f"warning: {message}")

    def closed(self) -> None:
        self._progress.stop()

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def reporter_for(stream: TextIO = sys.stderr) -> Reporter:
    """A bar where `stream` is a terminal, plain lines elsewhere."""
    return Bar(stream) if stream.isatty() else Plain(stream)


def describe(start: RunStart) -> str:
    """One line: what is trained, where, on what, and from which step."""
    config = start.config
    begun = f"resuming at step {start.step} of {config.steps}" if start.step else f"{config.steps} steps"
    batch = f"{config.batch_size} x {config.data.seq_len} tokens"
    return f"{start.directory}: {begun} of {batch}, {start.parameters:,} parameters ({config.model.linear.value}), {start.device}"


def needs(memory: StepMemory | None) -> str:
    """What a step needs, as the end of a line."""
    if memory is None:
        return ""
    of = "" if memory.limit is None else f", of {_bytes(memory.limit)}"
    return f"; each device holds {_bytes(memory.state)} of state and batch, and {_bytes(memory.temporary)} within a step{of}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def summarize(line: Mapping[str, Any]) -> str:
    """The numbers of a log line that a person follows."""
    if line["kind"] != "train":
        return "  ".join(f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float))
    parts = [f"loss {_number(line['loss'], '.4f')}", f"lr {line['learning_rate']:.2e}"]
    if line["tokens_per_second"] is not None:
        parts.append(f"{line['tokens_per_second']:,.0f} tok/s")
    if line["model_flop_utilisation"] is not None:
        parts.append(f"MFU {line['model_flop_utilisation']:.1%}")
    if line["non_finite"]:
        parts.append(f"{line['non_finite']} not finite")
    return "  ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
