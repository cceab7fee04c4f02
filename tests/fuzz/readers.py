"""Feeds readers with mutated files until one of them fails: python -m tests.fuzz.readers --format gguf --mutations 1000000.

Without --atheris the mutations are those of `mutations`, the same for the same seed. With it, libFuzzer chooses by coverage what to mutate
further, and keeps what it finds in the folder --corpus. A failure is any error but a UserError, or an input that takes 20 seconds; the
input is kept in --corpus as crash-*. The exit code is 1 if there was one.
"""

import argparse
import hashlib
import json
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

HANG_SECONDS = 20
MEMORY_BYTES = 16 << 30  # address space; an allocation as large as a header claims fails
FORMATS = ("gguf", "safetensors", "packed", "manifest")


def main() -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--mutations", type=int, default=10_000, help="inputs to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--whole-every", type=int, default=25, help="of how many inputs one is read whole, with contents, not the header alone"
    )
    parser.add_argument("--corpus", type=Path, help="folder for crashes and, with --atheris, for the corpus")
    parser.add_argument("--result", type=Path, help="JSON file for the figures")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; needs the extra fuzz")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        return guided(args, Path(folder)) if args.atheris else plain(args, Path(folder))


def plain(args: argparse.Namespace, folder: Path) -> int:
    """The mutations of `mutations`, one after the other."""
    from bitnet_jax.training.run_directory import environment
    from tests.fuzz.targets import target

    found = target(args.format, folder)
    for seed in found.seeds:
        assert found.refusal(seed) is None
    warnings.simplefilter("error")  # a stranger's file has nothing to print
    rng = Random(args.seed)
    signal.signal(signal.SIGALRM, _hang)
    facts: dict[str, Any] = {"format": args.format, "seed": args.seed, "inputs": 0, "read_whole": 0, "refused": 0, "failures": []}
    slowest, before, begun = (0.0, ""), _peak_bytes(), time.monotonic()
    for number in range(args.mutations):
        data = found.mutate(found.seeds[number % len(found.seeds)], rng)
        whole = number % args.whole_every == 0
        start = time.monotonic()
        signal.alarm(HANG_SECONDS)
        message: str | None = "failed"
        try:
            message = found.refusal(data, whole=whole)
        except Exception as error:  # noqa: BLE001 (what is looked for)
            place = traceback.extract_tb((error.__context__ or error).__traceback__)[-1]
            facts["failures"].append(f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:300]}")
            _keep(args.corpus, data)
        finally:
            signal.alarm(0)
        slowest = max(slowest, (time.monotonic() - start, (message or "accepted").replace(str(folder), "")[:200]))
        facts["inputs"] += 1
        facts["read_whole"] += whole
        facts["refused"] += message is not None
        if (number + 1) % 50_000 == 0 or number + 1 == args.mutations:
            facts["seconds"] = time.monotonic() - begun
            facts["slowest"] = {"seconds": slowest[0], "message": slowest[1]}
            facts["memory"] = {"peak_bytes": _peak_bytes(), "grown_bytes": _peak_bytes() - before}
            facts["largest_seed_bytes"] = max(map(len, found.seeds))
            if args.result is not None:
                args.result.parent.mkdir(parents=True, exist_ok=True)
                args.result.write_text(json.dumps({**facts, "environment": environment()}, indent=2) + "\n", encoding="utf-8")
            sys.stdout.write(f"{facts['inputs']:,} inputs, {len(facts['failures'])} failures, {facts['seconds']:.0f} s\n")
            sys.stdout.flush()
    for failure in facts["failures"][:20]:
        sys.stdout.write(f"{failure}\n")
    return 1 if facts["failures"] else 0


def guided(args: argparse.Namespace, folder: Path) -> int:
    """libFuzzer with the mutations of `mutations`; it ends the process itself at the first failure."""
    import atheris

    with atheris.instrument_imports(include=["bitnet_jax.formats"]):  # pyright: ignore[reportAttributeAccessIssue]
        from tests.fuzz.targets import target

        found = target(args.format, folder)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        try:
            return found.mutate(bytes(data), rng)[:most]
        except (ValueError, LookupError, TypeError, RecursionError):  # what it was given is no valid file any more
            return found.mutate(rng.choice(found.seeds), rng)[:most]

    def attempt(data: bytes) -> None:
        found.refusal(data)

    corpus = args.corpus or folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in found.seeds:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    options = [f"-runs={args.mutations}", f"-seed={args.seed + 1}", f"-timeout={HANG_SECONDS}", "-max_len=2000000", "-rss_limit_mb=8192"]
    options.append(f"-artifact_prefix={corpus}/")
    atheris.Setup([sys.argv[0], *options, str(corpus)], attempt, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


def _hang(*_: object) -> None:
    raise TimeoutError(f"no answer within {HANG_SECONDS} seconds")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _keep(folder: Path | None, data: bytes) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
