"""Names, shapes and types of a checkpoint's tensors."""

from typing import NamedTuple

from bitnet_jax.config import ModelConfig
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.huggingface.configuration import ONEBITLLM, Layout
from bitnet_jax.formats.huggingface.packing import rows
from bitnet_jax.formats.weights import Path
from bitnet_jax.params import is_bitlinear

EMBEDDING, HEAD, SCALE = "model.embed_tokens.weight", "lm_head.weight", "_scale"
FLOATS = ("F32", "F16", "BF16")

_OUTSIDE = {"embed": EMBEDDING, "final_norm": "model.norm.weight", "head": HEAD}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_SUB_NORMS = {"attn": "self_attn.attn_sub_norm", "ffn": "mlp.ffn_sub_norm"}
_ONEBITLLM_SUB_NORMS = {"attn": "self_attn.inner_attn_ln", "ffn": "mlp.ffn_layernorm"}
_PARTS = {"attn": "self_attn", "ffn": "mlp"}


class Form(NamedTuple):
    """What a tensor must be: its shape, or one of several, and its type, one of several."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


def name(path: Path, layout: Layout) -> str:
    """The tensor that holds the leaf at `path`; the scale of a packed one is called the same with `SCALE` behind it."""
    if not path[0].startswith("block_"):
        return _OUTSIDE[path[0]]
    block, *middle, _ = path
    if len(middle) == 1:
        inside = _NORMS[middle[0]]
    elif middle[1] == "sub_norm":
        inside = (_ONEBITLLM_SUB_NORMS if layout.architecture == ONEBITLLM else _SUB_NORMS)[middle[0]]
    else:
        inside = f"{_PARTS[middle[0]]}.{middle[1]}_proj"
    return f"model.layers.{block.removeprefix('block_')}.{inside}.weight"


def forms(config: ModelConfig, layout: Layout) -> dict[str, Form]:
    """What every tensor must be, by name, in the order of the forward pass."""
    found: dict[str, Form] = {}
    for path in leafwise.paths(config):
        shape, called = leafwise.shape(config, path), name(path, layout)
        if layout.packed and is_bitlinear(path):
            k, n = shape
            found[called] = Form(((rows(n), k),), ("U8",))
            found[called + SCALE] = Form(((1,), ()), FLOATS)
        else:
            transposed = path[-1] == "kernel"
            found[called] = Form((shape[::-1] if transposed else shape,), FLOATS)
    return found
