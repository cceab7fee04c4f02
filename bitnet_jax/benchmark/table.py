"""Tables of results: a cell is a median, with the least and the most in brackets."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_jax import config as configs
from bitnet_jax import costs
from bitnet_jax.benchmark.settings import BANDWIDTH, OURS, START, TWIN
from bitnet_jax.benchmark.traffic import traffic
from bitnet_jax.config import ModelConfig

PUBLISHED = {
    # Decode of bitnet.cpp against llama.cpp in fp16, threads unlimited: M2 Ultra, i7-13700H (2410.16144, tables 1 and 2).
    "125m": (1.37, 2.37),
    "350m": (1.51, 3.05),
    "700m": (1.70, 3.88),
    "1b": (1.98, 3.88),
    "1.5b": (1.96, 4.47),
    "2.5b": (2.42, 4.19),
    "2b4t": (2.42, 4.19),  # as 2.5B: the same matrices
    "3.8b": (2.99, 5.22),
    "7b": (3.35, 5.68),
    "13b": (3.84, 6.17),
}


@dataclass(frozen=True)
class Table:
    """A title, the columns' names, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in Markdown, without its title; columns from the second on are aligned to the right."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(found: dict[str, Any]) -> list[Table]:
    """Everything that a file of results shows; tables without rows are left out."""
    return [table for table in (speeds(found), bounds(found), starts(found), twins(found), energies(found)) if table.rows]


def machine(found: dict[str, Any]) -> str:
    """The machine and versions of the newest session, in a line."""
    if not found["sessions"]:
        return "nothing was run"
    last = found["sessions"][-1]
    commit = last["commit"] or "unknown"
    commit = commit[:10] + ("+changes" if commit.endswith("+changes") else "")
    return (
        f"{last['device']['kind']}, {last['cores']} cores, {last['time'][:10]}, Python {last['python']}, jax {last['packages']['jax']}, "
        f"commit {commit}"
    )


def speeds(found: dict[str, Any]) -> Table:
    """Prefill and decode of each program, beside the fastest other program; and of ours cold.

    Cold is the first prefill of a process, behind which a file that was not in memory is read from the disk, and the next few tokens.
    """
    columns = (
        "program",
        "threads",
        "prompt + new",
        "prefill, tokens/s",
        "decode, tokens/s",
        "streamed",
        "peak memory, MB",
        "decode : fastest peer",
    )
    rows = []
    for cell, runs in _cells(found):
        peers = [_good(group) for name, group in runs.items() if name != OURS and not name.startswith(TWIN)]
        best = max((_median(group, "decode_tokens_per_second") or 0 for group in peers), default=0)
        for name, group in runs.items():
            good, decode = _good(group), _median(_good(group), "decode_tokens_per_second")
            threads, prompt, generate = cell
            row = [_label(name, group), str(threads), f"{prompt} + {generate}"]
            if not good:
                rows.append([*row, f"failed: {group[-1]['failed']}", "", "", "", ""])
                continue
            row += [_spread(good, f"{key}_tokens_per_second") for key in ("prefill", "decode", "streamed")]
            row += [f"{max(run['peak_bytes'] for run in good) / 1e6:,.0f}"]
            rows.append([*row, f"{decode / best:.2f}" if decode and best and name == OURS else ""])
            if _values(good, "cold_decode_tokens_per_second"):
                cold = [_spread(good, f"cold_{key}_tokens_per_second") for key in ("prefill", "decode")]
                rows.append([f"{row[0]}, cold", *row[1:3], *cold, "", "", ""])
    return Table(f"{found['model']['name']}: speed", columns, rows)


def bounds(found: dict[str, Any]) -> Table:
    """What decode must read, what memory gives, and how near to it decode comes."""
    columns = (
        "threads",
        "prompt + new",
        "linear, MB",
        "vocabulary, MB",
        "first pass made in, s",
        "cache, MB",
        "memory, GB/s",
        "ceiling, tokens/s",
        "reached",
        "share",
    )
    config, storage = configs.from_dict(ModelConfig, found["model"]["config"]), costs.Storage(found["model"]["storage"])
    rows = []
    for (threads, prompt, generate), runs in _cells(found):
        ours = _good(runs.get(OURS, []))
        reads = _good(_latest(run for run in found["runs"] if run["subject"] == BANDWIDTH and run["threads"] == threads))
        pace, bandwidth = _median(ours, "decode_tokens_per_second"), _median(reads, "bytes_per_second")
        if pace is None or bandwidth is None:
            continue
        step = traffic(config, storage, ours[-1]["head"], prompt, generate)
        ceiling = bandwidth / step.total
        rows.append(
            [
                str(threads),
                f"{prompt} + {generate}",
                f"{step.linear / 1e6:,.0f}",
                f"{step.head / 1e6:,.0f} ({ours[-1]['head']})",
                _spread(ours, "first_pass_seconds") if ours[-1]["head"] == "int8" else "",
                f"{step.cache / 1e6:,.0f}",
                _spread(reads, "bytes_per_second", 1e9),
                f"{ceiling:,.1f}",
                f"{pace:,.1f}",
                f"{pace / ceiling:.0%}",
            ]
        )
    return Table(f"{found['model']['name']}: bytes that a step of decode must read", columns, rows)


def starts(found: dict[str, Any]) -> Table:
    """Seconds from the start of the process to the first token."""
    columns = ("threads", "prompt", "nothing compiled, file on disk", "compiled before, file on disk", "compiled before, file in memory")
    rows = []
    runs = [run for run in found["runs"] if run["subject"] == START]
    for threads, prompt in dict.fromkeys((run["threads"], run["prompt"]) for run in runs):
        group = _latest(run for run in runs if (run["threads"], run["prompt"]) == (threads, prompt))
        states = ([run["states"][state] for run in group] for state in ("nothing compiled", "cold", "warm"))
        rows.append([str(threads), str(prompt), *(_spread(list(state), "first_token_seconds") for state in states)])
    return Table(f"{found['model']['name']}: seconds from the start of the process to the first token", columns, rows)


def twins(found: dict[str, Any]) -> Table:
    """Decode against the full-precision twin in XLA, beside the published ratio of other programs."""
    columns = (
        "twin's weights",
        "threads",
        "prompt + new",
        "ternary, tokens/s",
        "twin, tokens/s",
        "decode ratio",
        "prefill ratio",
        "published (bitnet.cpp : llama.cpp)",
    )
    size = found["model"]["name"].split()[0].rsplit("-", 1)[-1]
    published = PUBLISHED.get(size)
    beside = "1.37–6.17 over sizes" if published is None else f"{published[0]:.2f} (M2 Ultra), {published[1]:.2f} (i7-13700H)"
    rows = []
    for (threads, prompt, generate), runs in _cells(found):
        ours = _good(runs.get(OURS, []))
        for name, twin in ((name, _good(group)) for name, group in runs.items() if name.startswith(TWIN)):
            ratios = []
            for key in ("decode", "prefill"):
                fast, slow = (_median(group, f"{key}_tokens_per_second") for group in (ours, twin))
                ratios.append(f"{fast / slow:.2f}" if fast and slow else "")
            if any(ratios):
                paces = [_spread(group, "decode_tokens_per_second") for group in (ours, twin)]
                rows.append([name.removeprefix(f"{TWIN}, "), str(threads), f"{prompt} + {generate}", *paces, *ratios, beside])
    return Table(f"{found['model']['name']}: against the full-precision twin", columns, rows)


def energies(found: dict[str, Any]) -> Table:
    """Joules a token: counted, where the machine counts them; and by the papers' model of arithmetic alone."""
    columns = ("threads", "counted, J/token", "model of the papers, mJ/token", "model, full precision in fp16")
    config = configs.from_dict(ModelConfig, found["model"]["config"])
    ternary, full = (costs.energy(config, precision, tokens=1).total for precision in (costs.Precision.BITNET, costs.Precision.FP16))
    rows = []
    for threads in dict.fromkeys(run["threads"] for run in found["runs"] if run["subject"] == OURS):
        runs = _good(_latest(run for run in found["runs"] if run["subject"] == OURS and run["threads"] == threads))
        counted = (
            _spread([run for run in runs if run.get("joules_per_token") is not None], "joules_per_token") or "this machine does not count"
        )
        rows.append([str(threads), counted, f"{1e3 * ternary:.3g}", f"{1e3 * full:.3g}"])
    return Table(f"{found['model']['name']}: energy", columns, rows)


# --- choosing and forming --------------------------------------------------------------------------------------------


def _cells(found: dict[str, Any]) -> list[tuple[tuple[int, int, int], dict[str, list[dict[str, Any]]]]]:
    """The newest runs of each program, by (threads, prompt, generate); ours first, then the others as they were given."""
    cells: dict[tuple[int, int, int], dict[str, list[dict[str, Any]]]] = {}
    for run in found["runs"]:
        if run["subject"] not in (BANDWIDTH, START):
            cell = cells.setdefault((run["threads"], run["prompt"], run["generate"]), {})
            cell.setdefault(run["subject"], []).append(run)

    def place(name: str) -> int:
        return 0 if name == OURS else 1 if name.startswith(TWIN) else 2

    return [(cell, {name: _latest(runs[name]) for name in sorted(runs, key=place)}) for cell, runs in cells.items()]


def _latest(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the same code and command as the last: what was measured before it was changed is not mixed with what came after."""
    runs = list(runs)
    return [run for run in runs if all(run.get(name) == runs[-1].get(name) for name in ("source", "command"))]


def _good(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if "failed" not in run]


def _label(name: str, group: Sequence[dict[str, Any]]) -> str:
    detail = group[-1]["command"].removeprefix("implementation=") if name == OURS else ""
    failed = sum("failed" in run for run in group)
    return name + (f" ({detail})" if detail else "") + (f", {failed} of {len(group)} failed" if 0 < failed < len(group) else "")


def _values(runs: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [run[key] for run in runs if run.get(key) is not None]


def _median(runs: Iterable[dict[str, Any]], key: str) -> float | None:
    values = _values(runs, key)
    return statistics.median(values) if values else None


def _spread(runs: Iterable[dict[str, Any]], key: str, unit: float = 1.0) -> str:
    values = [value / unit for value in _values(runs, key)]
    if not values:
        return ""
    form = "{:,.0f}" if min(values) >= 100 else "{:.1f}" if min(values) >= 1 else "{:.3f}"
    median, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least}–{most})" if len(values) > 1 else median
