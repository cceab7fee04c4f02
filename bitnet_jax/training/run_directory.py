"""The folder of one run: what lies in it, who may write it, and what a resumed run must agree with.

Files:

    config.json      the resolved configuration
    provenance.json  every start of the run: versions, device, commit, seed
    metrics.jsonl    one line per log interval and per evaluation, each step once
    checkpoints/     see `checkpoints.py`; damaged ones are moved to damaged/
    tensorboard/     event files
    profile/         traces of single steps, where they were asked for
    and what the caller adds, such as tokenizer.json
"""

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from bitnet_jax import config as configs
from bitnet_jax.config import TrainConfig
from bitnet_jax.errors import RunError, UserError

CONFIG = "config.json"
PROVENANCE = "provenance.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
_LOCK = ".lock"
_MAY_DIFFER = ("output.", "mesh.", "data.cache_dir:", "data.stall_timeout:", "non_finite:", "non_finite_limit:")
"""Beginnings of the fields that decide no number of a run that goes on."""
_PACKAGES = ("bitnet-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def is_run(directory: Path) -> bool:
    """Whether `directory` is a run's folder."""
    return (directory / CONFIG).is_file()


@contextlib.contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Makes `directory` if need be and holds it for this process; the system lets go of it however the process ends.

    Raises:
        UserError: `directory` is a file, or holds something that is not a run, or another process holds it.
        RunError: it cannot be made or written.
    """
    import fcntl

    _check_kind(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "of unknown number"
            raise UserError(f"{directory} is in use by process {holder}: only one may train in it") from None
        _check_kind(directory)  # what it was before the lock may have changed
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def has_log(directory: Path) -> bool:
    """Whether a run has written numbers of steps here."""
    path = directory / METRICS
    return path.is_file() and path.stat().st_size > 0


def _check_kind(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is not a folder")
    if directory.is_dir() and not is_run(directory):
        foreign = sorted(path.name for path in directory.iterdir() if path.name != _LOCK and not path.name.endswith(".tmp"))
        if foreign:
            rule = f"must be a new or empty folder, or a run with its {CONFIG}"
            raise UserError(f"{directory} is not a run and not empty (it holds {foreign[0]}): {rule}")


def check(directory: Path, config: TrainConfig, resume: bool = True) -> None:
    """Raises UserError where this run can neither begin nor go on in `directory`, claimed or not; arguments as for `enter`."""
    _check_kind(directory)
    if is_run(directory):
        if not resume:
            raise UserError(f"{directory} holds a run already: choose another folder, or resume it")
        begun = configs.read(TrainConfig, directory / CONFIG)
        rows = [row for row in configs.differences(begun, config) if not row.startswith(_MAY_DIFFER)]
        if rows:
            raise UserError(f"{directory} was begun with another configuration: {'; '.join(rows)}")


def enter(directory: Path, config: TrainConfig, files: Mapping[str, str], resume: bool) -> None:
    """Writes configuration and `files` into a claimed folder, or checks that the run there is this one.

    Args:
        directory: claimed folder.
        config: what decides the numbers must be what the run began with.
        files: name → text; of a run that exists, the same text must be there.
        resume: whether an existing run may be continued.

    Raises:
        UserError: there is a run and `resume` is false, or the run differs in a field or a file.
    """
    check(directory, config, resume)
    write(directory / CONFIG, configs.to_json(config))
    for name, text in files.items():
        path = directory / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path} is not what this run was begun with: must be the same text")
        write(path, text)


def record_start(directory: Path, config: TrainConfig, step: int, extra: Mapping[str, Any]) -> None:
    """Adds this start of the run to `provenance.json`.

    Args:
        directory: claimed folder.
        config: the run's configuration.
        step: steps done before this start.
        extra: more entries, such as where the data came from; JSON values.
    """
    path = directory / PROVENANCE
    try:
        starts = [*json.loads(path.read_text(encoding="utf-8"))["starts"]] if path.exists() else []
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is not the provenance of a run: remove it to go on") from None
    start = {
        "step": step,
        **environment(),
        "seed": config.seed,
        **extra,
    }
    write(path, json.dumps({"starts": [*starts, start]}, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Time, commit, versions and device of this process, as JSON values: what a figure must be read with."""
    device = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": {
            "platform": device.platform,
            "kind": _processor() if device.platform == "cpu" else device.device_kind,
            "count": jax.device_count(),
        },
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _processor() -> str:
    """Name of the processor; "cpu" where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "cpu"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "cpu")


def write(path: Path, text: str) -> None:
    """Writes a small file so that a reader, and a process killed meanwhile, finds the old text or the new, never a part.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that this package is imported from, with "+changes" where files differ; None for an installed package."""
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        git("ls-files", "--error-unmatch", "config.py")  # an environment inside someone else's checkout is not ours
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "--", ".").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
