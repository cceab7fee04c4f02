"""The model file: what is written is what is read, and a file that lies is refused before anything is built from it."""

import json
import struct
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import models
from bitnet_jax import params as trees
from bitnet_jax.config import DType, Layers, QuantConfig
from bitnet_jax.data import byte_tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats import model_file
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets
from bitnet_jax.transformer import Transformer, parameter_shapes
from kernels_pallas import Encoding, PackedTernary
from tests.shapes import tiny

CONFIG = tiny(vocab_size=257, tie_embeddings=False)


ASSETS = Assets(
    tokenizer=byte_tokenizer().to_json(), chat_template="{{ messages }}", prefix=(1,), stop_tokens=(2, 256), sampling={"top_p": 0.9}
)


def as_weights(params, config=CONFIG):
    return leafwise.from_params(params, config, assets=ASSETS, provenance={"seed": 0})


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()


@pytest.fixture
def packed_file(params, tmp_path):
    path = tmp_path / "model.safetensors"
    model_file.write(path, as_weights(trees.pack(params, CONFIG)))
    return path


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("encoding", [None, *Encoding])
def test_reading_gives_what_was_written(params, encoding, tmp_path):
    path = tmp_path / "model.safetensors"
    tree = params if encoding is None else trees.pack(params, CONFIG, encoding)
    size = model_file.write(path, as_weights(tree))
    assert size == path.stat().st_size
    found = model_file.read(path)
    assert (found.config, found.provenance, found.encoding) == (CONFIG, {"seed": 0}, encoding)
    assert found.assets == ASSETS
    assert equal(leafwise.load(found), tree)
    assert equal(leafwise.load(replace(found, tree=None)), tree)
    model = models.load(path)
    assert model.packed is (encoding is not None)
    assert model.need_tokenizer() == byte_tokenizer()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize("layers", list(Layers))
def test_scales_of_shards_are_kept(layers, tmp_path):
    config = replace(CONFIG, quant=QuantConfig(weight_shards=2), layers=layers)
    tree = trees.pack(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), parameter_shapes(config)), config)
    path = tmp_path / "model.safetensors"
    model_file.write(path, as_weights(tree, config))
    found = model_file.read(path)
    assert found.config == config
    assert equal(leafwise.load(found), tree)
    assert equal(leafwise.load(replace(found, tree=None)), tree)


def test_what_is_not_packed_is_stored_in_the_compute_type(params, tmp_path):
    half = replace(CONFIG, dtype=DType.BFLOAT16)
    path = tmp_path / "model.safetensors"
    model_file.write(path, as_weights(trees.pack(params, half), half))
    types = {leaf.dtype.name for _, leaf in trees.leaves(models.load(path).params) if not isinstance(leaf, PackedTernary)}
    assert types == {"bfloat16"}


def rewrite(path, edit):
    """Applies `edit` to the header and the data of a safetensors file."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    edit(header, data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def metadata(**changes):
    return lambda header, data: header["__metadata__"].update(changes)


def config_change(**changes):
    def edit(header, data):
        config = json.loads(header["__metadata__"]["config"])
        config.update(changes)
        header["__metadata__"]["config"] = json.dumps(config)

    return edit


def set_bytes(name, value):
    def edit(header, data):
        start = header[name]["data_offsets"][0]
        data[start : start + len(value)] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (metadata(format="other"), "format 'other': must be 'bitnet-jax-model'"),
        (metadata(format_version="2"), "format_version '2': must be '1'"),
        (metadata(packing="7"), "packing '7': must be '1'"),
        (metadata(encoding="three_bit"), "encoding 'three_bit': must be one of"),
        (metadata(config="{"), "config is not JSON"),
        (metadata(provenance="["), "provenance is not JSON"),
        (metadata(tokenizer="{}"), "not a tokenizer.json"),
        (config_change(hidden_size=10**9), "must be"),
        (config_change(num_layers=3), "has shape"),
        (config_change(num_layers=-1), "num_layers=-1 must be from 1"),
        (config_change(linear="full"), "has no ternary layers"),
        (config_change(tie_embeddings=True), "has tensor head/kernel, which the configuration does not know"),
        (lambda header, data: header.pop("head/kernel"), "safetensors"),
        (set_bytes("blocks/attn/q/kernel.codes", b"\xff"), "blocks/attn/q/kernel"),
        (set_bytes("blocks/attn/q/kernel.scale", struct.pack("<f", float("nan"))), "blocks/attn/q/kernel"),
        (set_bytes("blocks/attn/q/kernel.scale", struct.pack("<f", -1.0)), "blocks/attn/q/kernel"),
        (set_bytes("embed/embedding", struct.pack("<f", float("inf"))), "embed/embedding holds NaN or infinity"),
    ],
)
def test_a_file_that_lies_is_refused(packed_file, edit, message):
    rewrite(packed_file, edit)
    with pytest.raises(UserError) as caught:
        models.load(packed_file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!", b"#!/bin/sh\n" * 10])
def test_what_is_no_model_file_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is no safetensors file|has format ''|is empty"):
        models.load(path)


def test_a_truncated_file_is_refused(packed_file):
    packed_file.write_bytes(packed_file.read_bytes()[:-1])
    with pytest.raises(UserError, match="bytes: must be"):
        models.load(packed_file)


def test_a_path_that_holds_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.safetensors does not exist"):
        models.load(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="is no run"):
        models.load(tmp_path)


def test_a_file_goes_where_it_can(params, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        model_file.write(tmp_path / "model.bin", as_weights(params))
    with pytest.raises(UserError, match="cannot be written: No such file"):
        model_file.write(tmp_path / "no" / "model.safetensors", as_weights(params))
