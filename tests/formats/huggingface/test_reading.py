"""A checkpoint of transformers is the model that transformers runs, and a damaged one is refused in one line."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitnet_jax import params as trees
from bitnet_jax.config import ActivationQuantizer, DType, FeedForward, Linear, NormPlacement, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats import huggingface
from bitnet_jax.formats import weights as leafwise
from kernels_pallas import Encoding, PackedTernary
from tests.formats.huggingface.golden import CASES, FOLDER, check_parity, copy, expected, forward, open_case, rewrite

# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case: str) -> None:
    check_parity(case, open_case(case))


@pytest.mark.parametrize("case", ["bitnet_master", "bitnet_packed"])
def test_in_bfloat16_the_logits_are_as_far_from_float32_as_those_of_transformers(case: str) -> None:
    # The rule: both are compared with transformers in float32, over 8 x 24 positions, by the root of the mean squared difference. bfloat16
    # moves some activations to the next of their 255 codes, so single logits differ by more than its step, and which ones is chance:
    # hence the tenth that ours may be further.
    theirs = expected(case)

    def distance(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - theirs["logits"]) ** 2)))

    mine = distance(forward(open_case(case), DType.BFLOAT16)(theirs["tokens"]))
    assert 0 < mine <= 1.1 * distance(theirs["logits_bf16"].view(ml_dtypes.bfloat16).astype(np.float32))


def test_what_is_read_says_what_kind_of_model_it_is() -> None:
    packed, trilm, shards = (open_case(case) for case in ("bitnet_packed", "trilm", "trilm_shards"))
    config = packed.config
    assert (config.norm, config.ffn, config.rope_theta, config.norm_eps) == (NormPlacement.SUB, FeedForward.RELU2, 5e5, 1e-5)
    assert (packed.encoding, packed.stored, config.dtype) == (Encoding.TWO_BIT, DType.BFLOAT16, DType.BFLOAT16)
    assert trilm.config.quant.weight is WeightQuantizer.ABSMAX
    assert trilm.config.quant.activation is ActivationQuantizer.NONE
    assert (trilm.config.quant.weight_group, shards.config.quant.weight_group) == (None, 16)
    assert (trilm.stored, trilm.config.dtype) == (DType.FLOAT32, DType.FLOAT32)  # squared relu overflows float16
    assert open_case("llama").config.linear is Linear.FULL


def test_packing_a_trilm_keeps_its_weights_exactly() -> None:
    for case in ("trilm", "trilm_shards"):
        latent = open_case(case)
        packed = leafwise.packed(latent, Encoding.TWO_BIT)
        for path in leafwise.paths(latent.config):
            if trees.is_bitlinear(path):
                restored = trees.unpack({"kernel": packed.read(path)})["kernel"]
                assert np.array_equal(restored, np.asarray(latent.read(path)).astype(np.float32)), path


# --- what parity would miss if it were broken ------------------------------------------------------------------------


def test_another_activation_is_caught() -> None:
    weights = open_case("bitnet_packed")
    with pytest.raises(AssertionError):
        check_parity("bitnet_packed", replace(weights, config=replace(weights.config, ffn=FeedForward.SWIGLU)))


def test_a_norm_in_another_place_is_caught() -> None:
    weights = open_case("bitnet_packed")
    params = leafwise.load(weights)
    with pytest.raises(AssertionError):
        check_parity("bitnet_packed", replace(weights, config=replace(weights.config, norm=NormPlacement.NONE)), params)


def test_two_norms_changed_for_each_other_are_caught() -> None:
    weights = open_case("bitnet_packed")
    params = leafwise.load(weights)
    blocks = params["blocks"]
    blocks["attn_norm"], blocks["ffn_norm"] = blocks["ffn_norm"], blocks["attn_norm"]
    with pytest.raises(AssertionError):
        check_parity("bitnet_packed", weights, params)


@pytest.mark.parametrize(("case", "other"), [("llama_bitlinear", "autobitlinear"), ("llama_autobitlinear", "bitlinear")])
def test_a_scale_in_the_other_direction_is_caught(case: str, other: str, tmp_path: Path) -> None:
    folder = copy(case, tmp_path / "copy", lambda fields: fields["quantization_config"].update(linear_class=other))
    with pytest.raises(AssertionError):
        check_parity(case, huggingface.read(folder))


def test_the_interleaved_rotary_layout_is_caught() -> None:
    weights = open_case("llama")
    params, config = leafwise.load(weights), weights.config
    for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
        kernel = params["blocks"]["attn"][name]["kernel"]
        split = kernel.reshape(*kernel.shape[:2], heads, 2, config.head_dim // 2)
        params["blocks"]["attn"][name]["kernel"] = np.swapaxes(split, -1, -2).reshape(kernel.shape)
    with pytest.raises(AssertionError):
        check_parity("llama", weights, params)


# --- folders and files -----------------------------------------------------------------------------------------------


def refused(folder: Path, message: str, variant: str | None = None) -> None:
    """Reading `folder` whole fails with one line that holds `message`."""
    with pytest.raises(UserError) as caught:
        leafwise.load(huggingface.read(folder, variant=variant))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_recognised_by_its_tensors_or_its_architecture(tmp_path: Path) -> None:
    assert huggingface.is_checkpoint(FOLDER / "llama")
    (tmp_path / "config.json").write_text('{"model": {}, "data": {}}')  # a run's
    assert not huggingface.is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert huggingface.is_checkpoint(tmp_path)
    assert not huggingface.is_checkpoint(tmp_path / "nothing")


def test_pickles_are_named_and_never_opened(tmp_path: Path) -> None:
    folder = copy("llama_bitlinear", tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "weights only as pickles (pytorch_model.bin), which are never opened")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has no weights: must have model.safetensors or model.safetensors.index.json")


def cache(tmp_path: Path) -> Path:
    """The cache's folder of one model, as huggingface_hub lays it out."""
    copy("llama", tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


def test_links_inside_a_hub_cache_are_followed(tmp_path: Path) -> None:
    leafwise.load(huggingface.read(cache(tmp_path)))


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_links_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    for folder in (copy("llama", tmp_path / "plain"), cache(tmp_path / "cache")):
        (folder / name).unlink()
        (folder / name).symlink_to(FOLDER / "llama" / name)
        refused(folder, f"{name} is a link that leaves the folder")
        (folder / name).unlink()
        (folder / name).symlink_to("nothing")
        refused(folder, f"{name} is a link to nothing")


def index_edit(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors.index.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "model.bin", "..", "", "a\0.safetensors", 3, None]
)
def test_a_shard_that_is_no_plain_file_name_is_refused(name: Any, tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "copy")
    index_edit(folder, lambda fields: fields["weight_map"].update({"model.norm.weight": name}))
    refused(folder, "must be the name of a .safetensors file in the folder")


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "copy")
    index_edit(folder, lambda fields: fields["weight_map"].pop("model.norm.weight"))
    refused(folder, "holds tensor model.norm.weight, but model.safetensors.index.json does not place it there")
    shutil.copy(FOLDER / "llama" / "model.safetensors.index.json", folder)
    index_edit(folder, lambda fields: fields["weight_map"].update(extra=fields["weight_map"]["model.norm.weight"]))
    refused(folder, "lacks tensor extra, but model.safetensors.index.json places it there")
    for damaged in ([], {}, "x", None):
        index_edit(folder, lambda fields, damaged=damaged: fields.update(weight_map=damaged))
        refused(folder, "weight_map must be an object")
    shutil.copy(FOLDER / "llama" / "model.safetensors.index.json", folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors does not exist, but model.safetensors.index.json names it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "must hold an object"),
        ("{" * 2, "is not JSON"),
        ('{"a":' * 100_000, "is not JSON"),
        ('{"rms_norm_eps": NaN}', "NaN is no finite number"),
        ('{"rms_norm_eps": 1e999}', "1e999 is no finite number"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not JSON"),
        (" " * 1_100_000, "must be at most 1048576 bytes"),
        ("\ud800".encode("utf-8", "surrogatepass"), "is no UTF-8 text"),
    ],
)
def test_a_config_that_is_no_object_of_numbers_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "copy")
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, message)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model-00001-of-00003.safetensors"):
        folder = copy("llama", tmp_path / name)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        refused(folder, "is no plain file")


# --- tensors ---------------------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"


def put(name: str, value: Any) -> Any:
    return lambda tensors: tensors.update({name: value(tensors.get(name))})


def code_three(packed: np.ndarray) -> np.ndarray:
    packed[3, 5] |= 0b00110000
    return packed


def with_value(number: float) -> Any:
    return lambda values: np.full_like(values, number)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks tensor model.norm.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), "lacks tensor lm_head.weight"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name], "and 15 more"),
        (put(Q.replace(".weight", ".bias"), lambda _: np.zeros(96, np.float32)), "which its config.json does not know"),
        (put("model.layers.2.input_layernorm.weight", lambda _: np.zeros(48, np.float32)), "has tensor model.layers.2.input_layernorm"),
        (put(Q, lambda packed: packed[:-1]), f"tensor {Q} has shape (23, 48): must be (24, 48)"),
        (put(Q, lambda packed: packed.astype(np.int8)), f"tensor {Q} has type I8: must be U8"),
        (put("model.norm.weight", lambda gain: gain.astype(np.float64)), "has type F64: must be F32 or F16 or BF16"),
        (put(Q, code_three), f"tensor {Q}: byte [3, 5] is"),
        (put(Q + "_scale", with_value(np.nan)), f"tensor {Q}_scale is nan: must be positive and finite"),
        (put(Q + "_scale", with_value(0)), f"tensor {Q}_scale is 0.0: must be positive and finite"),
        (put(Q + "_scale", with_value(-1)), "must be positive and finite"),
        (put(Q + "_scale", lambda scale: np.full(1, 1e-42, np.float32)), "scale=inf must be positive and finite"),
        (put(Q + "_scale", lambda scale: np.ones(96, np.float32)), f"tensor {Q}_scale has shape (96,): must be (1,)"),
        (put("model.layers.0.post_attention_layernorm.weight", with_value(np.inf)), "holds NaN or infinity"),
    ],
)
def test_a_damaged_tensor_is_refused_by_name(edit: Any, message: str, tmp_path: Path) -> None:
    folder = copy("llama_bitlinear", tmp_path / "copy")
    rewrite(folder / "model.safetensors", edit)
    refused(folder, message)


def test_a_head_beside_tied_embeddings_must_be_their_copy(tmp_path: Path) -> None:
    folder = copy("bitnet_master", tmp_path / "copy")
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    leafwise.load(huggingface.read(folder))

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"][-1, -1] += 1

    rewrite(folder / "model.safetensors", change)
    refused(folder, "has lm_head.weight, which differs from model.embed_tokens.weight, though tie_word_embeddings is true")


def test_a_matrix_that_is_not_ternary_is_refused_as_a_trilm(tmp_path: Path) -> None:
    refused(FOLDER / "llama", "does not hold -s, 0 and s alone, with s of at least 1e-05: it is no TriLM's", "trilm")
    folder = copy("trilm", tmp_path / "copy")

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[Q][7, 7] += np.float16(0.01)

    rewrite(folder / "model.safetensors", change)
    refused(folder, f"tensor {Q} does not hold -s, 0 and s alone", "trilm")


def test_a_trilm_whose_scale_would_be_held_up_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[Q] = np.sign(tensors[Q]) * np.float16(5e-6)

    folder = copy("trilm", tmp_path / "copy")
    rewrite(folder / "model.safetensors", change)
    refused(folder, f"tensor {Q} does not hold -s, 0 and s alone, with s of at least 1e-05", "trilm")


def test_outputs_that_are_no_multiple_of_four_are_read(tmp_path: Path) -> None:
    def narrow(fields: dict[str, Any]) -> None:
        fields.update(intermediate_size=62)

    def cut(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            if name.endswith("down_proj.weight"):
                tensors[name] = tensors[name][:, :62]

    folder = copy("llama_bitlinear", tmp_path / "copy", narrow)
    rewrite(folder / "model.safetensors", cut)  # 62 outputs share 16 rows of bytes, as 64 do
    weights = huggingface.read(folder)
    gate = weights.read(("block_0", "ffn", "gate", "kernel"))
    whole = open_case("llama_bitlinear").read(("block_0", "ffn", "gate", "kernel"))
    assert isinstance(gate, PackedTernary)
    assert isinstance(whole, PackedTernary)
    assert gate.shape == (48, 62)
    assert np.array_equal(gate.codes, whole.codes[:62])
