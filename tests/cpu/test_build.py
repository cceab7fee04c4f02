"""The native library: made once, never believed, and its absence is a reason and not a crash."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitnet_jax.cpu import build
from bitnet_jax.errors import RunError, UserError

SCRIPT = """#!/bin/sh
case "$*" in *--version*) echo "{version}"; exit 0;; esac
{action}
"""


def compiler(folder: Path, action: str, version: str = "false compiler 1.0") -> Path:
    path = folder / "compiler"
    path.write_text(SCRIPT.format(version=version, action=action))
    path.chmod(0o755)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in which nothing has been made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bitnet-jax" / "native"


WRITES = 'while [ "$1" != "-o" ]; do shift; done; echo library > "$2"; echo made >> "$(dirname "$0")/log"'


def test_it_is_compiled_once_with_a_message(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, WRITES)))
    folder = build._find()
    assert folder.parent == cache
    assert "compiling the native CPU kernels" in capsys.readouterr().err
    assert build._find() == folder
    assert capsys.readouterr().err == ""
    assert (tmp_path / "log").read_text() == "made\n"


def test_another_compiler_makes_another_library(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, WRITES)))
    first = build._find()
    compiler(tmp_path, WRITES, version="false compiler 2.0")
    assert build._find() != first


@pytest.mark.parametrize("what", ["digest", "library"])
def test_a_damaged_library_is_made_again(what: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, WRITES)))
    folder = build._find()
    (folder / (build._DIGEST if what == "digest" else build._LIBRARY)).write_text("damaged")
    assert build._find() == folder
    assert (folder / build._LIBRARY).read_text() == "library\n"


def test_a_library_made_of_something_else_is_not_used(cache: Path) -> None:
    folder = cache / "0123"
    folder.mkdir(parents=True)
    source = folder / "key.c"
    source.write_text('const char* bitnet_key(void) { return "another"; }')
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(folder / build._LIBRARY)], check=True)
    with pytest.raises(UserError, match="was made of something else: it says another"):
        build._open(folder)


def test_a_library_that_others_may_write_is_not_used(cache: Path) -> None:
    folder = cache / "0123"
    folder.mkdir(parents=True)
    (folder / build._LIBRARY).write_text("")
    (folder / build._LIBRARY).chmod(0o666)
    with pytest.raises(UserError, match="may be written by another user"):
        build._open(folder)


def test_without_a_compiler_there_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunError, match=r"no C\+\+ compiler found \(tried no-such-compiler\)"):
        build._find()


def test_without_a_compiler_what_was_made_before_is_used(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, WRITES)))
    folder = build._find()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build._find() == folder


def test_a_compiler_that_fails_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, 'echo "x.cc:1: error: no such luck" >&2; exit 3')))
    with pytest.raises(RunError, match=r"failed with exit code 3: x\.cc:1: error: no such luck"):
        build._find()
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".failed"]  # the lock, and the reason


def test_processes_that_need_it_at_once_make_it_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, "sleep 1; " + WRITES)))
    program = "from bitnet_jax.cpu import build; build._find()"
    root = Path(__file__).parents[2]
    running = [subprocess.Popen([sys.executable, "-c", program], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_importing_compiles_nothing(cache: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "CXX": str(compiler(tmp_path, WRITES))}
    subprocess.run([sys.executable, "-c", "import bitnet_jax.cpu"], cwd=root, env=environment, check=True)
    assert not cache.exists()


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_other_machines_have_a_reason(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    with pytest.raises(RunError, match=f"no native kernels for {system} on {machine}"):
        build.load.__wrapped__()


# --- set-up and accidents --------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def set_up(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitnet_jax.cpu"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_set_up_says_what_there_is() -> None:
    done = set_up()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"native CPU kernels: {', '.join(build.load())}\n"


def test_set_up_without_a_compiler_is_one_line(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    reason = "no native kernels: no C++ compiler found (tried c++, g++, clang++); the portable ones are used\n"
    done = set_up(PATH=str(tmp_path / "empty"), CXX="")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", reason)


def test_set_up_with_a_broken_compiler_is_a_message_and_one_line(cache: Path, tmp_path: Path) -> None:
    done = set_up(CXX=str(compiler(tmp_path, WRITES)))  # writes something that is no library
    message, reason = done.stderr.splitlines()
    assert "compiling the native CPU kernels" in message
    assert reason.startswith("no native kernels: ")
    assert "libbitnet.so" in reason


def test_a_compiler_that_failed_is_asked_again_by_set_up_alone(cache: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    failing = compiler(tmp_path, f'echo x >> "{asked}"; echo "error: no such thing" >&2; exit 1')
    program = "from bitnet_jax.cpu import build; build.unavailable(); build.unavailable()"
    for number in range(3):
        if number == 2:
            set_up(CXX=str(failing))
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"CXX": str(failing)}, capture_output=True, text=True, check=True
        )
        assert done.stderr.count("error: no such thing") == 1  # the reason, once a process
        assert done.stderr.count("compiling the native CPU kernels") == int(number == 0)
    assert len(asked.read_text().split()) == 2


def test_a_cache_that_cannot_be_written_is_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = set_up(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.returncode == 1
    assert done.stderr.startswith("no native kernels: ")
    assert "Not a directory" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_process_killed_while_it_compiles_leaves_nothing_behind(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, "sleep 60")))
    command = [sys.executable, "-c", "from bitnet_jax.cpu import build; build._find()"]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(cache.glob("*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    (left,) = cache.glob("*.tmp")
    # The worst moment: all is written, and only the name is not yet the right one.
    (left / build._LIBRARY).write_text("left")
    (left / build._DIGEST).write_text(build._digest(b"left"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunError, match=r"no C\+\+ compiler found"):
        build._find()
    monkeypatch.setenv("CXX", str(compiler(tmp_path, WRITES)))
    folder = build._find()
    assert (folder / build._LIBRARY).read_text() == "library\n"
    assert {path.name for path in cache.iterdir()} == {"lock", folder.name}


@pytest.mark.parametrize("what", ["jaxlib", "CXX", "BITNET_JAX_CXXFLAGS", "source"])
def test_a_library_made_of_anything_else_has_another_name(what: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, WRITES)))
    first = build._find()
    if what == "jaxlib":
        monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "0.0.1")
    elif what == "source":
        shutil.copytree(build.SOURCES, tmp_path / "src")
        (tmp_path / "src" / "more.h").write_text("")
        monkeypatch.setattr(build, "SOURCES", tmp_path / "src")
    else:
        monkeypatch.setenv(what, f"{os.environ['CXX']} -g" if what == "CXX" else "-fsanitize=address")
    assert build._find() != first
    if what != "CXX":  # nor without a compiler
        monkeypatch.setenv("CXX", "no-such-compiler")
        shutil.rmtree(build._find())
        with pytest.raises(RunError, match=r"no C\+\+ compiler found"):
            build._find()


def test_a_variable_that_has_no_words_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_JAX_CXXFLAGS", "-DX='")
    with pytest.raises(UserError, match='BITNET_JAX_CXXFLAGS="-DX=\'" cannot be divided into words'):
        build._find()
