"""Makes tests/golden/hf: small checkpoints in every layout that `formats.huggingface` reads, and what transformers computes from them.

Needs torch, transformers and accelerate (extra 'parity'). From the repository's root:

    python tests/golden/make_transformers.py [CASE…]

Each case is a folder as transformers would find it on the hub, and expected.npz in it:

    tokens       int32 [B, T]       input: 2 x 12, or 8 x 24 where bfloat16 is compared, which takes many logits
    logits       float32 [B, T, V]  of the model computed in float32
    logits_bf16  uint16 [B, T, V]   bits of the logits of the model computed in bfloat16, where a BitNet declares that type
    greedy       int32 [2, 8]       continuation of tokens[:2, :12] by the largest logit, in float32

Weights are random, and gains are far from one, so that a norm in the wrong place shows. No class of transformers reads 1bitLLM's layout:
its logits are those of a BitNet with SiLU, whose tensors are then renamed. TriLM's matrices are ternary before the model is saved.

An activation on the edge between two codes falls to either side by the order in which a program adds, and moves the logits by a whole
code. So each case takes the first seed for which, over tokens[:2, :12] and their continuation, no activation is within `MARGIN` of an edge
and no chosen token within it of the second best: what remains is the same on every machine.
"""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the quantisers are decorated with torch.compile, which needs a C++ compiler

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import bitnet

FOLDER = Path(__file__).parent / "hf"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS, PROMPT = 8, 12
MARGIN = 3e-5
"""Of a code, and of the largest logit."""

BITNET: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = BITNET | {"head_dim": 16, "rms_norm_eps": 1e-5}  # heads * head_dim is twice the hidden size
OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = OFFLINE | {"quantization_mode": "online"}
DIVIDE = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}  # linear_class is bitlinear where none is named


def latent(model_class: Any, config: Any, seed: int, std: float = 0.5) -> Any:
    """A model with normal weights and gains between a half and one and a half."""
    model = model_class(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            else:
                value.copy_(torch.randn(value.shape, generator=generator) * (1.0 if "embed" in name else std))
    return model


def is_linear(name: str) -> bool:
    return name.split(".")[-2] in PROJECTIONS


def pack(tensors: dict[str, torch.Tensor], *, reciprocal: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The packed layout: codes by the packer of transformers, and the scale or its reciprocal."""
    packed = {}
    for name, value in tensors.items():
        if not is_linear(name):
            packed[name] = value.to(dtype)
            continue
        scale = value.float().abs().mean()
        packed[name] = bitnet.pack_weights((value.float() / scale).round().clamp(-1, 1))
        packed[name + "_scale"] = (1 / scale if reciprocal else scale).reshape(1).to(dtype)
    return packed


def ternary(tensors: dict[str, torch.Tensor], shards: int) -> dict[str, torch.Tensor]:
    """Matrices of -s, 0 and s with one s for each model-parallel shard: of outputs, and of inputs for o_proj and down_proj."""
    found = {}
    for name, value in tensors.items():
        if is_linear(name):
            axis = int(name.split(".")[-2] in ("o_proj", "down_proj"))
            parts = []
            for part in value.float().chunk(shards, axis):
                scale = part.abs().mean().half().float()
                parts.append((part / scale).round().clamp(-1, 1) * scale)
            value = torch.cat(parts, axis)
        found[name] = value.half()
    return found


def save(folder: Path, config: Any, tensors: dict[str, torch.Tensor], **fields: Any) -> None:
    """config.json as transformers writes it, with `fields` put in, and one file of tensors."""
    folder.mkdir(parents=True)
    if config.tie_word_embeddings:
        tensors = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


class Edges:
    """While it is entered, how near an activation came to the edge between two codes, as a share of a code."""

    def __enter__(self) -> "Edges":
        self.nearest = 1.0
        self._kept = bitnet.ActQuant.apply, bitnet.BitLinear.activation_quant

        def apply(x: torch.Tensor) -> torch.Tensor:
            self._see(x)
            return self._kept[0](x)

        def activation_quant(layer: Any, x: torch.Tensor, num_bits: int = 8) -> Any:
            self._see(x)
            return self._kept[1](layer, x, num_bits)

        bitnet.ActQuant.apply, bitnet.BitLinear.activation_quant = apply, activation_quant
        return self

    def __exit__(self, *_: object) -> None:
        bitnet.ActQuant.apply, bitnet.BitLinear.activation_quant = self._kept

    def _see(self, x: torch.Tensor) -> None:
        code = x.double() * 127 / x.double().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        self.nearest = min(self.nearest, float(((code % 1) - 0.5).abs().min()))


def expect(folder: Path, model_class: Any, source: Path | None = None, dtypes: tuple[str, ...] = ("float32",)) -> float:
    """Writes expected.npz into `folder`, from the model that transformers loads from `source`, and returns its margin."""
    margin = 1.0
    torch.manual_seed(0)
    size = (8, 24) if "bfloat16" in dtypes else (2, 12)
    tokens = torch.randint(0, 61, size, generator=torch.Generator().manual_seed(7))
    arrays: dict[str, Any] = {"tokens": tokens.numpy().astype(np.int32)}
    for dtype in dtypes:
        model, report = model_class.from_pretrained(source or folder, dtype=getattr(torch, dtype), output_loading_info=True)
        assert not any(report.values()), report
        model.to(getattr(torch, dtype)).eval()  # what is not quantised keeps the type of the file
        with torch.no_grad():
            logits = model(tokens).logits
            if dtype == "bfloat16":
                arrays["logits_bf16"] = logits.view(torch.uint16).numpy()
            else:
                arrays["logits"] = logits.numpy()
                row = tokens[:2, :PROMPT]
                with Edges() as edges:
                    for _ in range(STEPS):
                        best = model(row).logits[:, -1:].topk(2)
                        gap = (best.values[..., 0] - best.values[..., 1]).min() / logits.abs().max()
                        margin = min(margin, float(gap), edges.nearest)
                        row = torch.cat([row, best.indices[..., 0]], 1)
                arrays["greedy"] = row[:, PROMPT:].numpy().astype(np.int32)
    np.savez(folder / "expected.npz", **arrays)
    return margin


def bitnet_master(folder: Path, seed: int) -> float:
    """As microsoft/bitnet-b1.58-2B-4T-bf16: latent, tied, relu2."""
    config = BitNetConfig(**BITNET, tie_word_embeddings=True, dtype="bfloat16")
    tensors = latent(BitNetForCausalLM, config, seed).bfloat16().state_dict()
    save(folder, config, tensors, architectures=["BitNetForCausalLM"], quantization_config=ONLINE)
    return expect(folder, BitNetForCausalLM, dtypes=("float32", "bfloat16"))


def bitnet_packed(folder: Path, seed: int) -> float:
    """As microsoft/bitnet-b1.58-2B-4T, with a head of its own."""
    config = BitNetConfig(**BITNET, tie_word_embeddings=False, dtype="bfloat16")
    tensors = pack(latent(BitNetForCausalLM, config, seed).state_dict(), reciprocal=False, dtype=torch.bfloat16)
    save(folder, config, tensors, architectures=["BitNetForCausalLM"], quantization_config=OFFLINE)
    return expect(folder, BitNetForCausalLM, dtypes=("float32", "bfloat16"))


def llama_bitlinear(folder: Path, seed: int) -> float:
    """As HF1BitLLM and Falcon: packed, and the scale divides."""
    config = LlamaConfig(**LLAMA, tie_word_embeddings=False, dtype="bfloat16")
    tensors = pack(latent(LlamaForCausalLM, config, seed).state_dict(), reciprocal=True, dtype=torch.bfloat16)
    save(folder, config, tensors, architectures=["LlamaForCausalLM"], quantization_config=DIVIDE)
    return expect(folder, LlamaForCausalLM)


def llama_autobitlinear(folder: Path, seed: int) -> float:
    """A Llama whose scale multiplies, tied, with relu2."""
    config = LlamaConfig(**LLAMA, tie_word_embeddings=True, hidden_act="relu2", dtype="float32")
    tensors = pack(latent(LlamaForCausalLM, config, seed).state_dict(), reciprocal=False, dtype=torch.float32)
    save(folder, config, tensors, architectures=["LlamaForCausalLM"], quantization_config=OFFLINE)
    return expect(folder, LlamaForCausalLM)


def onebitllm(folder: Path, seed: int) -> float:
    """As 1bitLLM/bitnet_b1_58-large: latent float16 under its own names of the inner norms."""
    config = BitNetConfig(**BITNET, tie_word_embeddings=True, hidden_act="silu", rope_theta=10000.0, dtype="float32")
    tensors = latent(BitNetForCausalLM, config, seed).half().state_dict()
    source = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(source, ignore_errors=True)
    save(source, config, tensors, architectures=["BitNetForCausalLM"], quantization_config=ONLINE)
    names = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    renamed = dict(tensors)
    for old, new in names.items():
        renamed = {name.replace(old, new): value for name, value in renamed.items()}
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    renamed |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies.clone() for i in range(2)}
    fields = BITNET | {
        "architectures": ["BitnetForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "weight_bits": 1,
        "input_bits": 8,
    }
    save(folder, config, renamed)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    margin = expect(folder, BitNetForCausalLM, source)
    shutil.rmtree(source)
    return margin


def _trilm(folder: Path, shards: int, seed: int) -> float:
    config = LlamaConfig(**LLAMA, tie_word_embeddings=False, dtype="float16")
    tensors = ternary(latent(LlamaForCausalLM, config, seed, std=0.2).state_dict(), shards)
    save(folder, config, tensors, architectures=["LlamaForCausalLM"])
    return expect(folder, LlamaForCausalLM)


def trilm(folder: Path, seed: int) -> float:
    """As TriLM: a Llama whose matrices are ternary, one scale each."""
    return _trilm(folder, 1, seed)


def trilm_shards(folder: Path, seed: int) -> float:
    """As the larger TriLM: one scale for each of two model-parallel shards."""
    return _trilm(folder, 2, seed)


def llama(folder: Path, seed: int) -> float:
    """A full-precision Llama as transformers saves it, in several files."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 12}
    config = LlamaConfig(**LLAMA | sizes, tie_word_embeddings=False, dtype="float32")
    latent(LlamaForCausalLM, config, seed, std=0.2).save_pretrained(folder, max_shard_size="40KB")
    return expect(folder, LlamaForCausalLM)


CASES = (bitnet_master, bitnet_packed, llama_bitlinear, llama_autobitlinear, onebitllm, trilm, trilm_shards, llama)


def main() -> None:
    wanted = sys.argv[1:] or [case.__name__ for case in CASES]
    for case in CASES:
        if case.__name__ in wanted:
            folder = FOLDER / case.__name__
            for seed in itertools.count():
                shutil.rmtree(folder, ignore_errors=True)
                margin = case(folder, seed)
                print(f"{folder.name}: seed {seed}, margin {margin:.1e}")  # noqa: T201 (a program)
                if margin >= MARGIN:
                    break
            assert all(load_file(path) for path in folder.glob("*.safetensors"))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "script": "tests/golden/make_transformers.py"}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
