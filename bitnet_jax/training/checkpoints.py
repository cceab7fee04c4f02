"""Checkpoints of a run: written in the background, whole or not at all, verified by content when they are read.

A checkpoint of step n is the folder `checkpoints/n`, an orbax composite of three items:

    params     the latent parameters
    optimizer  step, moments and counters
    meta       JSON: step, state of the data, configuration, and a checksum of every array

The file system's own errors and orbax's are found by orbax; a flipped bit in the data of an array is not, hence the checksums.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax

from bitnet_jax import orbax_errors
from bitnet_jax.config import TrainConfig, to_dict
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.training import distributed
from bitnet_jax.training.checksums import checksums, json_digest
from bitnet_jax.training.step import Params, TrainState

Warn = Callable[[str], None]
TEMPORARY = ".orbax-checkpoint-tmp"
"""What orbax puts behind the name of a checkpoint until it is whole."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` found.

    Attributes:
        state: state of training after `step` steps.
        data: state of the data iterator, as `save` was given it.
        config: the configuration that the checkpoint was written with, as JSON values.
        step: steps done.
    """

    state: TrainState
    data: Any
    config: Any
    step: int


class Checkpoints:
    """The checkpoints of one run, for the one process that writes them; a context manager that waits for the last write.

    Raises, in every method that writes:
        RunError: a checkpoint could not be written, such as for want of disk space. Those written before are kept.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        """Opens `directory`, makes it if need be, and removes what an interrupted save left there.

        Args:
            directory: the run's `checkpoints` folder.
            keep: newest checkpoints to keep.
        """
        self.directory = directory
        self._absl_level = orbax_errors.quieten()
        orbax_errors.ignore_abandoned_writes()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._manager = _open(directory, keep)
        except OSError as error:
            raise RunError(f"{directory} cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None or not distributed.joined():  # a save under way may wait for a process that is gone
                self._manager.close()
        except Exception as failure:  # orbax passes on whatever its threads met, and raises bare Exception itself
            if error is None:
                raise self._unwritten("the last checkpoint", failure) from failure
        finally:
            logging.getLogger("absl").setLevel(self._absl_level)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints at hand, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Any, config: TrainConfig) -> None:
        """Copies `state` off the device and begins to write it; returns before it is on disk. `state` may be donated afterwards.

        Args:
            state: after a whole number of steps.
            data: state of the data iterator at the same point; JSON values.
            config: the run's configuration.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        items = _items(state)
        content = {"step": step, "data": data, "config": to_dict(config), "checksums": checksums(items)}
        meta = {"content": content, "digest": json_digest(content)}
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        try:
            # Forced, for orbax would else pass over a save, without a word, that it thinks is not due.
            self._manager.save(step, args=ocp.args.Composite(**saves, meta=ocp.args.JsonSave(meta)), force=True)
        except Exception as failure:
            raise self._unwritten(f"checkpoint {step} or the one before it", failure) from failure

    def wait(self) -> None:
        """Returns when every checkpoint is on disk."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as failure:
            raise self._unwritten("the last checkpoint", failure) from failure

    def restore(self, target: TrainState, warn: Warn) -> Restored | None:
        """The newest whole checkpoint; None where there is none at all.

        Damaged newer ones are named to `warn` and moved to the folder `damaged` beside the checkpoints, for their steps will be
        written again.

        Args:
            target: shapes, types and shardings that the state must have.
            warn: called with one line for each damaged checkpoint.

        Raises:
            UserError: every checkpoint is damaged.
        """
        steps = self.steps
        read = _newest_whole(self.directory, steps, lambda step: _read(self._manager, step, _items(target)), warn)
        if read is None:
            return None
        items, content = read
        step = content["step"]
        newer = [name for name in steps if name > step]
        if newer:
            distributed.led(lambda: [_set_aside(self.directory / str(name)) for name in newer])
            self._manager.reload()
        state = TrainState(params=items["params"], **items["optimizer"])
        return Restored(state, content["data"], content["config"], step)

    def _unwritten(self, what: str, failure: Exception) -> RunError:
        kept = f"; the last good checkpoint is {max(self.steps)}" if self.steps else "; there is no earlier checkpoint"
        return RunError(f"{what} could not be written to {self.directory}: {orbax_errors.first_line(failure)}{kept}")


def read_params(directory: Path, target: Params, warn: Warn) -> tuple[Params, int]:
    """Parameters of the newest whole checkpoint, and its step, while another process may be writing others. Changes nothing on disk.

    Args:
        directory: the run's `checkpoints` folder.
        target: shapes and types that the parameters must have, such as from `jax.eval_shape`.
        warn: called with one line for each damaged checkpoint.

    Raises:
        UserError: there is no checkpoint, or every one is damaged.
    """
    items, step = _read_newest(directory, {"params": target}, warn)
    return items["params"], step


def read_state(directory: Path, target: TrainState, warn: Warn) -> TrainState:
    """All of the state that the newest whole checkpoint holds, as `read_params`, with the same errors."""
    items, _ = _read_newest(directory, _items(target), warn)
    return TrainState(params=items["params"], **items["optimizer"])


def _read_newest(directory: Path, targets: dict[str, Any], warn: Warn) -> tuple[dict[str, Any], int]:
    if not directory.is_dir():
        raise UserError(f"{directory} holds no checkpoint")
    level = orbax_errors.quieten()
    manager = _open(directory, None)
    try:
        read = _newest_whole(directory, sorted(manager.all_steps()), lambda step: _read(manager, step, targets), warn)
    finally:
        manager.close()
        logging.getLogger("absl").setLevel(level)
    if read is None:
        raise UserError(f"{directory} holds no checkpoint")
    items, content = read
    return items, content["step"]


# --- orbax -----------------------------------------------------------------------------------------------------------


def _open(directory: Path, keep: int | None) -> Any:
    """A manager that writes and keeps `keep` checkpoints, or one that only reads where `keep` is None."""
    import orbax.checkpoint as ocp  # takes half a second: not for `--help`

    writes = keep is not None
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=False, read_only=not writes, cleanup_tmp_directories=writes, enable_async_checkpointing=writes
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _items(state: TrainState) -> dict[str, Any]:
    fields = state._asdict()
    return {"params": fields.pop("params"), "optimizer": fields}


def _read(manager: Any, step: int, targets: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(items, content of `meta`) of one checkpoint; raises anything at all where it is damaged."""
    import orbax.checkpoint as ocp

    restores = {name: ocp.args.StandardRestore(jax.tree.map(_placed, target)) for name, target in targets.items()}
    arguments = ocp.args.Composite(**restores, meta=ocp.args.JsonRestore())
    restored, reason = orbax_errors.attempt(lambda: manager.restore(step, args=arguments))
    if not distributed.agree(reason is None):  # each process reads its own part, and what follows needs all of them
        raise ValueError(reason or "another process cannot read its part")
    content = restored.meta["content"]
    if json_digest(content) != restored.meta["digest"]:
        raise ValueError("meta does not match its digest")
    if content["step"] != step:
        raise ValueError(f"meta says that it is checkpoint {content['step']}")
    items = {name: restored[name] for name in targets}
    for path, found in checksums(items).items():
        if content["checksums"].get(path) != found:
            raise ValueError(f"{path} does not match its checksum")
    return items, content


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _newest_whole(directory: Path, steps: list[int], read: Callable[[int], Any], warn: Warn) -> Any:
    reasons: list[str] = []
    damaged: list[int] = []
    for step in reversed(steps):
        found, reason = orbax_errors.attempt(functools.partial(read, step))
        if reason is None:
            for name, why in zip(damaged, reasons, strict=True):
                warn(f"checkpoint {directory / str(name)} is damaged ({why}): continuing from checkpoint {step}")
            return found
        damaged.append(step)
        reasons.append(reason)
    if damaged:
        names = ", ".join(str(step) for step in damaged)
        raise UserError(f"every checkpoint in {directory} is damaged ({names}): the newest says {reasons[0]}")
    return None


def _set_aside(checkpoint: Path) -> None:
    shelf = checkpoint.parent.parent / "damaged"
    shelf.mkdir(exist_ok=True)
    place, copy = shelf / checkpoint.name, 1
    while place.exists():
        copy += 1
        place = shelf / f"{checkpoint.name}-{copy}"
    checkpoint.rename(place)
