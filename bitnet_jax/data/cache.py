"""The folder in which corpora, trained tokenizers and token arrays are kept, and the one way in which things are put there.

Whatever is read twice is written under a temporary name, flushed to the disk, and renamed: a killed process leaves nothing that
looks whole, and processes that build the same thing at once do not disturb each other.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from bitnet_jax.errors import RunError, UserError

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""A hook that is told what is being done, how many bytes of it are done, and how many there are (None where that is unknown)."""


def silent(stage: str, done: int, total: int | None) -> None:
    """The `Progress` that shows nothing."""


def cache_folder(cache_dir: str | None = None) -> Path:
    """`cache_dir`, or the user's cache folder: `$XDG_CACHE_HOME/bitnet-jax`, or `~/.cache/bitnet-jax`. It need not exist yet.

    Raises:
        UserError: neither is given, and the user has no home folder.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitnet-jax"
    except RuntimeError:
        raise UserError("there is no home folder: XDG_CACHE_HOME must name the folder that caches are in") from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says about writing to `path` into one line.

    Raises:
        RunError: the disk is full, or the write failed otherwise.
        UserError: the folder may not be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{path} cannot be written: no space left on its disk") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path} cannot be written ({error.strerror}): choose another folder with cache_dir") from None
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `target` when the block ends well and vanishes when it does not.

    Where another process made `target` meanwhile, that one stays.

    Raises:
        RunError, UserError: as `writing`.
    """
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    with writing(target):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with writing(target):
            for path in temporary.iterdir():
                _flush(path)
            _flush(temporary)
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(target: Path, text: str) -> None:
    """Writes `target` whole or not at all.

    Raises:
        RunError, UserError: as `writing`.
    """
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(text.encode("utf-8"))
            _flush(temporary)
            temporary.replace(target)
            _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Removes `folder`, which is gone under its name at once even while its files are being deleted."""
    doomed = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    with writing(folder), contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
