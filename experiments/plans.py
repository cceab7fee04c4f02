"""What training and serving the published sizes would need and take on TPU pods: plans, not runs.

    python -m experiments.plans              by formula, all of them: seconds
    python -m experiments.plans --compile    also compiled by libtpu (extra `tpu-aot`): minutes each, one after another

Writes experiments/results/plans/NAME.json for each plan as it comes. What is there is not made again; what was not compiled is not there.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from bitnet_jax import config as configs
from bitnet_jax import planning
from bitnet_jax.benchmark.settings import BANDWIDTH
from bitnet_jax.benchmark.traffic import traffic
from bitnet_jax.cli.arguments import from_preset
from bitnet_jax.cli.plan import mesh_config
from bitnet_jax.config import DataConfig, DType, Gather, Remat, TrainConfig
from bitnet_jax.costs import Storage
from bitnet_jax.training import run_directory

RESULTS = Path(__file__).parent / "results" / "plans"
TOKENS = 4e12
"""What 2B4T was trained on (2504.12285)."""
BATCH, LENGTH = 512, 2048
"""A step of a million tokens, as in b1.58; that of the small model, which is there for its transfers, is 32 x 256."""
CONTEXT = 2048
"""Tokens that a decode step has room for."""

MODELS = {
    "2b4t": "bitnet-b1.58-2b4t",
    "7b": "bitnet-b1.58-7b",
    "13b": "dummy-13b",
    "70b": "dummy-70b",
    "100b": "dummy-100b",
}
"""Presets. From 13b on they are the shapes that bitnet.cpp was measured with (2410.16144), which were never trained."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training step on one machine."""

    model: str
    topology: str
    mesh: str
    gather: Gather = Gather.LATENT
    batch: int = BATCH
    length: int = LENGTH

    @property
    def name(self) -> str:
        """Of its result file."""
        gather = "" if self.gather is Gather.LATENT else f"-{self.gather.value}"
        return f"{self.model}-{self.topology.replace(':', '-')}{gather}"

    @property
    def config(self) -> TrainConfig:
        """The run: bfloat16, and every block's input kept."""
        base = from_preset(MODELS.get(self.model, self.model))
        model = replace(base.model, dtype=DType.BFLOAT16, remat=Remat.FULL)
        return replace(
            base, model=model, data=DataConfig(seq_len=self.length), batch_size=self.batch, mesh=mesh_config(self.mesh, self.gather)
        )


CASES = (
    Case(model="2b4t", topology="v5p:4x4x4", mesh="fsdp=64"),
    Case(model="2b4t", topology="v6e:8x8", mesh="fsdp=64"),
    *(Case(model="7b", topology="v5p:4x4x4", mesh="fsdp=64", gather=gather) for gather in Gather),
    Case(model="7b", topology="v6e:8x8", mesh="fsdp=64"),
    Case(model="13b", topology="v5p:4x4x8", mesh="fsdp=128"),
    Case(model="13b", topology="v6e:8x16", mesh="fsdp=128"),
    Case(model="70b", topology="v5p:8x8x8", mesh="fsdp=64,tensor=8"),
    Case(model="70b", topology="v6e:16x16", mesh="fsdp=32,tensor=8"),
    Case(model="100b", topology="v5p:8x8x8", mesh="fsdp=64,tensor=8"),
    Case(model="100b", topology="v6e:16x16", mesh="fsdp=32,tensor=8"),
)
SMALL = tuple(Case(model="ladder-3m", topology="v5e:2x2", mesh="fsdp=4", gather=gather, batch=32, length=256) for gather in Gather)
"""What is sent as compiled, of a model that compiles in a minute."""
CHIPS = ("v5p:2x2x1", "v6e:1x1")
"""Of one of these, packed models are served."""


def main(args: list[str] | None = None) -> None:
    """Makes what is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also by libtpu")
    parser.add_argument("--only", default="", help="plans whose names have this in them")
    parsed = parser.parse_args(args)
    jax.config.update("jax_platforms", "cpu")
    RESULTS.mkdir(parents=True, exist_ok=True)
    sides = ("formula", "compiled") if parsed.compile else ("formula",)
    for side in sides:
        for model in MODELS:
            for topology in CHIPS:
                name = f"serve-{model}-{topology.split(':')[0]}"
                if parsed.only in name:
                    _add(name, side, lambda side=side, model=model, topology=topology: _serving(model, topology, side))
        for case in (*SMALL, *CASES):
            if parsed.only in case.name:
                _add(case.name, side, lambda side=side, case=case: _training(case, side))


def _add(name: str, side: str, make: Any) -> None:
    """Enters the plan made this way into its file, if it is not there."""
    path = RESULTS / f"{name}.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if side in facts:
        return
    facts |= {side: make() | {"environment": run_directory.environment()}}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(name, side, facts[side]["plan"]["total"] / 1e9, "GB", file=sys.stderr, flush=True)


def _training(case: Case, side: str) -> dict[str, Any]:
    machine = planning.topology(case.topology)
    devices = planning.devices(machine) if side == "compiled" else None
    rates = planning.rates(machine)
    plan = planning.training(case.config, machine, rates, devices, TOKENS)
    return {"plan": planning.to_json(plan), "rates": planning.to_json(rates), "mesh": case.mesh, "config": configs.to_dict(case.config)}


def _serving(model: str, topology: str, side: str) -> dict[str, Any]:
    machine = planning.topology(topology)
    device = planning.devices(machine)[0] if side == "compiled" else None
    config, rates = replace(from_preset(MODELS[model]).model, dtype=DType.BFLOAT16), planning.rates(machine)
    plan = planning.serving(config, rates, 1, CONTEXT, device)
    return {"plan": planning.to_json(plan), "rates": planning.to_json(rates), "config": configs.to_dict(config)}


# --- the table -------------------------------------------------------------------------------------------------------


def table(results: Path) -> str:
    """The tables in Markdown, of the plans and the measured bandwidths in the folder `results`."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "plans").glob("*.json"))}
    lines = [
        "| training | machine | mesh | sent | GB a chip: formula | compiled | there is | GB sent a step: formula | compiled | step, s "
        "| MFU, % | days for 4T tokens |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_training_row(case, found.get(case.name)) for case in CASES),
        "",
        "| ladder-3m on v5e:2x2, fsdp=4: sent | MB of all-gathers a step: formula | compiled | of everything: formula | compiled |",
        "|---|---:|---:|---:|---:|",
        *(_small_row(case, found.get(case.name, {})) for case in SMALL),
        "",
        "| serving, one row | a chip, float32 table: weights read a token, GB | cache of 2,048 tokens, GB "
        "| GB a v5p chip: formula | compiled | at most tokens/s: a v5p chip | a v6e chip "
        "| a CPU, int8 first pass of the table: weights read a token, GB | GB/s for 5 tokens/s | for 7 | this CPU, at most tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    read = _read_bandwidth(results)
    for model in MODELS:
        sides = [found.get(f"serve-{model}-{chip.split(':')[0]}") for chip in CHIPS]
        lines.append(_serving_row(model, [side for side in sides if side], read))
    if read:
        lines += [
            "",
            f"This CPU reads {statistics.median(read) / 1e9:.1f} GB/s ({min(read) / 1e9:.1f} to {max(read) / 1e9:.1f} in {len(read)} "
            "measurements with two threads, `experiments/results/cpu`); its tokens/s are with nothing in the cache.",
        ]
    return "\n".join(lines)


def _training_row(case: Case, facts: dict[str, Any] | None) -> str:
    start = f"| {case.model} | {case.topology} | {case.mesh} | {case.gather.value} |"
    if facts is None:
        return f"{start} not run | | | | | | | |"
    plans = [facts["formula"]["plan"], facts.get("compiled", {}).get("plan")]
    best = plans[1] or plans[0]
    size = " | ".join(f"{plan['total'] / 1e9:.1f}" if plan else "not run" for plan in plans)
    sent = " | ".join(f"{sum(one['bytes'] for one in plan['sent']) / 1e9:.1f}" if plan else "not run" for plan in plans)
    row = f"{start} {size} | {best['capacity'] / 1e9:.1f} | {sent} |"
    if not best["fits"]:
        return f"{row} does not fit | | |"
    step = f"{best['times']['least']:.2f}–{best['times']['most']:.2f}"
    return f"{row} {step} | {100 * best['mfu'][0]:.0f}–{100 * best['mfu'][1]:.0f} | {best['days'][1]:,.0f}–{best['days'][0]:,.0f} |"


def _small_row(case: Case, facts: dict[str, Any]) -> str:
    def sent(side: str, kinds: str) -> str:
        if side not in facts:
            return "not run"
        return f"{sum(one['bytes'] for one in facts[side]['plan']['sent'] if one['kind'].startswith(kinds)) / 1e6:.1f}"

    cells = [sent(side, kinds) for kinds in ("all-gather", "") for side in ("formula", "compiled")]
    return f"| {case.gather.value} | " + " | ".join(cells) + " |"


def _serving_row(model: str, sides: list[dict[str, Any]], read: list[float]) -> str:
    if len(sides) < len(CHIPS):
        return f"| {model} | not run |" + " |" * 9
    formula, compiled = sides[0]["formula"]["plan"], sides[0].get("compiled", {}).get("plan")
    cache = formula["memory"]["keys and values"]
    plans = [side.get("compiled", side["formula"])["plan"] for side in sides]
    pace = " | ".join(f"{plan['tokens_per_second']:,.0f}" if plan["fits"] else "does not fit" for plan in plans)
    size = f"{formula['total'] / 1e9:.2f} | " + (f"{compiled['total'] / 1e9:.2f}" if compiled else "not run")
    weights = traffic(from_preset(MODELS[model]).model, Storage.TWO_BIT, "int8", 0, 0).total
    here = f"{statistics.median(read) / weights:.1f}" if read else "not run"
    return (
        f"| {model} | {(formula['bytes'] - cache) / 1e9:.2f} | {cache / 1e9:.2f} | {size} | {pace} "
        f"| {weights / 1e9:.2f} | {5 * weights / 1e9:.1f} | {7 * weights / 1e9:.1f} | {here} |"
    )


def _read_bandwidth(results: Path) -> list[float]:
    """Bytes a second at which two threads read memory, wherever `bench` measured it."""
    runs = [run for path in sorted((results / "cpu").glob("*.json")) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    return [run["bytes_per_second"] for run in runs if run["subject"] == BANDWIDTH and run["threads"] == 2]


if __name__ == "__main__":
    main()
