"""Runs the cells of an experiment that are not finished, one after the other.

    python -m experiments.run scaling                   every cell of experiments/configs/scaling.py
    python -m experiments.run scaling --only '1m-*'     those whose name fits the pattern
    python -m experiments.run scaling --list            what is done, begun and waiting; runs nothing
    python -m experiments.run scaling --smoke           tiny runs into runs/smoke: does it run at all?

A module of experiments/configs has one function, `cells(results)`: the cells that are known from the results so far, so that the later
stages of an experiment (seeds of the best learning rate) may depend on the earlier ones (the sweep). A finished cell leaves one small file,
experiments/results/<experiment>/<cell>.json: configuration, versions, commit, device, times, numbers on held-out text, and a curve. Its
run (checkpoints, metrics.jsonl, tokenizer) stays in runs/<experiment>/<cell>.

Whatever ends the program (a signal, kill -9, a power cut), the same command goes on: finished cells are passed over, and the one under way
goes on from its last checkpoint with the numbers of a run never stopped.
"""

import argparse
import fnmatch
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from bitnet_jax import config as configs
from bitnet_jax.compilation import keep_programs
from bitnet_jax.config import TrainConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.memory import keep_freed_memory
from experiments.cells import Cell, Results, read_results, smoke

CONFIGS = Path(__file__).parent / "configs"
RESULTS = Path(__file__).parent / "results"
_CURVE = ("step", "loss", "learning_rate", "weight_decay", "grad_norm", "flip_fraction", "zero")
_NO_NUMBERS = ("output.", "mesh.", "data.cache_dir:", "data.stall_timeout:")  # fields that change no number of a run


def main(args: list[str] | None = None) -> int:
    """Runs the experiment named on the command line; returns 0 when every cell asked for is finished, 130 after a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=sorted(path.stem for path in CONFIGS.glob("*.py")))
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of cells, as a shell pattern")
    parser.add_argument("--list", action="store_true", help="say what is done, begun and waiting, and run nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny models, four steps, results in runs/smoke")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the results; experiments/results, or that of the runs with --smoke")
    parsed = parser.parse_args(args)
    runs = parsed.runs / "smoke" if parsed.smoke else parsed.runs
    results = parsed.results or (runs / "results" if parsed.smoke else RESULTS)
    experiment = Experiment(parsed.experiment, runs / parsed.experiment, results / parsed.experiment, parsed.only, parsed.smoke)
    if parsed.list:
        return experiment.show()
    return experiment.run()


class Experiment:
    """An experiment and the folders of its runs and results."""

    def __init__(self, name: str, runs: Path, results: Path, only: str = "*", small: bool = False) -> None:
        self.name, self.runs, self.results, self.only, self.small = name, runs, results, only, small
        self.module = importlib.import_module(f"experiments.configs.{name}")

    def cells(self, results: Results) -> list[Cell]:
        """The cells asked for that are known from `results`.

        Raises:
            UserError: no cell that is known fits the pattern, or a result was made with another configuration than its cell has now.
        """
        cells: list[Cell] = self.module.cells(results)
        names = [cell.name for cell in cells]
        assert len(set(names)) == len(names), f"{self.name}: two cells have one name"
        cells = [smoke(cell) if self.small else cell for cell in cells if fnmatch.fnmatchcase(cell.name, self.only)]
        if not cells:
            raise UserError(f"--only {self.only} fits none of the {len(names)} cells of {self.name} that are known so far")
        for cell in cells:
            if cell.name in results:
                made = configs.from_dict(TrainConfig, results[cell.name]["config"], f"{self.results / cell.name}.json: config")
                rows = [row for row in configs.differences(made, cell.config) if not row.startswith(_NO_NUMBERS)]
                if rows:
                    path = self.results / f"{cell.name}.json"
                    raise UserError(f"{path} was made with another configuration: {'; '.join(rows)}; remove it and its run")
        return cells

    def show(self) -> int:
        """Prints the state of every cell that is known so far."""
        results = read_results(self.results)
        for cell in self.cells(results):
            if cell.name in results:
                state = f"done   {results[cell.name]['validation']['loss']:.4f}"
            else:
                state = "begun" if (self.runs / cell.name).is_dir() else "waiting"
            print(f"{cell.name:45} {state}")
        return 0

    def run(self) -> int:
        """Runs cells until none that is asked for and known is left."""
        while True:
            results = read_results(self.results)
            cells = self.cells(results)
            waiting = [cell for cell in cells if cell.name not in results]
            if not waiting:
                print(f"{self.name}: {len(cells)} cells finished, in {self.results}")
                return 0
            cell = waiting[0]
            print(f"{self.name}: {cell.name}, {len(cells) - len(waiting) + 1} of {len(cells)} known", file=sys.stderr)
            facts = train_cell(cell, self.runs / cell.name)
            if facts is None:
                print(f"{self.name}: stopped in {cell.name}; the same command goes on with it", file=sys.stderr)
                return 130
            write_result(self.results / f"{cell.name}.json", {"experiment": self.name, "cell": cell.name, **facts})


def train_cell(cell: Cell, directory: Path) -> dict[str, Any] | None:
    """Trains `cell` in `directory`, from its last checkpoint if there is one, and evaluates it on all of the held-out text; and with
    `ema_decay` the average of its parameters, as "ema".

    Returns:
        What the cell's file holds; None where a signal stopped it.
    """
    import jax

    from bitnet_jax import costs, models
    from bitnet_jax.data import Batches, Tokenizer, prepare
    from bitnet_jax.evaluation import evaluator
    from bitnet_jax.training import logs, loop, run_directory
    from bitnet_jax.training.optimizer import averaged
    from bitnet_jax.training.report import reporter_for

    config, begun = cell.config, time.perf_counter()
    kept = directory / "tokenizer.json"
    data = prepare(config.data, vocab_size=config.model.vocab_size, tokenizer=Tokenizer.read(kept) if kept.exists() else None)

    def evaluate(model: configs.ModelConfig) -> Any:
        return evaluator(model, data.validation.ids, window=config.data.seq_len, text_bytes=data.validation.text_bytes)

    batches = Batches(data.train.ids, seq_len=config.data.seq_len, batch_size=config.batch_size, seed=config.seed)
    try:
        summary = loop.train(
            config,
            directory,
            batches,
            files={"tokenizer.json": data.tokenizer.to_json()},
            provenance={"data": data.provenance},
            evaluate=evaluate(config.model),
            reporter=reporter_for(sys.stderr),
        )
    finally:
        batches.close()
    if summary.stopped_by is not None:
        return None
    lines = logs.read(directory / run_directory.METRICS)
    # In the log rather than in the summary: a run that was killed between its last step and this line is not evaluated again.
    validation = next(line for line in reversed(lines) if line["kind"] == "evaluation" and line["step"] == config.steps)
    also = {}
    if cell.also:
        params = models.load(directory).params
        also = {label: _numbers(evaluate(model)(params)) for label, model in cell.also.items()}
    if config.optimizer.ema_decay is not None:
        also["ema"] = _numbers(evaluate(config.model)(averaged(loop.last_state(config, directory).opt_state)))
    counts = costs.parameters(config.model)
    facts = {
        "config": configs.to_dict(config),
        "parameters": counts.total,
        "ternary_parameters": counts.linear if config.model.linear is configs.Linear.BIT else 0,
        "tokens": config.steps * config.batch_size * config.data.seq_len,
        "epochs": config.steps * config.batch_size * config.data.seq_len / len(data.train),
        "validation": _numbers(validation),
        "also": also,
        **_training(lines, config),
        "seconds": time.perf_counter() - begun,
        "starts": json.loads((directory / run_directory.PROVENANCE).read_text(encoding="utf-8"))["starts"],
    }
    jax.clear_caches()  # the programs of one cell are of no use to the next
    return facts


def _numbers(evaluation: Any) -> dict[str, float]:
    return {name.removeprefix("validation_"): value for name, value in evaluation.items() if name.startswith("validation_")}


def _training(lines: list[dict[str, Any]], config: TrainConfig) -> dict[str, Any]:
    """What the log says of the training: mean loss over the last tenth of the run, pace, and columns of numbers for curves.

    `training_seconds` is summed over the log's intervals and so is that of all starts together, without the steps that were done twice.
    """
    train = [line for line in lines if line["kind"] == "train"]
    last = [line["loss"] for line in train if line["step"] > 0.9 * config.steps and line["loss"] is not None]
    steps = [after["step"] - before["step"] for before, after in zip([{"step": 0}, *train], train, strict=False)]
    tokens = config.batch_size * config.data.seq_len
    paced = [(line["tokens_per_second"], count) for line, count in zip(train, steps, strict=True) if line["tokens_per_second"]]
    paces = sorted(pace for pace, _ in paced)
    flat = [line | {"zero": line["ternary"]["all"]["zero"] if line["ternary"] else None} for line in train]
    return {
        "train_loss": sum(last) / len(last) if last else None,
        "non_finite": train[-1]["non_finite"],
        "tokens_per_second": paces[len(paces) // 2] if paces else None,
        "training_seconds": sum(count * tokens / pace for pace, count in paced),
        "curve": {name: [_short(line[name]) for line in flat] for name in _CURVE},
    }


def _short(value: float | int | None) -> float | int | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_result(path: Path, facts: dict[str, Any]) -> None:
    """Writes a result whole or not at all, with each column of its curve on one line."""
    from bitnet_jax.training import run_directory

    path.parent.mkdir(parents=True, exist_ok=True)
    curve = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in facts["curve"].items())
    text = json.dumps(facts | {"curve": None}, indent=2).replace('\n  "curve": null', f'\n  "curve": {{\n{curve}\n  }}')
    run_directory.write(path, text + "\n")


if __name__ == "__main__":
    keep_programs()
    keep_freed_memory()
    try:
        sys.exit(main())
    except (UserError, RunError) as error:
        sys.exit(f"experiments.run: error: {error}")
