"""All measurements of one benchmark, by turns: in every repeat each program has its turn, so that a busy machine slows all of them."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitnet_jax import config as configs
from bitnet_jax.benchmark import processes, results
from bitnet_jax.benchmark.settings import BANDWIDTH, OURS, START, TWIN, Peer, Settings, read_speeds, twin_of
from bitnet_jax.config import ModelConfig
from bitnet_jax.data.cache import cache_folder
from bitnet_jax.errors import RunError, UserError

_PACKAGES = Path(__file__).parents[2]
Report = Callable[[str], None]
STATES = ("nothing compiled", "cold", "warm")
"""Of a start: the file is to be read from the disk and every program compiled; programs are kept; the file is in memory as well."""


def random_model(preset: str, encoding: str, report: Report) -> Path:
    """The file of a random model in the user's cache, written by the first call."""
    path = cache_folder() / "bench" / f"{preset}-{encoding}.safetensors"
    if not path.exists():
        report(f"writing {path}, once")
        _work({"job": "make", "preset": preset, "encoding": encoding, "model": str(path)}, len(processes.cores()))
    return path


def measure(name: str, model: Path, settings: Settings, output: Path | None, report: Report) -> dict[str, Any]:
    """Measures what `output` does not hold yet, and writes every figure there as it comes.

    Args:
        name: what the model is called in tables.
        model: file or folder.
        settings: what is measured.
        output: file of results, or None.
        report: is told in a line what each process found.

    Raises:
        UserError: the model cannot be read, its context is too short, or `output` is of another model.
        RunError: a process of ours fails. Another program that fails is noted in the results.
    """
    facts = _work({"job": "describe", "model": str(model), "implementation": settings.implementation}, len(processes.cores()))
    settings.check_lengths(configs.from_dict(ModelConfig, facts["model"]["config"]))
    found = results.opened(output, {"name": name, **facts["model"]})
    if found["sessions"] and _machine(found["sessions"][-1]) != _machine(facts["environment"]):
        raise UserError(f"{output} holds results of another machine or jaxlib: choose another file")
    found["sessions"].append(facts["environment"] | {"settings": asdict(settings), "command": sys.argv[1:]})
    with tempfile.TemporaryDirectory(prefix="bitnet-jax-bench-") as scratch:
        for run in _runs(settings, results.source_digest()):
            if results.is_done(found, run):
                continue
            run = run | {"session": len(found["sessions"]) - 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            run = run | _measured(run, model, found["model"]["config"], settings, Path(scratch))
            results.add(found, run, output)
            report(_line(run))
    return found


def _machine(environment: dict[str, Any]) -> tuple[Any, ...]:
    return environment["device"]["kind"], environment["cores"], environment["packages"]["jaxlib"]


def _runs(settings: Settings, source: str) -> Iterator[dict[str, Any]]:
    """Every process to be run, as it is named in the results."""
    ours = f"implementation={settings.implementation}" if settings.implementation else ""
    for threads in settings.threads:
        for prompt in settings.prompt:
            for generate in settings.generate:
                cell = {"threads": threads, "prompt": prompt, "generate": generate, "seed": settings.seed}
                for repeat in range(settings.repeats):
                    yield {"subject": BANDWIDTH, "command": "", "threads": threads, "repeat": repeat, "source": source}
                    yield {"subject": OURS, "command": ours, **cell, "repeat": repeat, "source": source}
                    for dtype in settings.twin:
                        yield {"subject": twin_of(dtype), "command": dtype, **cell, "repeat": repeat, "source": source}
                    for peer in settings.peers:
                        yield {"subject": peer.name, "command": peer.command, **cell, "repeat": repeat}
        if settings.start:
            cell = {"threads": threads, "prompt": settings.prompt[0], "generate": settings.generate[0], "seed": settings.seed}
            for repeat in range(settings.repeats):
                yield {"subject": START, "command": ours, **cell, "repeat": repeat, "source": source}


def _measured(run: dict[str, Any], model: Path, config: dict[str, Any], settings: Settings, scratch: Path) -> dict[str, Any]:
    job = {key: run[key] for key in ("threads", "prompt", "generate") if key in run}
    job |= {"seed": settings.seed, "implementation": settings.implementation, "stream": run.get("generate") == min(settings.generate)}
    programs, subject = scratch / f"programs-{run['threads']}", run["subject"]
    if subject == BANDWIDTH:
        return _work(job | {"job": "bandwidth"}, run["threads"])
    if subject.startswith(TWIN):
        twin = {"job": "twin", "config": config | {"dtype": run["command"]}, "implementation": None, "stream": False}
        return _work(job | twin, run["threads"], programs)
    job |= {"model": str(model)}
    if subject == OURS:
        _drop_pages(model)
        return _work(job | {"job": "speed"}, run["threads"], programs)
    if subject == START:
        programs, found = Path(tempfile.mkdtemp(dir=scratch)), {}
        for state in STATES:
            if state != "warm":
                _drop_pages(model)
            found[state] = _work(job | {"job": "start"}, run["threads"], programs)
        return {"states": found}
    return _peer(next(peer for peer in settings.peers if peer.name == subject), run)


def _work(job: dict[str, Any], threads: int, programs: Path | None = None) -> dict[str, Any]:
    """Does a job in a process of its own, whose compiled programs are kept in the folder `programs`."""
    here = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": here}  # the code that runs is this one, however it was found
    if programs is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    job = job | {"begun": time.monotonic()}
    ended = processes.run([sys.executable, "-m", "bitnet_jax.benchmark.worker", json.dumps(job)], threads, environment)
    if ended.code == 2:
        raise UserError(ended.last_line)
    if ended.code:
        raise RunError(f"the process that measures {job['job']} ended with {ended.code}: {ended.last_line}")
    return json.loads(ended.output.splitlines()[-1]) | {"seconds": ended.seconds, "peak_bytes": ended.peak_bytes}


def _peer(peer: Peer, run: dict[str, Any]) -> dict[str, Any]:
    try:
        ended = processes.run(peer.words(run["prompt"], run["generate"], run["threads"]), run["threads"])
    except OSError as error:
        return {"failed": str(error)}
    measured = {"seconds": ended.seconds, "peak_bytes": ended.peak_bytes}
    if ended.code:
        return measured | {"failed": f"exit code {ended.code}: {ended.last_line[:300]}"}
    try:
        return measured | read_speeds(ended.output)
    except ValueError as error:
        return measured | {"failed": f"{error}; its last line: {ended.last_line[:300]}"}


def _drop_pages(path: Path) -> None:
    """Asks the system to forget the pages of a file, or of all in a folder, so that they are read from the disk again."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _line(run: dict[str, Any]) -> str:
    cell = f"{run['threads']} threads" + (f", {run['prompt']} + {run['generate']} tokens" if "prompt" in run else "")
    if "failed" in run:
        found = f"failed: {run['failed']}"
    elif run["subject"] == BANDWIDTH:
        found = f"{run['bytes_per_second'] / 1e9:.1f} GB/s"
    elif run["subject"] == START:
        found = "first token after " + ", ".join(f"{one['first_token_seconds']:.1f} s ({state})" for state, one in run["states"].items())
    else:
        paces = {word: run.get(f"{word}_tokens_per_second") for word in ("prefill", "decode")}
        found = ", ".join(f"{word} {pace:.1f} tokens/s" for word, pace in paces.items() if pace is not None)
        found += f", {run['peak_bytes'] / 1e6:,.0f} MB"
    return f"[{run['repeat'] + 1}] {run['subject']}, {cell}: {found}"
