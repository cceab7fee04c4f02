"""bitnet-jax quickstart: the main job in a few minutes. Trains twins, evaluates, packs, proves, generates, and prints one table."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitnet_jax.cli import arguments
from bitnet_jax.config import DataConfig, DType, Linear, ModelConfig, OptimizerConfig, OutputConfig, Schedule, TrainConfig

TWINS = {"bitnet": Linear.BIT, "twin": Linear.FULL}
FORMS = ("fp32", "bf16", "2bit", "base3")
PROMPT = "KING. "


@dataclass(frozen=True, kw_only=True)
class Args:
    """Trains a small ternary model and its full-precision twin on Shakespeare, packs the first, proves that nothing changed, generates.

    What an earlier quickstart in the same folder has done is not done again.
    """

    out: Path | None = None
    """Folder for everything; None is runs/quickstart, or runs/quickstart-smoke."""
    smoke: bool = False
    """A tiny model and a few steps: does it run at all?"""
    source: str = "shakespeare"
    """Corpus, as in `bitnet-jax train --data.source`."""
    seed: int = 0
    """Seed of parameters and data order."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parsed = arguments.parse(Args, args, "quickstart")
    begun = time.perf_counter()
    out = parsed.out or Path("runs/quickstart-smoke" if parsed.smoke else "runs/quickstart")
    base = configuration(parsed.smoke, parsed.source, parsed.seed)
    if (code := train_twins(base, out)) is not None:
        return code
    facts = measure(base, out)
    facts["seconds"] = time.perf_counter() - begun
    (out / "results.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    report = markdown(facts)
    (out / "report.md").write_text(report, encoding="utf-8")
    show(facts)
    print(f"{facts['proof']}\n\ntext of the packed model, 2 bits a weight:\n{facts['sample']}\n")
    print(f"{out}: results.json, report.md, loss.png, the two runs, and the model in four forms; {facts['seconds']:.0f} s")
    return 0


def configuration(smoke: bool, source: str, seed: int) -> TrainConfig:
    """The run of the BitNet; the twin's differs from it in `model.linear`."""
    steps = 20 if smoke else 320
    return TrainConfig(
        model=ModelConfig.preset("ladder-0.2m" if smoke else "ladder-1m"),
        data=DataConfig(source=source, seq_len=64 if smoke else 128),
        optimizer=OptimizerConfig(
            schedule=Schedule.TWO_STAGE_LINEAR,
            learning_rate=6e-3,
            second_learning_rate=4e-3,
            final_learning_rate=1e-4,
            warmup_steps=steps // 10,
        ),
        output=OutputConfig(log_every=10, eval_every=max(10, steps // 5), eval_windows=64, checkpoint_every=max(10, steps // 2)),
        steps=steps,
        batch_size=4 if smoke else 8,
        seed=seed,
    )


def train_twins(base: TrainConfig, out: Path) -> int | None:
    """Trains both, or finds them trained. Returns an exit code where a signal stopped it, None where both are done."""
    from bitnet_jax.cli.train import train

    for name, linear in TWINS.items():
        config = replace(base, model=replace(base.model, linear=linear))
        print(f"training {'the b1.58 model' if linear is Linear.BIT else 'its full-precision twin'}: {config.steps} steps", file=sys.stderr)
        summary = train(config, out / name)
        if summary.stopped_by is not None:
            print(f"stopped by {summary.stopped_by}; the same command goes on where it was")
            return 130 if summary.stopped_by == "SIGINT" else 0
    return None


def measure(base: TrainConfig, out: Path) -> dict[str, Any]:
    """Everything the table shows, as JSON values."""
    from bitnet_jax import __version__, costs, models, params, plotting
    from bitnet_jax.cli.eval import held_out
    from bitnet_jax.cli.pack import describe
    from bitnet_jax.cli.progress import stages
    from bitnet_jax.formats import model_file
    from bitnet_jax.inference import Sampling, check_parity, generate
    from bitnet_jax.training import logs, loop, run_directory
    from kernels_pallas import Encoding

    loaded = {name: models.load(out / name) for name in TWINS}
    latent = loaded["bitnet"]
    tokenizer = latent.need_tokenizer()
    with stages() as progress:
        text = held_out(out / "bitnet", progress)

    files = {form: out / f"bitnet-{form}.safetensors" for form in FORMS}
    sizes = {
        "fp32": model_file.write(files["fp32"], latent.weights(), dtype=DType.FLOAT32),
        "bf16": model_file.write(files["bf16"], latent.weights(), dtype=DType.BFLOAT16),
    }
    for form, encoding in (("2bit", Encoding.TWO_BIT), ("base3", Encoding.BASE3)):
        packed = params.pack(latent.params, latent.config, encoding)
        sizes[form] = model_file.write(files[form], latent.weights(packed))
        loaded[form] = models.load(files[form])

    length = base.data.seq_len // 2
    prompts = [text.ids[i * length : (i + 1) * length].astype("int32") for i in range(4)]
    # The second form holds the same codes; its products are compared as well, and the text of one form is enough.
    check_parity(latent.params, loaded["base3"].params, latent.config, prompts, max_new_tokens=0).require()
    parity = check_parity(latent.params, loaded["2bit"].params, latent.config, prompts, max_new_tokens=length)
    parity.require()

    rows = {}
    for name, model in loaded.items():
        rows[name] = generation_speed(model, length)
        if name != "base3":
            rows[name] |= evaluate(model, text, base.data.seq_len)
        if name in TWINS:
            paces = [line["tokens_per_second"] for line in logs.read(out / name / run_directory.METRICS) if line.get("tokens_per_second")]
            rows[name]["training_tokens_per_second"] = loop.median_pace(paces)
    sample = generate(
        loaded["2bit"].params,
        latent.config,
        [PROMPT],
        max_new_tokens=length,
        sampling=Sampling(temperature=0.7, top_p=0.95),
        tokenizer=tokenizer,
        seed=base.seed,
    )
    runs = {"b1.58": out / "bitnet", "full precision": out / "twin"}
    figure = plotting.loss_curves(runs, f"{costs.parameters(latent.config).total:,} parameters")
    figure.savefig(out / "loss.png", dpi=120)
    return {
        "version": __version__,
        "provenance": latent.provenance,
        "parameters": costs.parameters(latent.config).total,
        "ternary_parameters": costs.parameters(latent.config).linear,
        "steps": base.steps,
        "train_tokens": base.steps * base.batch_size * base.data.seq_len,
        "bytes_on_disk": sizes,
        "rows": rows,
        "proof": describe(parity),
        "parity": {name: getattr(parity, name) for name in ("weights", "scales", "accumulators", "tokens", "largest_difference")},
        "sample": PROMPT + (sample.rows[0].text or ""),
    }


def evaluate(model: Any, text: Any, window: int) -> dict[str, float | None]:
    """Perplexity and bits per byte on all of the held-out text, in windows of the training length."""
    from bitnet_jax.evaluation import perplexity

    found = perplexity(model.params, model.config, text.ids, window=window, text_bytes=text.text_bytes)
    return {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}


def generation_speed(model: Any, new_tokens: int) -> dict[str, float | None]:
    """Tokens a second of greedy decoding, one row: the median of three."""
    from bitnet_jax.inference import generate

    paces = [
        generate(model.params, model.config, [[1, 2, 3, 4]], max_new_tokens=new_tokens, stop_tokens=()).timing.decode_tokens_per_second
        for _ in range(3)
    ]
    return {"generation_tokens_per_second": sorted(pace or 0.0 for pace in paces)[1]}


# --- the table -------------------------------------------------------------------------------------------------------

COLUMNS = ("", "parameters", "bytes on disk", "perplexity", "bits per byte", "training tokens/s", "generation tokens/s")
_LABELS = {
    "bitnet": "b1.58, latent fp32",
    "bf16": "b1.58, latent bf16",
    "2bit": "b1.58, packed 2-bit",
    "base3": "b1.58, packed 1.6-bit",
    "twin": "full precision, fp32",
}


def cells(facts: dict[str, Any]) -> list[list[str]]:
    """The table's rows as text. The twin has as many parameters of the same types as the latent model, hence its bytes."""
    sizes = facts["bytes_on_disk"]
    bytes_of = {"bitnet": sizes["fp32"], "twin": sizes["fp32"], "bf16": sizes["bf16"], "2bit": sizes["2bit"], "base3": sizes["base3"]}
    table = []
    for name, label in _LABELS.items():
        row = facts["rows"].get(name, {})
        forms = {
            "perplexity": "{:.2f}",
            "bits_per_byte": "{:.4f}",
            "training_tokens_per_second": "{:,.0f}",
            "generation_tokens_per_second": "{:,.0f}",
        }
        shown = ["" if row.get(number) is None else form.format(row[number]) for number, form in forms.items()]
        table.append([label, f"{facts['parameters']:,}", f"{bytes_of[name]:,}", *shown])
    return table


def markdown_table(facts: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *cells(facts)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(facts: dict[str, Any]) -> str:
    """The report in Markdown."""
    sample = facts["sample"].replace("\n", "\n    ")
    parts = (
        "# Quickstart",
        f"{facts['steps']} steps, {facts['train_tokens']:,} tokens; {facts['ternary_parameters']:,} of the parameters are ternary.",
        markdown_table(facts),
        f"The proof: {facts['proof']}.",
        "![loss curves](loss.png)",
        f"Text of the packed model:\n\n    {sample}",
    )
    return "\n\n".join(parts) + "\n"


def show(facts: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(*COLUMNS)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in cells(facts):
        table.add_row(*row)
    console.print(table)
