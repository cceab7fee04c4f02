"""A run of two processes, killed again and again, held to the run that was never stopped.

    python -m experiments.soak --kills 50

Each time the two processes are started, one or both are ended at a random moment: while they start, between steps, or while a checkpoint
is being written; by SIGKILL, or by SIGTERM to one of them, as a machine that is taken away gets it. What is left must end by itself. The
same command then goes on, until the run is through; then its numbers must be those of an undisturbed run, bit for bit, and the next run
begins. Writes experiments/results/soak/two-processes.json after every kill; cost: half an hour to an hour on two CPU cores.
"""

import argparse
import json
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitnet_jax.training import run_directory

RESULTS = Path(__file__).parent / "results" / "soak"
STEPS = 600
FLAGS = tuple(
    "ladder-0.2m --data.source stdlib --data.tokenizer bytes --data.seq-len 32 --data.validation-fraction 0.01 --batch-size 4 "
    "--optimizer.warmup-steps 10 --output.log-every 5 --output.eval-windows 4 --output.checkpoint-every 25 --output.no-tensorboard "
    f"--model.vocab-size 257 --model.hidden-size 32 --model.ffn-size 48 --model.num-layers 1 --model.head-dim 16 --steps {STEPS}".split()
)
KINDS = ("kill one", "kill both", "terminate one")
MOMENTS = ("start", "steps", "save")
_WHEN = {"start": "while they start", "steps": "between steps", "save": "while a checkpoint is written"}
_PATIENCE = 400.0
"""Seconds in which the processes that are left must end: more than `distributed.PATIENCE`, which one waits for another that never came."""


def main(args: list[str] | None = None) -> int:
    """Kills runs; 0 where `well`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parsed = parser.parse_args(args)
    chance = random.Random(parsed.seed)
    facts: dict[str, Any] = {"steps": STEPS, "seed": parsed.seed, "environment": run_directory.environment(), "kills": [], "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        assert [process.wait() for process in start(whole)] == [0, 0]
        expected = numbers(whole)
        done = 0
        while done < parsed.kills:
            folder = Path(scratch, f"run-{len(facts['runs'])}")
            kills = 0
            while True:
                processes = start(folder)
                # The last third of a run is left in peace now and then, so that runs end.
                if done + kills >= parsed.kills or (reached(folder) > 2 * STEPS // 3 and chance.random() < 0.5):
                    codes = [process.wait() for process in processes]
                    break
                kill = disturb(processes, folder, chance)
                if kill is None:  # they were through before the moment came
                    codes = [process.wait() for process in processes]
                    break
                facts["kills"].append(kill)
                kills += 1
                save(facts)
                print(f"{done + kills} of {parsed.kills}: {kill}", flush=True)
            done += kills
            facts["runs"].append({"kills": kills, "codes": codes, "equal": numbers(folder) == expected})
            save(facts)
            print(f"run {len(facts['runs'])}: {facts['runs'][-1]}", flush=True)
            shutil.rmtree(folder)
    return 0 if well(facts) else 1


def well(facts: dict[str, Any]) -> bool:
    """Whether every run ended as the undisturbed one, and no process had to be killed that should have ended by itself."""
    return all(run["equal"] and run["codes"] == [0, 0] for run in facts["runs"]) and not any(kill["late"] for kill in facts["kills"])


def start(folder: Path) -> list[subprocess.Popen[bytes]]:
    """The two processes of the run in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "bitnet_jax", "train", *FLAGS, "--out", str(folder), "--coordinator", coordinator, "--processes", "2"]
    return [
        subprocess.Popen([*command, "--process", str(i)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        for i in range(2)
    ]


def disturb(processes: list[subprocess.Popen[bytes]], folder: Path, chance: random.Random) -> dict[str, Any] | None:
    """Ends one or both at a random moment, and waits for what is left; None where they were through before."""
    kind, moment = chance.choice(KINDS), chance.choice(MOMENTS)
    before, written = reached(folder), checkpoints(folder)
    if moment == "start":
        time.sleep(chance.uniform(0, 12))
    elif moment == "steps":
        ahead = before + chance.randint(1, 150)
        while alive(processes) and reached(folder) < ahead:
            time.sleep(0.002)
    else:
        after = max(written, default=0) + 25 * chance.randint(1, 4)
        while alive(processes) and not list(folder.glob(f"checkpoints/{after}*")):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.05))
    if not alive(processes):
        return None
    victim = chance.randrange(2)
    hit = processes if kind == "kill both" else [processes[victim]]
    for process in hit:
        process.send_signal(signal.SIGTERM if kind == "terminate one" else signal.SIGKILL)
    begun, late = time.monotonic(), False
    for process in processes:
        try:
            process.wait(max(0.1, _PATIENCE - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            process.wait()
    return {
        "kind": kind,
        "moment": moment,
        "victim": None if kind == "kill both" else victim,
        "step": reached(folder),
        "seconds": round(time.monotonic() - begun, 2),
        "late": late,
        "codes": [process.returncode for process in processes],
    }


def alive(processes: list[subprocess.Popen[bytes]]) -> bool:
    """Whether both still run."""
    return all(process.poll() is None for process in processes)


def reached(folder: Path) -> int:
    """The last step in the log, 0 where there is none."""
    lines = rows(folder)
    return lines[-1]["step"] if lines else 0


def rows(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of the log."""
    path = folder / run_directory.METRICS
    return [json.loads(row) for row in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.exists() else []


def checkpoints(folder: Path) -> list[int]:
    """Steps of whole checkpoints."""
    return [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """What the log says, without the clock and the flips, which are not counted across a stop."""
    clock = ("tokens_per_second", "model_flop_utilisation", "flips", "flip_fraction")
    return [{name: value for name, value in line.items() if name not in clock} for line in rows(folder)]


def table(folder: Path) -> str:
    """Markdown: what was done to the runs, and what became of them."""
    path = folder / "two-processes.json"
    lines = ["| ended | when | times | until both had ended, s: median | longest |", "|---|---|---:|---:|---:|"]
    if not path.exists():
        return "\n".join([*lines, "| not run | | | | |"])
    facts = json.loads(path.read_text(encoding="utf-8"))
    for kind in KINDS:
        for moment in MOMENTS:
            found = [kill["seconds"] for kill in facts["kills"] if (kill["kind"], kill["moment"]) == (kind, moment)]
            pace = f"{statistics.median(found):.1f} | {max(found):.1f}" if found else " | "
            lines.append(f"| {kind} | {_WHEN[moment]} | {len(found)} | {pace} |")
    runs, late = facts["runs"], sum(kill["late"] for kill in facts["kills"])
    well = sum(run["equal"] and run["codes"] == [0, 0] for run in runs)
    commit = (facts["environment"]["commit"] or "unknown")[:10]
    return "\n".join(
        [
            *lines,
            "",
            f"{len(facts['kills'])} times in {len(runs)} runs of {facts['steps']} steps, of which {well} had the numbers of the "
            f"undisturbed run in every step, bit for bit; {late} times a process hung (seed {facts['seed']}, commit {commit}).",
        ]
    )


def save(facts: dict[str, Any]) -> None:
    """Writes what was seen so far."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    run_directory.write(RESULTS / "two-processes.json", json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
