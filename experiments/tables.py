"""Every table of the README, made from the files in experiments/results.

    python -m experiments.tables

writes the tables between their markers (`<!-- table: NAME -->` and `<!-- end -->`) into README.md; a test holds README.md to it.
What was not run says "not run".
"""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_jax import costs
from bitnet_jax.benchmark import results as cpu_results
from bitnet_jax.benchmark import table as cpu_table
from bitnet_jax.cli import quickstart as quickstart_command
from experiments import figures, papers
from experiments import plans as plan_cases
from experiments import sizes as size_runs
from experiments import soak as soak_runs
from experiments.cells import read_results
from experiments.configs import ablations as ablation_cells
from experiments.configs import scaling as scaling_cells

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Rewrites README.md and draws the figures of what has results."""
    figure = figures.scaling_figure(RESULTS / "scaling")
    if figure is not None:
        figure.savefig(RESULTS / "scaling" / "scaling.png", dpi=110)
    (RESULTS / "papers").mkdir(exist_ok=True)
    figures.energy_figure().savefig(RESULTS / "papers" / "energy.png", dpi=90)
    figures.memory_figure().savefig(RESULTS / "papers" / "memory.png", dpi=90)
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


def render(text: str) -> str:
    """`text` with every table between its markers made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def quickstart() -> str:
    """What the quickstart printed for seed 0, and the spread over the seeds."""
    runs = {path.stem: _read(path) for path in sorted((RESULTS / "quickstart").glob("seed-*.json"))}
    if "seed-0" not in runs:
        return "not run"
    first = runs["seed-0"]
    start = first["provenance"]["starts"][0]
    bits = {name: _spread([run["rows"][name]["bits_per_byte"] for run in runs.values()]) for name in ("bitnet", "twin")}
    versions = f"Python {start['python']}, jax {start['packages']['jax']}, commit {_commit(start)}"
    return (
        f"{quickstart_command.markdown_table(first)}\n\n"
        f"Seed 0, {first['steps']} steps of {first['train_tokens'] // first['steps']:,} tokens, {first['seconds']:.0f} s in all on "
        f"{start['cores']} cores ({start['device']['kind']}), {versions}.\n"
        f"Bits per byte, mean ± sd of {len(runs)} seeds: b1.58 {bits['bitnet']}, full precision {bits['twin']}.\n"
        f"The proof: {first['proof']}."
    )


def throughput() -> str:
    """Training step of a BitNet against its twin's, by preset and device."""
    lines = [
        "| preset | device | BitNet step / twin step | quartiles | BitNet tokens/s | twin tokens/s | goal | with int8 operands / BitNet |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    found = {}
    for path in sorted((RESULTS / "throughput").glob("*.json")):
        facts = _read(path)
        found[facts["preset"], facts["environment"]["device"]["platform"]] = facts
    for preset in ("ladder-10m", "ladder-100m"):
        for platform, goal in (("cpu", "1.15"), ("gpu", "1.05")):
            facts = found.get((preset, platform))
            if facts is None:
                lines.append(f"| {preset} | {platform} | not run | | | | {goal} | |")
                continue
            ratio, pace, start = facts["ratio"], facts["tokens_per_second"], facts["environment"]
            device = f"{start['device']['kind']}, {start['cores']} cores"
            quartiles = f"{ratio['quartiles'][0]:.2f}–{ratio['quartiles'][1]:.2f}"
            paces = f"{pace['bitnet']:,.0f} | {pace['twin']:,.0f}"
            int8 = "not run"
            if "int8_ratio" in facts:
                low, high = facts["int8_ratio"]["quartiles"]
                int8 = f"{facts['int8_ratio']['median']:.2f} ({low:.2f}–{high:.2f})"
            lines.append(f"| {preset} | {device} | {ratio['median']:.2f} | {quartiles} | {paces} | {goal} | {int8} |")
    return "\n".join(lines)


def conversions() -> str:
    """A random model of 2B4T's shape through every format, and how it opens."""
    path = RESULTS / "conversions" / "bitnet-b1.58-2b4t.json"
    if not path.exists():
        return "not run"
    facts = _read(path)
    lines = ["| from | to | bytes | seconds | peak memory, GiB | of it not mapped files |", "|---|---|---:|---:|---:|---:|"]
    for step in facts["steps"]:
        peaks = f"{step['peak_bytes'] / 2**30:.2f} | {step['peak_bytes_not_mapped'] / 2**30:.2f}"
        lines.append(f"| {step['from']} | {step['to']} | {step['bytes']:,} | {step['seconds']:.0f} | {peaks} |")
    opened = facts["open"]["packed.safetensors"]
    end = "the same bytes as the first" if facts["identical"] else "OTHER bytes than the first"
    lines += [
        "",
        f"The last folder has {end}. Seconds include the proof, on {facts['environment']['cores']} cores beside other work. Opening "
        f"`packed.safetensors`, with every byte checked: {statistics.median(opened['load_seconds']):.2f} s (median of "
        f"{len(opened['load_seconds'])}), {opened['peak_bytes'] / 2**30:.2f} GiB at most, of which the file is "
        f"{opened['bytes'] / 2**30:.2f}.",
    ]
    return "\n".join(lines)


def parity() -> str:
    """Logits of other programs on files that this project wrote, in the worst row of each kind of type."""
    if not all((RESULTS / "parity" / name).exists() for name in ("smollm2.json", "llama.cpp.json")):
        return "not run"
    kinds = {"full precision, f32": ("f32",), "f16, bf16": ("f16", "bf16"), "q8_0": ("q8_0",), "ternary": ("i2_s", "tq1_0", "tq2_0")}
    lines = ["| program | models | " + " | ".join(kinds) + " |", "|---|---|" + "---:|" * len(kinds)]
    for path in sorted((RESULTS / "parity").glob("*.cpp.json")):
        facts = _read(path)
        rows = [row for row in facts["results"] if not row["model"].startswith("SmolLM2")]
        cells = []
        for types in kinds.values():
            worst = max((row for row in rows if row["type"] in types), key=lambda row: row["error"] / row["tolerance"])
            cells.append(f"{worst['error']:.0e} of {worst['tolerance']:.0e}{'' if worst['agrees'] else ' NO'}")
        models = ", ".join(dict.fromkeys(row["model"].split(",")[0] for row in rows))
        lines.append(f"| {facts['program']} | {models} | " + " | ".join(cells) + " |")
    smol = _read(RESULTS / "parity" / "smollm2.json")
    theirs = next(row for row in _read(RESULTS / "parity" / "llama.cpp.json")["results"] if row["model"].startswith("SmolLM2"))
    both = theirs["perplexity"]
    lines += [
        "",
        f"SmolLM2-135M-Instruct, a GGUF file of others (Q4_1): perplexity {smol['perplexity']:.2f} on the leads of {smol['articles']} "
        f"Wikipedia articles; on another text {both['ours']:.2f} here against {both['theirs']:.2f} in llama.cpp.",
    ]
    return "\n".join(lines)


def fuzz() -> str:
    """What mutated files did to the readers."""
    if not list((RESULTS / "fuzz").glob("*.json")):
        return "not run"
    lines = [
        "| reader | mutated inputs | read to the last byte | failures | slowest, s | growth of memory, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for path in sorted((RESULTS / "fuzz").glob("*.json")):
        facts = _read(path)
        lines.append(
            f"| {facts['format']} | {facts['inputs']:,} | {facts['read_whole']:,} | {len(facts['failures'])} | "
            f"{facts['slowest']['seconds']:.2f} | {facts['memory']['grown_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def cpu() -> str:
    """Text generation on a CPU beside other programs: what `bitnet-jax bench --table` shows."""
    parts = []
    for path in sorted((RESULTS / "cpu").glob("*.json")):
        found = cpu_results.read(path)
        parts += [f"{one.title}\n\n{one.markdown()}" for one in cpu_table.tables(found)]
        parts.append(f"On {cpu_table.machine(found)}; medians, with the least and the most.")
    return "\n\n".join(parts) or "not run"


def sizes() -> str:
    """Time and memory of a token against size, packed and full precision."""
    return size_runs.table(RESULTS / "sizes")


def soak() -> str:
    """Runs of two processes that were killed again and again."""
    return soak_runs.table(RESULTS / "soak")


def lossless() -> str:
    """How many greedy tokens of packed engines differ from those of the latent model."""
    lines = ["| compute type | engine | prompts × new tokens | tokens that differ |", "|---|---|---:|---:|"]
    for path in sorted((RESULTS / "lossless").glob("*.json")):
        facts = _read(path)
        asked = facts["settings"]
        lines += [
            f"| {asked['dtype']} | {one['engine']} | {asked['prompts']} × {asked['new_tokens']} | {one['differ']} of {one['tokens']:,} |"
            for one in facts["engines"]
        ]
    return "\n".join(lines) if len(lines) > 2 else "not run"


def kernels_tpu() -> str:
    """What libtpu says of the TPU kernel, beside XLA's products of unpacked weights."""
    path = RESULTS / "kernels" / "tpu_aot.json"
    if not path.exists():
        return "not run"
    facts = _read(path)
    found = {(one["chip"], one["call"], one["form"]): one for one in facts["calls"]}
    ours = [one for (_, _, form), one in found.items() if not form.startswith("xla")]

    def moved(one: dict[str, Any]) -> str:
        return f"{(one['bytes']['arguments'] + one['bytes']['result']) / 1e6:.1f}" if "bytes" in one else "failed"

    def cycles(chip: str, call: str, form: str) -> str:
        one = found.get((chip, call, form), {})
        # Of few rows and integers the profile has the conversions and not the product.
        partly = form in ("xla int8", "xla int4") and (call.endswith("/1") or one.get("cycles", 0) < 2000)
        return f"{one['cycles']:,}" if "cycles" in one and not partly else "–"

    lines = [
        "| TPU | matrix, M | MB: kernel | XLA bf16 | floor, µs | cycles: kernel | with quantiser | XLA int8 | XLA int4 | XLA bf16 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for chip, call in dict.fromkeys((one["chip"], one["call"]) for one in facts["calls"]):
        kernel = found[chip, call, "int8"]
        bytes_ = f"{moved(kernel)} | {moved(found[chip, call, 'xla bf16'])} | {kernel.get('floor_us', 0):.2f}"
        rest = " | ".join(cycles(chip, call, form) for form in ("int8", "fused", "xla int8", "xla int4", "xla bf16"))
        lines.append(f"| {chip} | {call.rsplit('/', 1)[0]}, {call.rsplit('/', 1)[1]} | {bytes_} | {rest} |")
    start = facts["environment"]
    lines += [
        "",
        f"Static estimates of libtpu {facts['versions']['libtpu']} (jax {start['packages']['jax']}, commit {_commit(start)}): not run on "
        f"hardware. {sum('error' not in one for one in ours)} of {len(ours)} calls of the kernel compile. Bytes are arguments and result; "
        "the floor is that of the kernel's call. The cycles of XLA's products leave out the time of memory, those of the kernel do not; "
        "a dash is what the profiler does not model, or only a part of (XLA's int8 and int4 with one row), or was not asked.",
    ]
    return "\n".join(lines)


def plans() -> str:
    """What training and serving would need and take on machines that were not there."""
    return plan_cases.table(RESULTS)


def energy() -> str:
    """Printed energies beside those of `costs.energy`. By formula: it needs no results."""
    lines = ["| size | fp16, J | BitNet, J | ratio | b1, Figure 1 | b1.58, Figure 3 |", "|---|---:|---:|---:|---:|---:|"]
    for size in papers.B1_SHAPES:
        full, ternary = papers.joules(size)
        printed = " | ".join(str(ratios.get(size, "")) for ratios in (papers.B1_RATIOS, papers.B158_RATIOS))
        lines.append(f"| {size} | {full:.4g} | {ternary:.4g} | {full / ternary:.1f} | {printed} |")
    lines += ["", "| 2B4T, Table 1 | J | printed | GB of the linear layers | printed |", "|---|---:|---:|---:|---:|"]
    for name, row in papers.TABLE_2B4T.items():
        lines.append(f"| {name} | {costs.energy(row.config).total:.4f} | {row.joules} | {row.weights:.2f} | {row.memory} |")
    lines += [
        "",
        "Additions and multiplications of 512 tokens at 7 nm, without embedding, head and the energy of moving data. Shapes are b1's: what "
        "b1.58 calls 3B and 7B are 2.7b and 6.7b. 1.3b and 2.7b come out 0.1 below the print because the formula scales the input of "
        f"q, k and v three times; scaled once they are {papers.ratio_scaled_once('1.3b'):.2f} and {papers.ratio_scaled_once('2.7b'):.2f}. "
        "GB are 1.58 or 16 bits for each weight of the linear layers.",
        "",
        "![energy against size, by formula and in the papers](experiments/results/papers/energy.png)",
    ]
    return "\n".join(lines)


def memory() -> str:
    """Printed memory beside that of the weights, and the batches that fit. By formula: it needs no results."""
    lines = [
        "| size | LLaMA fp16, GB | weights | difference | b1.58, GB | weights | difference |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    gaps = []
    for size, (full, ternary) in papers.B158_MEMORY.items():
        weights = papers.weights(size)
        left = "" if full is None else f"{full} | {weights[0]:.2f} | {full - weights[0]:.2f}"
        lines.append(f"| {size} | {left or f' | {weights[0]:.2f} | '} | {ternary} | {weights[1]:.2f} | {ternary - weights[1]:.2f} |")
        if full is not None:
            gaps.append(abs((full - weights[0]) - (ternary - weights[1])))
    cards = papers.card_memory()
    batches = {name: cards.batch(model) for name, model in zip(papers.BATCHES, papers.B158_MEMORY["70b"], strict=True) if model is not None}
    spectra = [round(ours, 2) == printed for size in papers.SPECTRA_BITS for ours, printed in _spectra(size)]
    lines += [
        "",
        "In GB: b1.58, Table 1, and read from Figure 2 from 7b on. Weights are 2 bits in linear layers, fp16 in embedding and head. "
        "What is left over (cache, activations, program: the paper does not say) is the same on both sides to "
        f"{max(gaps):.2f} GB: the weights explain what the two differ by. The shape of 70b is LLaMA's of 65B; LLaMA-2's would take "
        "138 GB, more than is printed.",
        "",
        f"Batch at 70B on two cards of 80 GB (b1.58, Table 3: 16 and 176): {batches['fp16']} and {batches['b1.58']}, by floor((usable - "
        f"model) / sequence). The two printed numbers fix its two constants: {cards.usable:.0f} GB usable, and {cards.sequence:.3f} GB for "
        f"512 tokens, of which keys and values of 8 bits take {cards.cache:.3f}.",
        "",
        f"Spectra's sizes in bits (1.58 a ternary weight, 16 any other): {sum(spectra)} of {len(spectra)} to the printed digits.",
        "",
        "![memory against size, by formula and in the papers](experiments/results/papers/memory.png)",
    ]
    return "\n".join(lines)


def _spectra(size: str) -> list[tuple[float, float]]:
    return list(zip(papers.spectra_bits(size), papers.SPECTRA_BITS[size], strict=True))


def scaling() -> str:
    """Loss of a BitNet and its twin by size, and the law fitted to both."""
    folder = RESULTS / "scaling"
    results = read_results(folder)
    found = scaling_cells.losses(results)
    rates = scaling_cells.rates(results, tuple(scaling_cells.SIZES), scaling_cells.TRIES, scaling_cells.FIRST)
    lines = [
        "| size | parameters | seeds | best rate: b1.58 | full | held-out loss, nats: b1.58 | full | gap | gap, % |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size, model in scaling_cells.SIZES.items():
        sides = [found[side].get(size, {}) for side in scaling_cells.SIDES]
        common = sorted(set(sides[0]) & set(sides[1]))
        count = f"| {size} | {costs.parameters(model).total:,} |"
        if not common:
            lines.append(f"{count} not run | | | | | | |")
            continue
        bit, full = ([side[seed] for seed in common] for side in sides)
        gaps = [one - other for one, other in zip(bit, full, strict=True)]
        best = " | ".join(f"{rates[size, side][1]:.2g}" for side in scaling_cells.SIDES)
        share = 100 * statistics.mean(gaps) / statistics.mean(full)
        lines.append(f"{count} {len(common)} | {best} | {_spread(bit)} | {_spread(full)} | {_spread(gaps)} | {share:.1f} |")
    fits = figures.scaling_fits(figures.scaling_losses(folder))
    if fits is not None:
        lines += ["", "L(N) = a N^b + c by least squares, with 95 % intervals of the bootstrap (`experiments/fit.py`):", ""]
        lines += ["| | a | b | c | seed sd | residual |", "|---|---:|---:|---:|---:|---:|"]
        for side, one in fits.items():
            interval = one.interval()
            shown = " | ".join(
                f"{value:.4g} ({interval[name][0]:.3g} to {interval[name][1]:.3g})" for name, value in one.law._asdict().items()
            )
            label = {"bitnet": "b1.58", "twin": "full precision"}[side]
            lines.append(f"| {label} | {shown} | {one.seed_deviation:.4f} | {one.residual:.4f} |")
    if (folder / "scaling.png").exists():
        lines += ["", "![loss against size, here and in the papers](experiments/results/scaling/scaling.png)"]
    return "\n".join([*lines, *_made(results)])


def ablations() -> str:
    """One change at a time to a small BitNet: mean and standard deviation over seeds."""
    results = read_results(RESULTS / "ablations")

    def losses(variant: str, also: str | None = None) -> dict[int, float]:
        runs = {seed: results.get(f"{ablation_cells.run_name(variant)}-seed{seed}") for seed in ablation_cells.SEEDS}
        found = {seed: run["validation"] if also is None else run["also"][also] for seed, run in runs.items() if run is not None}
        return {seed: numbers["loss"] for seed, numbers in found.items()}

    default = losses("default")
    lines = ["| change | held-out loss, nats | against the default, same seeds | runs | the papers |", "|---|---:|---:|---:|---|"]
    for group in ablation_cells.GROUPS.values():
        lines.append(f"| **{group.title}** | | | | {group.expected} |")
        rows = {variant: losses(variant) for variant in group.variants}
        for variant, (label, name) in ablation_cells.ALSO.items():
            if variant in rows:
                rows[name] = losses(variant, label)
        for variant, found in rows.items():
            if not found:
                lines.append(f"| {variant} | not run | | | |")
                continue
            common = sorted(set(found) & set(default))
            changes = [found[seed] - default[seed] for seed in common]
            change = "" if ablation_cells.run_name(variant) == "default" or not common else _spread(changes, "+")
            lines.append(f"| {variant} | {_spread(list(found.values()))} | {change} | {len(found)} | |")
    return "\n".join([*lines, *_made(results)])


def _made(results: Mapping[str, Any]) -> list[str]:
    """On what, with what and in which time the runs of an experiment were made."""
    if not results:
        return []
    starts = [start for run in results.values() for start in run["starts"]]
    commits = ", ".join(sorted({_commit(start) for start in starts}))
    devices = ", ".join(sorted({f"{start['device']['kind']}, {start['cores']} cores" for start in starts}))
    versions = ", ".join(sorted({f"Python {start['python']}, jax {start['packages']['jax']}" for start in starts}))
    tokens = ", ".join(f"{count:,}" for count in sorted({run["tokens"] for run in results.values()}))
    hours = sum(run["training_seconds"] for run in results.values()) / 3600
    skipped = sum(run["non_finite"] > 0 for run in results.values())
    return [
        "",
        f"{len(results)} runs of {tokens} tokens, {hours:.1f} hours of training; {skipped} of them with steps that were not finite. "
        f"On {devices}; {versions}, commit {commits}. ± is the standard deviation over seeds.",
    ]


TABLES = {
    "quickstart": quickstart,
    "throughput": throughput,
    "conversions": conversions,
    "parity": parity,
    "fuzz": fuzz,
    "lossless": lossless,
    "cpu": cpu,
    "sizes": sizes,
    "soak": soak,
    "kernels_tpu": kernels_tpu,
    "plans": plans,
    "energy": energy,
    "memory": memory,
    "scaling": scaling,
    "ablations": ablations,
}
BY_FORMULA = ("energy", "memory")
"""Tables that are of no run."""


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _commit(start: dict[str, Any]) -> str:
    commit = start["commit"] or "unknown"
    return commit[:10] + ("+changes" if commit.endswith("+changes") else "")


def _spread(values: list[float], sign: str = "") -> str:
    if len(values) == 1:
        return f"{values[0]:{sign}.4f}"
    return f"{statistics.mean(values):{sign}.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
