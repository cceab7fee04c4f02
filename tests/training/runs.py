"""A run that is trained in a second or two, and what tests ask of it."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_jax.config import DataConfig, ModelConfig, OptimizerConfig, OutputConfig, TrainConfig
from bitnet_jax.training import run_directory

VOCAB, BATCH, TIME = 23, 4, 8


def small_config(steps: int = 8, **changes: Any) -> TrainConfig:
    """A one-layer model and few steps; `output_…` and `optimizer_…` change fields of those parts, other names those of the run."""
    parts: dict[str, dict[str, Any]] = {
        "output": {"log_every": 1, "checkpoint_every": 3, "tensorboard": False},
        "optimizer": {"warmup_steps": 2, "learning_rate": 1e-2, "second_learning_rate": 5e-3},
    }
    for name in list(changes):
        part, _, rest = name.partition("_")
        if part in parts and rest:
            parts[part][rest] = changes.pop(name)
    model = ModelConfig(
        vocab_size=VOCAB, hidden_size=16, ffn_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_seq_len=TIME
    )
    fields: dict[str, Any] = {
        "model": model,
        "data": DataConfig(seq_len=TIME),
        "optimizer": OptimizerConfig(**parts["optimizer"]),
        "output": OutputConfig(**parts["output"]),
        "steps": steps,
        "batch_size": BATCH,
    }
    return TrainConfig(**(fields | changes))


class Batches:
    """An endless iterator over random batches that are a function of their number; `at` is called with the number of each."""

    def __init__(self, at: Any = None) -> None:
        self.number = 0
        self.at = at

    def __next__(self) -> dict[str, np.ndarray]:
        if self.at is not None:
            self.at(self.number)
        random = np.random.default_rng(self.number)
        tokens = np.sort(random.integers(0, VOCAB, (BATCH, TIME + 1)), -1).astype(np.int32)
        self.number += 1
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    def get_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class Recorder:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.events.append((name, *arguments))

    def of(self, name: str) -> list[Any]:
        return [event[1] if len(event) > 1 else None for event in self.events if event[0] == name]


def losses(directory: Path) -> dict[int, str]:
    """The numbers of every training line that do not depend on the clock, as JSON text, by step; a step twice is an error."""
    lines: dict[int, str] = {}
    for row in (directory / run_directory.METRICS).read_text().splitlines():
        line = json.loads(row)
        if line["kind"] == "train":
            assert line["step"] not in lines
            lines[line["step"]] = json.dumps(
                {name: line[name] for name in line if name not in ("tokens_per_second", "model_flop_utilisation")}
            )
    return lines


def same(one: Any, other: Any) -> bool:
    """Whether two trees have the same structure and the same bits."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).dtype == np.asarray(b).dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
