"""What is written, transformers loads as a model of its own, and computes the same from."""

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitnet_jax.config import ActivationQuantizer, DType, FeedForward, Linear, NormPlacement, QuantConfig, WeightQuantizer
from bitnet_jax.data import byte_tokenizer
from bitnet_jax.formats import huggingface
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets
from kernels_pallas import Encoding
from tests.formats.huggingface.golden import TOLERANCE, forward, random_latent
from tests.shapes import tiny

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # warnings of other packages are not ours to mend
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its quantisers are decorated with torch.compile, which needs a C++ compiler

LLAMA = {"norm": NormPlacement.NONE}


def load(folder: Path, **options: Any) -> Any:
    """The model that transformers makes of `folder`, in float32, with every tensor used and none missing."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


@pytest.mark.parametrize(
    ("layout", "changes", "kind"),
    [
        ("packed", {}, "BitNetForCausalLM"),
        ("packed", {"ffn": FeedForward.RELU2, "tie_embeddings": False}, "BitNetForCausalLM"),
        ("packed", {"quant": QuantConfig(weight=WeightQuantizer.ABSMEDIAN)}, "BitNetForCausalLM"),
        ("packed", {**LLAMA, "rope_theta": 500.0}, "LlamaForCausalLM"),
        ("packed", {**LLAMA, "head_dim": 12, "tie_embeddings": False, "ffn": FeedForward.RELU2}, "LlamaForCausalLM"),
        ("master", {"ffn": FeedForward.RELU2}, "BitNetForCausalLM"),
        ("master", {**LLAMA, "num_kv_heads": 1, "tie_embeddings": False}, "LlamaForCausalLM"),
        ("master", {"linear": Linear.FULL, "norm_eps": 1e-3}, "BitNetForCausalLM"),
        ("master", {**LLAMA, "linear": Linear.FULL}, "LlamaForCausalLM"),
        ("master", {**LLAMA, "quant": QuantConfig(activation=ActivationQuantizer.NONE)}, "LlamaForCausalLM"),
    ],
)
def test_transformers_computes_the_same_logits_from_what_is_written(
    layout: str, changes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    weights = random_latent(tiny(**changes))
    huggingface.write(tmp_path / "model", weights, layout=layout, shard_bytes=10_000)
    model = load(tmp_path / "model")
    assert type(model).__name__ == kind
    tokens = np.random.default_rng(0).integers(0, 61, (10, 12), dtype=np.int32)
    mine = forward(weights if layout == "master" else leafwise.packed(weights, Encoding.TWO_BIT))(tokens)
    theirs = logits(model, tokens)
    difference = np.abs(mine - theirs).max((1, 2)) / np.abs(theirs).max()
    # In one row of some dozens an activation lies on the edge between two codes, and falls to either side.
    assert sorted(difference)[7] <= TOLERANCE, difference
    assert max(difference) < 0.05, difference
    assert np.abs(theirs).max() > 1


def test_what_is_stored_in_bfloat16_is_computed_in_it(tmp_path: Path) -> None:
    weights = random_latent(tiny(dtype=DType.BFLOAT16))
    huggingface.write(tmp_path / "model", weights, layout="master", dtype=DType.BFLOAT16)
    tokens = np.random.default_rng(0).integers(0, 61, (8, 24), dtype=np.int32)
    read = huggingface.read(tmp_path / "model")
    precise = forward(read)(tokens)

    def distance(values: np.ndarray) -> float:
        return float(np.sqrt(np.mean((values - precise) ** 2)))

    model = load(tmp_path / "model", torch_dtype="auto")  # the name that 4.52 and 5 both take
    assert str(model.dtype) == "torch.bfloat16"
    assert distance(forward(read, DType.BFLOAT16)(tokens)) <= 1.1 * distance(logits(model, tokens)) < 0.2 * np.abs(precise).max()
    assert read.read(("embed", "embedding")).dtype == ml_dtypes.bfloat16  # pyright: ignore[reportAttributeAccessIssue]


def test_transformers_tokenises_templates_and_generates_as_we_do(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    assets = Assets(
        tokenizer=byte_tokenizer().to_json(),
        chat_template=template,
        prefix=(256,),
        stop_tokens=(256, 10),
        sampling={"temperature": 0.5, "top_p": 0.9, "top_k": 7},
    )
    config = tiny(vocab_size=257)
    weights = random_latent(config, assets)
    huggingface.write(tmp_path / "model", weights)
    model = load(tmp_path / "model")
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("été\n", return_tensors="np")["input_ids"][0].tolist()
    assert ids == [256, *byte_tokenizer().encode("été\n").tolist()]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "user: Hi<|endoftext|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (256, 256, 64)
    settings = model.generation_config
    assert (settings.eos_token_id, settings.do_sample) == ([256, 10], True)
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.5, 0.9, 7)

    found = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=-1)[0].tolist()
    run = forward(leafwise.packed(weights, Encoding.TWO_BIT))
    row = np.zeros((1, len(ids) + 8), np.int32)
    row[0, : len(ids)] = ids
    for at in range(len(ids), row.shape[1]):
        row[0, at] = run(row)[0, at - 1].argmax()
    assert row[0].tolist() == found
