"""The native library: compiled on first use by the system's C++ compiler, kept in the user's cache folder, loaded if it is the right one.

XLA's interface for native functions is tied to the version of jaxlib, so that no library could be shipped for all of them. A library
stands in a folder that is named after everything it was made of, and says that name itself when it is loaded.

The environment variable `CXX` names another compiler, `BITNET_JAX_CXXFLAGS` more of its options, as for sanitizers.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from bitnet_jax.data.cache import cache_folder, discard, new_folder
from bitnet_jax.errors import RunError, UserError

SOURCES = Path(__file__).parent / "src"
TARGETS = (
    "bitnet_ternary_matmul",
    "bitnet_scale",
    "bitnet_logits",
    "bitnet_top_logits",
    "bitnet_quantize_table",
    "bitnet_attention",
    "bitnet_norm_quantize",
    "bitnet_read",
)
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-w")
_MORE_FLAGS = "BITNET_JAX_CXXFLAGS"
_COMPILERS = ("c++", "g++", "clang++")
_MACHINES = ("x86_64", "aarch64")
_LIBRARY, _DIGEST, _FAILED = "libbitnet.so", "sha256", ".failed"
_UNFINISHED = ".tmp"  # the end of the names that `new_folder` and `discard` give


@functools.cache
def load() -> tuple[str, ...]:
    """Loads the library and registers its functions with XLA, compiling it first where that was never done.

    Returns:
        Names of the instruction sets that this machine has kernels for, from the plainest to the fastest.

    Raises:
        RunError: there is no library and none can be made; the reason in one line.
    """
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise RunError(f"no native kernels for {sys.platform} on {platform.machine()}: only for linux on {' and '.join(_MACHINES)}")
    try:
        library = _open(_find())
    except (OSError, UserError) as error:
        raise RunError(f"no native kernels: {error}") from None
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return tuple(_text(library.bitnet_isas).decode().split())


@functools.cache
def unavailable() -> str | None:
    """The reason why there is no library on this machine, found once and then said in a line, or None. May compile it: see `load`."""
    try:
        load()
    except RunError as error:
        if sys.platform == "linux":
            sys.stderr.write(f"bitnet-jax: {error}; the portable ones are used, which are slower\n")
        return str(error)
    return None


def forget_failures() -> None:
    """Has the next `load` try a compiler again that has failed."""
    for left in (cache_folder() / "native").glob(f"*{_FAILED}"):
        left.unlink(missing_ok=True)


# --- finding and making ----------------------------------------------------------------------------------------------


def _find() -> Path:
    """The folder of the right library, made if need be."""
    root, source = cache_folder() / "native", _source_key()
    compiler = _compiler()
    if compiler is None:
        made = [folder for folder in root.glob(f"{source}-*") if folder.suffix != _UNFINISHED and _whole(folder)]
        if made:
            return max(made, key=lambda folder: folder.stat().st_mtime)
        tried = os.environ.get("CXX") or ", ".join(_COMPILERS)
        raise RunError(f"no native kernels: no C++ compiler found (tried {tried})")
    command, version = compiler
    folder = root / f"{source}-{_digest(version.encode(), repr(FLAGS).encode())[:16]}"
    failed = folder.with_suffix(_FAILED)
    if not _whole(folder):
        if failed.exists():
            raise RunError(f"{failed.read_text(encoding='utf-8', errors='replace')} (not tried again while {failed} is there)")
        with _lock(root):
            for left in root.glob(f"*{_UNFINISHED}"):  # by a process that was killed: who holds the lock is alone
                shutil.rmtree(left, ignore_errors=True)
            if not _whole(folder):  # another process may have made it while this one waited
                if folder.exists():
                    discard(folder)
                _compile(command, folder)
    return folder


def _source_key() -> str:
    asked = _words("CXX")[1:], _words(_MORE_FLAGS)
    parts = [importlib.metadata.version("jaxlib").encode(), platform.machine().encode(), repr(asked).encode()]
    for path in sorted(SOURCES.iterdir()):
        parts += [path.name.encode(), path.read_bytes()]
    return _digest(*parts)[:16]


def _words(variable: str) -> list[str]:
    """The words of an environment variable, as a shell divides them."""
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise UserError(f"{variable}={value!r} cannot be divided into words: {error}") from None


def _compiler() -> tuple[list[str], str] | None:
    """The command of the first C++ compiler that there is, and what it says its version is."""
    asked = _words("CXX")
    for command in [asked] if asked else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60)
                return command, done.stdout
    return None


def _compile(command: list[str], folder: Path) -> None:
    sys.stderr.write(f"bitnet-jax: compiling the native CPU kernels with {command[0]}; this happens once and takes under a minute\n")
    with new_folder(folder) as temporary:
        target = temporary / _LIBRARY
        include = ["-isystem", jax.ffi.include_dir()]
        key = f'-DBITNET_KEY="{folder.name}"'
        line = [*command, *FLAGS, *_words(_MORE_FLAGS), *include, key, str(SOURCES / "library.cc"), "-o", str(target)]
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)
        except subprocess.TimeoutExpired:
            raise RunError(f"no native kernels: {command[0]} did not end in 600 s") from None
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
            reason = f"no native kernels: {command[0]} failed with exit code {done.returncode}: {lines[0][:300]}"
            with contextlib.suppress(OSError):  # a compiler that cannot is not asked by every process
                folder.with_suffix(_FAILED).write_text(reason, encoding="utf-8")
            raise RunError(reason)
        (temporary / _DIGEST).write_text(_digest(target.read_bytes()))


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Only one process compiles at a time; the others wait for what it makes."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- trusting --------------------------------------------------------------------------------------------------------


def _whole(folder: Path) -> bool:
    """Whether the folder holds a library as it was compiled. A damaged one could end the process while it is loaded."""
    try:
        return _digest((folder / _LIBRARY).read_bytes()) == (folder / _DIGEST).read_text()
    except (OSError, ValueError):
        return False


def _open(folder: Path) -> ctypes.CDLL:
    path = folder / _LIBRARY
    for place in (path, folder):
        status = place.stat()
        if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o002:
            raise UserError(f"{place} belongs to or may be written by another user")
    library = ctypes.CDLL(str(path))
    key = _text(library.bitnet_key).decode()
    if key != folder.name:
        raise UserError(f"{path} was made of something else: it says {key}")
    return library


def _text(function: "ctypes._NamedFuncPointer") -> bytes:
    function.restype = ctypes.c_char_p
    return function()


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
