"""Where a run's numbers go: metrics.jsonl always, TensorBoard event files, Weights & Biases."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from bitnet_jax.config import TrainConfig, to_dict
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.training import run_directory

Line = dict[str, Any]
"""One line of metrics.jsonl: "kind" ("train" or "evaluation"), "step" and numbers. A number that is not finite is null."""


class Sink(Protocol):
    """Takes log lines."""

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


class Logs:
    """All sinks of one run; a context manager."""

    def __init__(self, directory: Path, config: TrainConfig, step: int) -> None:
        """Opens the sinks that `config.output` asks for.

        Args:
            directory: the run's folder.
            config: the run's configuration.
            step: steps done; what was logged past it is dropped, for those steps will be done again.

        Raises:
            UserError: a sink needs a package that is not installed.
            RunError: a file cannot be written.
        """
        self._sinks: list[Sink] = []
        try:
            self._sinks.append(JsonLines(directory / run_directory.METRICS, step))
            if config.output.tensorboard:
                self._sinks.append(TensorBoard(directory / run_directory.TENSORBOARD, step))
            if config.output.wandb_project is not None:
                self._sinks.append(_WeightsAndBiases(config.output.wandb_project, directory, config))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.close()

    def write(self, line: Line) -> None:
        """Writes `line` to every sink; raises RunError where a file cannot be written."""
        line = _finite(line)
        for sink in self._sinks:
            sink.write(line)


class JsonLines:
    """metrics.jsonl: one JSON object a line, each flushed, each step once."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        if path.exists():
            run_directory.write(path, "".join(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step))
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritten(path, error) from error

    def write(self, line: Line) -> None:
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritten(self._path, error) from error

    def close(self) -> None:
        _close(self._file)


class TensorBoard:
    """Event files, written in the calling thread so that a full disk is an error here and not a dead thread somewhere."""

    def __init__(self, directory: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._directory = directory
        self._events: Any = event_pb2  # their classes are made on import, out of sight of a type checker
        self._summaries: Any = summary_pb2
        try:
            directory.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")
            # Tells TensorBoard to forget what an earlier start logged from this step on.
            self._write(step + 1, session_log=self._events.SessionLog(status=self._events.SessionLog.START))
        except OSError as error:
            raise _unwritten(directory, error) from error

    def write(self, line: Line) -> None:
        values = [self._summaries.Summary.Value(tag=f"{line['kind']}/{name}", simple_value=value) for name, value in numbers(line)]
        try:
            self._write(line["step"], summary=self._summaries.Summary(value=values))
        except OSError as error:
            raise _unwritten(self._directory, error) from error

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()

    def close(self) -> None:
        _close(self._writer)


class _WeightsAndBiases:
    def __init__(self, project: str, directory: Path, config: TrainConfig) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an extra
        except ImportError:
            raise UserError(f"wandb_project={project} needs the package wandb: install bitnet-jax[wandb]") from None
        place = directory / "wandb.json"
        if not place.exists():  # one W&B run for all starts of this run
            run_directory.write(place, json.dumps({"id": wandb.util.generate_id()}) + "\n")
        identity = json.loads(place.read_text(encoding="utf-8"))["id"]
        self._run = wandb.init(
            project=project, dir=str(directory), id=identity, resume="allow", name=directory.name, config=to_dict(config)
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run goes back a few steps, which W&B's own counter refuses

    def write(self, line: Line) -> None:
        self._run.log({"step": line["step"], **{f"{line['kind']}/{name}": value for name, value in numbers(line)}})

    def close(self) -> None:
        self._run.finish()


def read(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl; a last line that was cut off in writing is left out.

    Raises:
        UserError: the file cannot be read, or another line is not a log line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    *whole, _ = text.split("\n")
    lines: list[Line] = []
    for number, row in enumerate(whole, 1):
        try:
            line = json.loads(row)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise UserError(f"{path} line {number} is not a log line: must be a JSON object with a step")
        lines.append(line)
    return lines


def numbers(line: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a line with their names, those of nested objects as 'outer/inner'; without kind and step."""
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, Mapping):
            found += numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and not (name == "step" and not prefix):
            found.append((prefix + name, float(value)))
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unwritten(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be written: {error.strerror or error}")


def _close(file: Any) -> None:
    with contextlib.suppress(OSError):  # what could not be flushed was reported by the write that failed
        file.close()
