"""Files as the formats use them: memory-mapped to read, whole or not at all to write."""

import contextlib
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitnet_jax.errors import RunError, UserError


class Mapped:
    """A file as read-only bytes that are brought into memory when they are looked at.

    Attributes:
        path: the file.
        data: its bytes, uint8 [size].
    """

    def __init__(self, path: Path) -> None:
        """Maps the file `path`. Raises UserError where it is missing, no plain file, unreadable or empty."""
        self.path = path
        try:
            if not path.is_file():
                raise UserError(f"{path} {'is no plain file' if path.exists() else 'does not exist'}")
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise UserError(f"{path} is empty")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL
            raise UserError(f"{path} cannot be read: {_reason(error)}") from None
        self.data = np.frombuffer(self._map, np.uint8)

    def release(self) -> None:
        """Gives the memory back that looking at the bytes has taken. They stay readable; the next look reads them anew."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an error, and leaves nothing behind otherwise.

    Raises:
        UserError: the folder does not exist or must not be written to.
        RunError: the disk is full, or another error of the system.
    """
    temporary = _beside(path)
    with _errors(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """An empty folder to fill that becomes `path` when the block ends without an error, and leaves nothing behind otherwise.

    Raises:
        UserError: `path` is there already and no empty folder, or its parent does not exist or must not be written to.
        RunError: the disk is full, or another error of the system.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"{path} exists and is no empty folder")
    temporary = _beside(path)
    with _errors(path):
        try:
            temporary.mkdir()
            yield temporary
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def file_size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(part.stat().st_size for part in path.rglob("*") if part.is_file())


def _beside(path: Path) -> Path:
    """A name in the same folder, and so on the same file system, that no other process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be written: {_reason(error)}") from None
    except OSError as error:
        raise RunError(f"{path} could not be written: {_reason(error)}") from None


def _reason(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error)
