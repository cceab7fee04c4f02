"""What is written is the same model again, in the bytes that transformers writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitnet_jax.config import ActivationQuantizer, DType, FeedForward, Linear, ModelConfig, NormPlacement, QuantConfig, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats import huggingface, safetensors
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.proof import prove
from bitnet_jax.formats.weights import Weights
from bitnet_jax.params import is_bitlinear
from kernels_pallas import Encoding, PackedTernary
from tests.formats.huggingface.golden import FOLDER, check_parity, open_case, random_latent
from tests.shapes import tiny


def model(**changes: Any) -> Weights:
    return random_latent(tiny(**changes))


def check_equal(mine: Weights, theirs: Weights) -> None:
    for path in leafwise.paths(mine.config):
        a, b = mine.read(path), theirs.read(path)
        if isinstance(a, PackedTernary):
            assert isinstance(b, PackedTernary)
            assert np.array_equal(a.codes, b.codes), path
            a, b = a.scale, b.scale
        assert np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), path


@pytest.mark.parametrize("case", ["bitnet_master", "bitnet_packed", "llama_bitlinear", "llama"])
def test_a_checkpoint_written_again_has_the_bytes_of_transformers(case: str, tmp_path: Path) -> None:
    weights = open_case(case)
    layout = "master" if weights.encoding is None else "packed"
    huggingface.write(tmp_path / "again", weights, layout=layout)
    theirs = [safetensors.File(path) for path in sorted((FOLDER / case).glob("*.safetensors"))]
    mine = safetensors.File(tmp_path / "again" / "model.safetensors")
    assert mine.metadata == {"format": "pt"}
    assert mine.tensors.keys() == {name for file in theirs for name in file.tensors}
    for file in theirs:
        for name, info in file.tensors.items():
            assert (mine.tensors[name].dtype, mine.tensors[name].shape) == (info.dtype, info.shape), name
            assert np.array_equal(mine.read(name).view(np.uint8), file.read(name).view(np.uint8)), name
    assert huggingface.read(tmp_path / "again").config == weights.config


@pytest.mark.parametrize("case", ["llama_autobitlinear", "onebitllm", "trilm_shards"])
def test_a_checkpoint_of_another_layout_is_written_as_one_that_computes_the_same(case: str, tmp_path: Path) -> None:
    weights = open_case(case)
    layout = "master" if weights.encoding is None else "packed"
    huggingface.write(tmp_path / "again", weights, layout=layout)
    check_parity(case, huggingface.read(tmp_path / "again", variant="trilm" if case == "trilm_shards" else None))


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("packed", {}),
        ("packed", {"norm": NormPlacement.NONE, "ffn": FeedForward.RELU2, "tie_embeddings": False}),
        ("packed", {"quant": QuantConfig(weight=WeightQuantizer.ABSMEDIAN)}),
        ("packed", {"quant": QuantConfig(weight=WeightQuantizer.ZERO_ONE)}),
        ("master", {}),
        ("master", {"norm": NormPlacement.NONE, "head_dim": 12, "tie_embeddings": False}),
        ("master", {"linear": Linear.FULL}),
    ],
)
def test_what_is_written_is_read_again(layout: str, changes: dict[str, Any], tmp_path: Path) -> None:
    weights = model(**changes)
    size = huggingface.write(tmp_path / "model", weights, layout=layout)
    assert size == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    found = huggingface.read(tmp_path / "model")
    assert found.config == replace(weights.config, quant=QuantConfig())
    check_equal(leafwise.packed(weights, Encoding.TWO_BIT) if layout == "packed" else weights, found)


def with_scale(weights: Weights, scale: float, other: float = 0.5) -> Weights:
    """The same packed model whose scales are `other`, but for one, which is `scale`."""

    def read(path: leafwise.Path) -> Any:
        leaf = weights.read(path)
        value = scale if path[0] == "block_1" and path[2] == "down" else other
        return replace(leaf, scale=np.array(value, np.float32)) if isinstance(leaf, PackedTernary) else leaf

    return replace(weights, read=read)


def quantization(folder: Path) -> tuple[str, set[str]]:
    """`linear_class`, and the types of the scales."""
    types = {info.dtype for name, info in safetensors.File(folder / "model.safetensors").tensors.items() if name.endswith("_scale")}
    return json.loads((folder / "config.json").read_text())["quantization_config"]["linear_class"], types


def test_the_scale_of_a_llama_divides_if_that_restores_every_scale(tmp_path: Path) -> None:
    numbers = np.arange(0x3F80, 0x4000, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)  # all of bfloat16 from 1 to 2
    rounded_twice = np.float32(1) / (np.float32(1) / numbers) != numbers
    scales = np.random.default_rng(0).uniform(0.5, 1, 100).astype(np.float32)
    lost = np.float32(1) / (np.float32(1) / scales) != scales
    weights = leafwise.packed(model(norm=NormPlacement.NONE), Encoding.TWO_BIT)
    for name, scale, told in (
        ("short", 1 / numbers[rounded_twice][0], ("bitlinear", {"BF16"})),
        ("long", scales[~lost][0], ("bitlinear", {"F32"})),
        ("none", scales[lost][0], ("autobitlinear", {"F32"})),
    ):
        changed = with_scale(weights, float(scale))
        huggingface.write(tmp_path / name, changed)
        assert quantization(tmp_path / name) == told
        check_equal(changed, huggingface.read(tmp_path / name))


def test_weights_alone_quantised_are_written_as_what_they_multiply_with(tmp_path: Path) -> None:
    quant = QuantConfig(activation=ActivationQuantizer.NONE)
    weights = leafwise.packed(model(norm=NormPlacement.NONE, quant=quant), Encoding.TWO_BIT)
    huggingface.write(tmp_path / "model", weights, layout="master")
    found = huggingface.read(tmp_path / "model", variant="trilm")
    assert found.config.quant == replace(quant, weight=WeightQuantizer.ABSMAX)
    check_equal(weights, leafwise.packed(found, Encoding.TWO_BIT))


def test_shards_of_weights_alone_quantised_are_written_as_what_they_multiply_with(tmp_path: Path) -> None:
    quant = QuantConfig(activation=ActivationQuantizer.NONE, weight_shards=2)
    weights = leafwise.packed(model(norm=NormPlacement.NONE, ffn_size=64, quant=quant), Encoding.TWO_BIT)
    huggingface.write(tmp_path / "model", weights, layout="master")
    found = huggingface.read(tmp_path / "model", variant="trilm")
    assert (found.config.quant.weight_group, found.config.quant.weight_shards) == (16, 1)
    prove(weights, found)


def test_scales_are_bfloat16_only_if_that_loses_nothing(tmp_path: Path) -> None:
    weights = leafwise.packed(model(), Encoding.TWO_BIT)
    for scale, dtype in ((0.75, "BF16"), (0.75 + 2**-20, "F32")):
        changed = with_scale(weights, scale)
        huggingface.write(tmp_path / dtype, changed)
        assert quantization(tmp_path / dtype) == ("autobitlinear", {dtype})
        check_equal(changed, huggingface.read(tmp_path / dtype))


def test_floats_keep_the_type_that_loses_nothing_unless_another_is_asked_for(tmp_path: Path) -> None:
    weights = model(dtype=DType.BFLOAT16)
    for name, dtype, stored in (("none", None, "F32"), ("asked", DType.BFLOAT16, "BF16")):
        huggingface.write(tmp_path / name, weights, layout="master", dtype=dtype)
        file = safetensors.File(tmp_path / name / "model.safetensors")
        assert file.tensors["model.norm.weight"].dtype == stored
        declared = json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"]
        assert declared == {"F32": "float32", "BF16": "bfloat16"}[stored]


def test_scales_are_never_rounded_by_the_type_that_is_declared(tmp_path: Path) -> None:
    weights = model(dtype=DType.BFLOAT16)  # its scales are no bfloat16 numbers
    huggingface.write(tmp_path / "model", weights)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "float32"
    with pytest.raises(UserError, match="dtype=bfloat16 rounds the scales"):
        huggingface.write(tmp_path / "rounded", weights, dtype=DType.BFLOAT16)


def test_a_large_model_is_spread_over_files(tmp_path: Path) -> None:
    weights = model(tie_embeddings=False)
    huggingface.write(tmp_path / "model", weights, shard_bytes=4000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert {path.name for path in files} == set(index["weight_map"].values())
    sizes = [sum(info.stop - info.start for info in safetensors.File(path).tensors.values()) for path in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) == 61 * 32 * 4  # the embedding, larger than a file should be
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    check_equal(leafwise.packed(weights, Encoding.TWO_BIT), huggingface.read(tmp_path / "model"))


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    weights = model()

    def damaged(path: leafwise.Path) -> Any:
        if path[0] == "final_norm":
            raise UserError("damaged")
        return weights.read(path)

    with pytest.raises(UserError, match="damaged"):
        huggingface.write(tmp_path / "model", replace(weights, read=damaged), layout="master")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").touch()
    with pytest.raises(UserError, match="exists and is no empty folder"):
        huggingface.write(tmp_path / "model", weights)


def test_nothing_is_written_of_what_transformers_cannot_express(tmp_path: Path) -> None:
    read: list[leafwise.Path] = []
    weights = replace(model(norm=NormPlacement.INSIDE), read=read.append)
    with pytest.raises(UserError, match="transformers cannot express norm=inside"):
        huggingface.write(tmp_path / "model", weights)
    assert (read, list(tmp_path.iterdir())) == ([], [])


def test_only_one_leaf_is_asked_for_at_a_time_and_kernels_twice(tmp_path: Path) -> None:
    weights = leafwise.packed(model(), Encoding.TWO_BIT)
    asked: list[leafwise.Path] = []

    def read(path: leafwise.Path) -> Any:
        asked.append(path)
        return weights.read(path)

    huggingface.write(tmp_path / "model", replace(weights, read=read))
    for path in leafwise.paths(weights.config):
        assert asked.count(path) == (2 if is_bitlinear(path) else 1), path


def bfloat16(config: ModelConfig, weights: Weights) -> Weights:
    def read(path: leafwise.Path) -> Any:
        leaf = weights.read(path)
        return leaf.astype(ml_dtypes.bfloat16) if isinstance(leaf, np.ndarray) else leaf

    return replace(weights, config=config, read=read, stored=DType.BFLOAT16)


def test_ternary_values_that_are_no_bfloat16_numbers_stay_float32(tmp_path: Path) -> None:
    weights = model(norm=NormPlacement.NONE, quant=QuantConfig(activation=ActivationQuantizer.NONE))
    packed = leafwise.packed(bfloat16(weights.config, weights), Encoding.TWO_BIT)
    huggingface.write(tmp_path / "model", packed, layout="master")
    check_equal(packed, leafwise.packed(huggingface.read(tmp_path / "model", variant="trilm"), Encoding.TWO_BIT))
