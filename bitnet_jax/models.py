"""A model as people use it: configuration, parameters and tokenizer, from any format that this project reads."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bitnet_jax import config as configs
from bitnet_jax.config import ModelConfig, TrainConfig
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats import model_file
from bitnet_jax.params import Params, leaves
from bitnet_jax.training import checkpoints, run_directory
from bitnet_jax.transformer import parameter_shapes
from kernels_pallas import PackedTernary


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that was loaded.

    Attributes:
        config: shape and arithmetic.
        params: latent or packed parameters.
        tokenizer: None where the source has none.
        provenance: where it comes from, as plain JSON values.
        kind: "run" or "model file".
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    provenance: dict[str, Any]
    kind: str

    @property
    def packed(self) -> bool:
        """Whether the linear layers are packed."""
        return any(isinstance(leaf, PackedTernary) for _, leaf in leaves(self.params))

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UserError where there is none."""
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer: text cannot become tokens")
        return self.tokenizer


_warn = logging.getLogger("bitnet_jax").warning


def load(path: str | Path, warn: Callable[[str], None] = _warn) -> Model:
    """The model at `path`: a run's folder (its newest whole checkpoint), or a model file (.safetensors).

    Args:
        path: folder or file.
        warn: called with one line for each damaged checkpoint that was passed over.

    Raises:
        UserError: there is nothing at `path`, or nothing that this project reads, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _load_run(path, warn)
    if not path.exists():
        raise UserError(f"{path} does not exist: must be a run's folder or a model file (.safetensors)")
    contents = model_file.read(path)
    tokenizer = Tokenizer.from_json(contents.tokenizer, f"{path}: tokenizer") if contents.tokenizer else None
    params = jax.tree.map(jnp.asarray, contents.params)
    return Model(config=contents.config, params=params, tokenizer=tokenizer, provenance=contents.provenance, kind="model file")


def _load_run(directory: Path, warn: Callable[[str], None]) -> Model:
    if not run_directory.is_run(directory):
        raise UserError(f"{directory} is no run: it has no {run_directory.CONFIG}")
    config = configs.read(TrainConfig, directory / run_directory.CONFIG).model
    params, step = checkpoints.read_params(directory / run_directory.CHECKPOINTS, parameter_shapes(config), warn)
    text = directory / "tokenizer.json"
    return Model(
        config=config,
        params=params,
        tokenizer=Tokenizer.read(text) if text.exists() else None,
        provenance={"run": str(directory), "step": step, **load_provenance(directory)},
        kind="run",
    )


def load_provenance(directory: Path) -> dict[str, Any]:
    """The record of a run's starts; empty where there is none. Raises UserError where it is no JSON object."""
    path = directory / run_directory.PROVENANCE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must be an object")
    return found
