"""What an experiment is made of: cells, each one training run, and the results that finished ones leave."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitnet_jax.config import ModelConfig, TrainConfig
from bitnet_jax.errors import UserError

Results = Mapping[str, Mapping[str, Any]]
"""Name of a finished cell → what its file holds."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of an experiment."""

    name: str
    """Name of its file and of its run's folder."""
    config: TrainConfig
    """The run."""
    also: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Label → the model as which the trained parameters are evaluated as well, such as the BitNet of a full-precision run."""


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished cells in `folder`, by name.

    Raises:
        UserError: a file is not the result of a cell.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
            found[path.stem]["validation"]["loss"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not the result of a cell: remove it, and the cell is run again") from None
    return found


def validation_loss(result: Mapping[str, Any]) -> float:
    """Loss on all of the held-out text, nats per token."""
    return float(result["validation"]["loss"])


def smoke(cell: Cell) -> Cell:
    """The cell as a tiny run of four steps on text that every Python has: does it run at all?"""

    def tiny(model: ModelConfig) -> ModelConfig:
        group = None if model.quant.weight_group is None else 16
        return dataclasses.replace(
            model,
            vocab_size=300,
            hidden_size=32,
            ffn_size=64,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=16,
            quant=dataclasses.replace(model.quant, weight_group=group),
        )

    config = dataclasses.replace(
        cell.config,
        model=tiny(cell.config.model),
        data=dataclasses.replace(cell.config.data, source="stdlib", tokenizer="bytes", seq_len=16, validation_fraction=0.01),
        optimizer=dataclasses.replace(
            cell.config.optimizer, warmup_steps=1, quant_warmup_steps=min(cell.config.optimizer.quant_warmup_steps, 3)
        ),
        output=dataclasses.replace(cell.config.output, log_every=1, checkpoint_every=2),
        steps=4,
        batch_size=2,
        accumulation=1,
    )
    return Cell(name=cell.name, config=config, also={label: tiny(model) for label, model in cell.also.items()})
