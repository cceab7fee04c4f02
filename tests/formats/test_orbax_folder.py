"""The orbax folder: restored as it was, by us and by a program that knows orbax alone; damage is one line."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax import models
from bitnet_jax import params as trees
from bitnet_jax.config import DType
from bitnet_jax.errors import UserError
from bitnet_jax.formats import orbax_folder
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.random_model import random_packed
from bitnet_jax.formats.weights import Assets, Weights
from kernels_pallas import Encoding
from tests.shapes import tiny

CONFIG = tiny(hidden_size=128, ffn_size=128, head_dim=32, dtype=DType.BFLOAT16)


def equal(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture
def packed() -> Weights:
    return random_packed(CONFIG, Assets(prefix=(3,), sampling={"top_p": 0.5}))


@pytest.mark.parametrize("encoding", [None, *Encoding])
def test_reading_gives_what_was_written(tmp_path: Path, packed: Weights, encoding: Encoding | None) -> None:
    tree = trees.unpack(leafwise.load(packed)) if encoding is None else leafwise.load(leafwise.packed(packed, encoding))
    weights = leafwise.from_params(tree, CONFIG, assets=packed.assets, provenance={"a": [1]})
    size = orbax_folder.write(tmp_path / "model", weights)
    assert size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    found = orbax_folder.read(tmp_path / "model")
    assert (found.config, found.encoding, found.assets, found.provenance) == (CONFIG, encoding, packed.assets, {"a": [1]})
    assert equal(leafwise.load(found), tree)
    assert models.load(tmp_path / "model").kind == "orbax folder"


def test_a_program_that_knows_orbax_alone_restores_the_tree(tmp_path: Path, packed: Weights) -> None:
    import orbax.checkpoint as ocp

    orbax_folder.write(tmp_path / "model", packed)
    with ocp.StandardCheckpointer() as checkpointer:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = checkpointer.metadata((tmp_path / "model" / "params").absolute()).item_metadata.tree
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
        tree = checkpointer.restore((tmp_path / "model" / "params").absolute(), target)
    expected = leafwise.load(packed)["blocks"]["attn"]["q"]["kernel"]
    assert np.array_equal(tree["blocks"]["attn"]["q"]["kernel"]["codes"], expected.codes)
    assert np.array_equal(tree["blocks"]["attn"]["q"]["kernel"]["scale"], expected.scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "must have format 'bitnet-jax-orbax'"),
        ({"format_version": 2}, "must have format 'bitnet-jax-orbax' and format_version 1"),
        ({"encoding": "three_bit"}, "'three_bit' is not a valid Encoding"),
        ({"stored": "float8"}, "'float8' is not a valid DType"),
        ({"config": 3}, "must have config, of type dict"),
        ({"assets": {"prefix": [99]}}, "prefix must be a list of token ids"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, packed: Weights, change: Any, message: str) -> None:
    orbax_folder.write(tmp_path / "model", packed)
    manifest = tmp_path / "model" / "model.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(UserError, match=message):
        orbax_folder.read(tmp_path / "model")


def test_a_tree_of_another_shape_is_refused_in_one_line(tmp_path: Path, packed: Weights) -> None:
    orbax_folder.write(tmp_path / "model", packed)
    manifest = tmp_path / "model" / "model.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"config": content["config"] | {"num_layers": 3}}))
    with pytest.raises(UserError, match=r"cannot be restored: params/blocks/attn_norm/scale must have shape \(3, ") as caught:
        orbax_folder.read(tmp_path / "model")
    assert "\n" not in str(caught.value)
