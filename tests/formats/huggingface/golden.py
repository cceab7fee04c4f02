"""The checkpoints that transformers wrote, and what it computes from them (tests/golden/make_transformers.py)."""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.config import DType, ModelConfig
from bitnet_jax.formats import huggingface, safetensors
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets, Weights
from bitnet_jax.transformer import Transformer

FOLDER = Path(__file__).parents[2] / "golden" / "hf"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
PROMPT = 12
"""Tokens of a row that the greedy continuation begins from, and up to which no activation is near the edge between two codes."""
TOLERANCE = 2e-4
"""Largest difference of logits in float32, as a share of the largest of them."""


def open_case(case: str) -> Weights:
    return huggingface.read(FOLDER / case, variant="trilm" if case.startswith("trilm") else None)


def expected(case: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / case / "expected.npz") as arrays:
        return dict(arrays)


def forward(weights: Weights, dtype: DType = DType.FLOAT32, params: Any = None) -> Callable[[np.ndarray], np.ndarray]:
    """The model as a function of tokens [B, T], compiled once for each shape."""
    params = jax.device_put(leafwise.load(weights) if params is None else params)
    model = Transformer(replace(weights.config, dtype=dtype))
    compiled = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits)  # pyright: ignore[reportAttributeAccessIssue]
    return lambda tokens: np.asarray(compiled(jnp.asarray(tokens)))


def check_parity(case: str, weights: Weights, params: Any = None) -> None:
    """Asserts that `weights` give the logits and the greedy tokens of `case`."""
    theirs = expected(case)
    greedy = theirs["greedy"]
    prompt = theirs["tokens"][: len(greedy), :PROMPT]
    run = forward(weights, params=params)
    row = np.pad(prompt, ((0, 0), (0, greedy.shape[1])))  # what lies behind a position does not reach it
    mine = run(row)
    logits = theirs["logits"][: len(greedy), :PROMPT]
    assert np.abs(mine[:, :PROMPT] - logits).max() <= TOLERANCE * np.abs(logits).max()
    for at in range(PROMPT, row.shape[1]):
        row[:, at] = mine[:, at - 1].argmax(-1)
        mine = run(row)
    assert np.array_equal(row[:, PROMPT:], greedy)


def random_latent(config: ModelConfig, assets: Assets | None = None, deviation: float = 0.2) -> Weights:
    """A model of normal weights, and gains between a half and one and a half."""

    def read(path: leafwise.Path) -> leafwise.Leaf:
        random, shape = np.random.default_rng(zlib.crc32("/".join(path).encode())), leafwise.shape(config, path)
        if len(shape) == 1:
            return random.uniform(0.5, 1.5, shape).astype(np.float32)
        return random.normal(0, 1 if path[0] == "embed" else deviation, shape).astype(np.float32)

    return Weights(config=config, read=read, encoding=None, assets=assets or Assets(), where="a random model")


def copy(case: str, to: Path, edit: Callable[[dict[str, Any]], object] = lambda fields: None) -> Path:
    """A copy of a checkpoint whose config.json `edit` has changed."""
    shutil.copytree(FOLDER / case, to)
    fields = json.loads((to / "config.json").read_text())
    edit(fields)
    (to / "config.json").write_text(json.dumps(fields))
    return to


def rewrite(path: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Applies `edit` to the tensors of a file."""
    file = safetensors.File(path)
    tensors = {name: file.read(name).copy() for name in file.tensors}
    edit(tensors)
    parts = [
        safetensors.Tensor(name, safetensors.dtype_name(value.dtype), value.shape, lambda value=value: [value])
        for name, value in tensors.items()
    ]
    safetensors.write(path, parts, {"format": "pt"})
