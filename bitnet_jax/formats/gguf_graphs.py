"""The graphs of bitnet.cpp, llama.cpp and ik_llama.cpp that GGUF files name, and what each calls a model's tensors.

    llama           block norms, SiLU; rows of q and k permuted, because pairs of neighbours are rotated ("NORM" rotary embedding)
    bitnet          block norms and one before o and down, SiLU; rotate-half ("NEOX"), nothing permuted; the head is the embedding
    bitnet-b1.58    as bitnet with relu squared; `bitnet-25` is another name of it. bitnet.cpp and ik_llama.cpp know it, llama.cpp does not

Sources: `src/llama.cpp` of bitnet.cpp's llama.cpp (March 2026: `build_bitnet`, `build_bitnet_158`), `src/models/bitnet.cpp` of llama.cpp
(as in llama-cpp-python 0.3.36), `src/graphs/build_bitnet.cpp` of ik_llama.cpp (August 2026).
"""

import numpy as np

from bitnet_jax.config import FeedForward, ModelConfig, NormKind, NormPlacement
from bitnet_jax.errors import UserError
from bitnet_jax.formats.weights import Path

_BLOCK = {
    "attn_norm/scale": "attn_norm.weight",
    "attn/q/kernel": "attn_q.weight",
    "attn/k/kernel": "attn_k.weight",
    "attn/v/kernel": "attn_v.weight",
    "attn/sub_norm/scale": "attn_sub_norm.weight",
    "attn/o/kernel": "attn_output.weight",
    "ffn_norm/scale": "ffn_norm.weight",
    "ffn/gate/kernel": "ffn_gate.weight",
    "ffn/up/kernel": "ffn_up.weight",
    "ffn/sub_norm/scale": "ffn_sub_norm.weight",
    "ffn/down/kernel": "ffn_down.weight",
}
_OUTSIDE = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
GRAPHS = {
    "llama": (NormPlacement.NONE, FeedForward.SWIGLU),
    "bitnet": (NormPlacement.SUB, FeedForward.SWIGLU),
    "bitnet-b1.58": (NormPlacement.SUB, FeedForward.RELU2),
    "bitnet-25": (NormPlacement.SUB, FeedForward.RELU2),
}
"""Norms and activation by architecture."""


def tensor_name(path: Path) -> str:
    """The name in a GGUF file of the leaf at `path`."""
    if path[0] in _OUTSIDE:
        return _OUTSIDE[path[0]]
    return f"blk.{path[0].removeprefix('block_')}.{_BLOCK['/'.join(path[1:])]}"


def permuted_heads(path: Path, config: ModelConfig, architecture: str) -> int | None:
    """Heads whose rows are permuted in the file, or None."""
    if architecture != "llama" or path[1:-1] not in (("attn", "q"), ("attn", "k")):
        return None
    return config.num_heads if path[2] == "q" else config.num_kv_heads


def as_pairs(rows: int, heads: int) -> np.ndarray:
    """Row i of the file is row `[i]` of ours: the halves of a head become pairs of neighbours, i + H/2 beside i."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def as_halves(rows: int, heads: int) -> np.ndarray:
    """The inverse of `as_pairs`."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def architecture_for(config: ModelConfig, target: str) -> str:
    """The graph of `target` that computes the model. Raises UserError where there is none."""
    architecture = next((name for name, graph in GRAPHS.items() if graph == (config.norm, config.ffn)), None)
    if architecture is None or config.norm_kind is not NormKind.RMS:
        kinds = f"norm={config.norm.value}, norm_kind={config.norm_kind.value}, ffn={config.ffn.value}"
        raise UserError(f"{target} has no graph for {kinds}: it has norm=sub with swiglu or relu2 and norm=none with swiglu, all rms")
    if architecture == "bitnet-b1.58" and target == "llama.cpp":
        raise UserError("llama.cpp has no graph for ffn=relu2: its bitnet graph computes SiLU, with which such a model talks garbage")
    if architecture != "llama" and config.num_heads * config.head_dim != config.hidden_size:
        size = f"num_heads * head_dim={config.num_heads * config.head_dim}"
        raise UserError(f"{size} must be hidden_size={config.hidden_size}: the {architecture} graph of {target} has no other place for it")
    if not config.tie_embeddings and (architecture == "bitnet" or (architecture == "bitnet-b1.58" and target == "bitnet.cpp")):
        raise UserError(f"tie_embeddings=False: the {architecture} graph of {target} takes the embedding as its head")
    return architecture
