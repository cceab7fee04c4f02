"""Whether the native kernels are right and safe in memory on machines that are not this one: `make test-native`.

    python tests/cpu/check_native.py [--require-all] [PART ...]

kernels_test.cc is compiled with several compilers and sanitizers, for AVX-512 in emulation (SIMDe) and for ARM (qemu), and run. The names
of the instruction sets that it says have run must be those that the machine has by what the operating system, or qemu, says of it.
Then the tests of this folder run on a library made with AddressSanitizer and UBSan, and a wheel is built, unpacked and used.

A part that cannot run here says why in one line, which is a failure with --require-all. Exit code 1 where a part failed.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "bitnet_jax" / "cpu" / "src"
TEST = ROOT / "tests" / "cpu" / "kernels_test.cc"

# What a processor must have for a set to run on it, in the words of /proc/cpuinfo.
NEEDS = {
    "x86_64": {
        "scalar": set(),
        "avx2": {"avx2"},
        "avx_vnni": {"avx2", "avx_vnni"},
        "avx512": {"avx2", "avx512f", "avx512bw"},
        "avx512_vnni": {"avx2", "avx512f", "avx512bw", "avx512_vnni"},
        "avx512_vbmi": {"avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512vbmi"},
    },
    "aarch64": {"scalar": set(), "neon_dotprod": {"asimddp"}, "neon_i8mm": {"asimddp", "i8mm"}},
}
# Processors that qemu knows, and what they have of it: the first is the baseline of 64-bit ARM.
ARM = {"cortex-a53": set(), "neoverse-n1": {"asimddp"}, "max": {"asimddp", "i8mm"}}

SAFE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Vectors are passed only between functions of one file; GCC's own headers begin from vectors without a value.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-psabi")
GCC_WARNINGS = (*WARNINGS, "-Wno-uninitialized", "-Wno-maybe-uninitialized")
# SIMDe adds signed bytes as C does, and means that they wrap.
EMULATED = ("-DBITNET_EMULATE", "-fno-sanitize=signed-integer-overflow")


class NotRunError(Exception):
    """The part cannot run on this machine: why."""


class FailedError(Exception):
    """The part ran and found a fault: which."""


@dataclasses.dataclass(frozen=True)
class Build:
    """One way of compiling kernels_test.cc."""

    compiler: str
    flags: tuple[str, ...]
    kind: str = dataclasses.field(default_factory=platform.machine)
    runs: tuple[tuple[tuple[str, ...], frozenset[str]], ...] | None = None
    """Commands before the program's name, each with the features that it then finds; None is this machine itself."""


def qemu(*names: str) -> tuple[tuple[tuple[str, ...], frozenset[str]], ...]:
    return tuple((("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", name), frozenset(ARM[name])) for name in names)


EVERYTHING = frozenset().union(*NEEDS["x86_64"].values())
BUILDS = {
    "gcc": Build("g++", ("-O3", *GCC_WARNINGS)),
    "clang": Build("clang++", ("-O3", *WARNINGS)),
    "addresses": Build("g++", SAFE),
    "memory": Build("clang++", ("-O1", "-g", "-fsanitize=memory")),
    "threads": Build("g++", ("-O1", "-g", "-fsanitize=thread")),
    "avx512": Build("g++", (*SAFE, *EMULATED), "x86_64", (((), EVERYTHING),)),
    "arm": Build("aarch64-linux-gnu-g++", ("-O3", *GCC_WARNINGS), "aarch64", qemu(*ARM)),
    "arm-addresses": Build("aarch64-linux-gnu-g++", SAFE, "aarch64", qemu("max")),
}


def known(kind: str) -> set[str]:
    """The names in the table of isas.h for a kind of machine."""
    table = (SOURCES / "isas.h").read_text(encoding="utf-8").partition("kIsas[]")[2].partition("};")[0]
    common, _, rest = table.partition("#if defined(__x86_64__)")
    x86, _, arm = rest.partition("#elif defined(__aarch64__)")
    names = set(re.findall(r'\{"(\w+)"', common + (x86 if kind == "x86_64" else arm)))
    if unknown := names - NEEDS[kind].keys():
        raise FailedError(f"NEEDS in {Path(__file__).name} does not say what {', '.join(sorted(unknown))} needs")
    return names


def here() -> frozenset[str]:
    """What /proc/cpuinfo says that this machine has."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return frozenset(next(line for line in lines if line.startswith(("flags", "Features"))).partition(":")[2].split())


def run(command: Sequence[str | Path], seconds: int = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"} | environment
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FailedError(f"{command[0]} did not end in {seconds} s") from None
    return done


def compile_and_run(part: Build, folder: Path) -> str:
    """Compiles kernels_test.cc and runs it; returns the instruction sets that ran, by run."""
    if part.runs is None and part.kind not in NEEDS:
        raise NotRunError(f"there are no kernels for {part.kind}")
    if part.compiler.startswith(("g++", "clang++")) and part.kind != platform.machine():
        raise NotRunError(f"this machine is not {part.kind}")
    runs = part.runs or (((), here()),)
    for name in {part.compiler, *(prefix[0] for prefix, _ in runs if prefix)}:
        if not shutil.which(name):
            raise NotRunError(f"there is no {name} here")
    # A program that does nothing says whether compiler, sanitizer and emulator are there at all.
    empty = folder / "empty.cc"
    empty.write_text(("#include <simde/x86/avx512.h>\n" if "-DBITNET_EMULATE" in part.flags else "") + "int main() { return 0; }\n")
    program = folder / "program"
    line = [
        part.compiler,
        "-std=c++17",
        "-pthread",
        "-ffp-contract=off",
        "-fno-math-errno",
        *part.flags,
        f"-I{SOURCES}",
        "-o",
        str(program),
    ]
    done = run([*line, str(empty)])
    if done.returncode == 0:
        done = run([*runs[-1][0], str(program)])
    if done.returncode:
        lines = [text for text in done.stdout.splitlines() if "rror" in text] or done.stdout.splitlines() or [str(done.returncode)]
        raise NotRunError(f"{part.compiler} {' '.join(part.flags)} fails for a program that does nothing: {lines[0]}")

    done = run([*line, str(TEST)])
    if done.returncode:
        raise FailedError(f"{TEST.name} does not compile\n{done.stdout}")
    ran = []
    for prefix, features in runs:
        done = run([*prefix, str(program)])
        if done.returncode:
            raise FailedError(f"exit code {done.returncode} {' '.join(prefix)}\n{done.stdout}")
        sets, expected = done.stdout.split(), {name for name in known(part.kind) if NEEDS[part.kind][name] <= features}
        if set(sets) != expected:
            raise FailedError(f"{' '.join(sets) or 'nothing'} ran {' '.join(prefix)}: must be {' '.join(sorted(expected))}")
        ran.append((f"{prefix[-1]}: " if len(runs) > 1 else "") + " ".join(sets))
    return "; ".join(ran)


def test_sanitized_library(folder: Path) -> str:
    """Runs the tests of this folder on a library with AddressSanitizer and UBSan, in a cache of its own."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        path = Path(run(["g++", f"-print-file-name={name}"]).stdout.strip()) if shutil.which("g++") else Path(name)
        if not path.is_absolute():
            raise NotRunError(f"there is no g++ with {name} here")
        runtimes.append(str(path.resolve()))
    cache = {"XDG_CACHE_HOME": str(folder), "CXX": "g++", "BITNET_JAX_CXXFLAGS": " ".join(SAFE)}
    # Compiled before the runtimes are loaded, since they would make the compiler slow as well.
    done = run([sys.executable, "-c", "from bitnet_jax.cpu import build; build._find()"], PYTHONPATH=str(ROOT), **cache)
    if done.returncode:
        raise FailedError(f"the library does not compile\n{done.stdout}")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "-m", "not slow", "--ignore=tests/cpu/test_build.py"]
    # An error of the sanitizers ends a process, which pytest then reports with its test; what they wrote is in the files.
    report = folder / "report"
    options = {"ASAN_OPTIONS": f"detect_leaks=0:log_path={report}", "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={report}"}
    done = run([*line, "tests/cpu"], LD_PRELOAD=" ".join(runtimes), **options, **cache)
    reports = "\n".join(path.read_text(errors="replace")[:4000] for path in sorted(folder.glob("report*")))
    if done.returncode or reports:
        raise FailedError(f"pytest ended with exit code {done.returncode}\n{done.stdout}\n{reports}")
    return done.stdout.strip().splitlines()[-1]


def use_wheel(folder: Path) -> str:
    """Builds a wheel, unpacks it, and makes the library from nothing but what it holds."""
    done = run([sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "-w", str(folder), "."])
    if done.returncode:
        raise FailedError(f"no wheel was built\n{done.stdout}")
    (wheel,) = folder.glob("*.whl")
    shutil.unpack_archive(wheel, folder / "unpacked", "zip")
    done = run(
        [sys.executable, "-m", "bitnet_jax.cpu"], PYTHONPATH=str(folder / "unpacked"), PYTHONSAFEPATH="1", XDG_CACHE_HOME=str(folder)
    )
    if done.returncode or not list(folder.glob("bitnet-jax/native/*/libbitnet.so")):
        raise FailedError(f"the library was not made\n{done.stdout}")
    return done.stdout.strip().splitlines()[-1]


PARTS: dict[str, Callable[[Path], str]] = {name: lambda folder, part=part: compile_and_run(part, folder) for name, part in BUILDS.items()}
PARTS |= {"wheel": use_wheel, "library": test_sanitized_library}


def check(name: str, required: bool) -> bool:
    """Runs one part and prints a line about it, or what it found. Whether it did not fail."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bitnet-jax-native-") as folder:
        try:
            said, good = PARTS[name](Path(folder)), True
        except NotRunError as error:
            said, good = f"not run: {error}", not required
        except FailedError as error:
            said, good = f"FAILED: {error}", False
    sys.stdout.write(f"{name:<14} {said} ({time.monotonic() - start:.0f} s)\n")
    sys.stdout.flush()
    return good


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[*PARTS, []], help=", ".join(PARTS))
    parser.add_argument("--require-all", action="store_true", help="a part that cannot run here is a failure")
    options = parser.parse_args(arguments)
    names = options.parts or list(PARTS)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # The library's tests have the processors to themselves.
        outcomes = list(pool.map(lambda name: check(name, options.require_all), [name for name in names if name != "library"]))
    outcomes += [check(name, options.require_all) for name in names if name == "library"]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
