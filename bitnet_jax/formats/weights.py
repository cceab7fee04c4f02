"""A model leaf by leaf: what every reader gives and every writer takes, so that no model need ever be in memory whole.

A leaf has the path that it has in the parameter tree with its layers written out (`Layers.LOOP`):

    embed/embedding [V, D]
    block_i/attn_norm/scale [D]   block_i/attn/{q,k,v,o}/kernel [K, N]        block_i/attn/sub_norm/scale [N * H]
    block_i/ffn_norm/scale [D]    block_i/ffn/{gate,up,down}/kernel [K, N]    block_i/ffn/sub_norm/scale [F]
    final_norm/scale [D]          head/kernel [D, V], where the head is not the embedding

Which of the norms there are, `ModelConfig.norm` says. A kernel of a BitLinear is a matrix of floats, or a `PackedTernary` of one.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from bitnet_jax import params as trees
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import DType, Layers, ModelConfig
from bitnet_jax.errors import UserError
from bitnet_jax.memory import large_array
from bitnet_jax.params import Params
from bitnet_jax.transformer import parameter_shapes
from kernels_pallas import Encoding, PackedTernary, check, transcode

Path = tuple[str, ...]
Leaf = np.ndarray | PackedTernary

MAX_LAYERS = 10_000
"""More layers than any model has; a configuration that claims more is a lie."""
_ORDER = (
    *("embed", "attn_norm", "attn/q", "attn/k", "attn/v", "attn/sub_norm", "attn/o"),
    *("ffn_norm", "ffn/gate", "ffn/up", "ffn/sub_norm", "ffn/down", "final_norm", "head"),
)
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Assets:
    """What goes with the weights of a language model.

    Attributes:
        tokenizer: text of a tokenizer.json.
        chat_template: Jinja source that makes one text of a conversation.
        prefix: ids that stand before every text, as when the model was trained; usually a beginning of text, or nothing.
        stop_tokens: ids that end a text or a turn; empty where only the tokenizer's end of text does.
        sampling: what the model's authors sample with, of "temperature", "top_p", "top_k" and "repetition_penalty"; empty where they
            do not say.
    """

    tokenizer: str | None = None
    chat_template: str | None = None
    prefix: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    sampling: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model whose leaves are read when they are asked for.

    Attributes:
        config: shape and arithmetic.
        read: the leaf at a path. Raises UserError where its content is damaged.
        encoding: of the packed kernels; None where they are floats.
        assets: tokenizer and the like.
        provenance: where the model comes from, as JSON values.
        where: what messages call it.
        stored: a type that holds every leaf of floats exactly.
        release: gives back the memory that reading from a mapped file has taken.
        tree: the whole parameter tree, where the source has it in one piece.
    """

    config: ModelConfig
    read: Callable[[Path], Leaf]
    encoding: Encoding | None
    assets: Assets = Assets()
    provenance: dict[str, Any] = field(default_factory=dict)
    where: str
    stored: DType = DType.FLOAT32
    release: Callable[[], None] = lambda: None
    tree: Callable[[], Params] | None = None


def assets_from_json(values: dict[str, Any], config: ModelConfig, tokenizer: str | None, where: str) -> Assets:
    """The `Assets` whose fields but the tokenizer are JSON values, as a stranger's file has them.

    Raises:
        UserError: a field is unknown or of another type, an id is outside the vocabulary, or a number is not finite.
    """
    values = {"chat_template": None, "prefix": [], "stop_tokens": [], "sampling": {}} | values
    template, sampling = values["chat_template"], values["sampling"]
    unknown = values.keys() - {field.name for field in fields(Assets)} | {"tokenizer"} & values.keys()
    if unknown:
        raise UserError(f"{where} has unknown field {sorted(unknown)[0][:100]!r}")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{where}: chat_template must be text")
    for name in ("prefix", "stop_tokens"):
        ids = values[name]
        if not isinstance(ids, list) or len(ids) > 1000 or not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
            raise UserError(f"{where}: {name} must be a list of token ids from 0 to {config.vocab_size - 1}")
    if not isinstance(sampling, dict) or not all(
        name in SAMPLING and type(value) in ((int,) if name == "top_k" else (int, float)) and abs(value) < 1e9
        for name, value in sampling.items()
    ):
        raise UserError(f"{where}: sampling must be an object of numbers below 1e9 (top_k whole) named {', '.join(SAMPLING)}")
    return Assets(
        tokenizer=tokenizer,
        chat_template=template,
        prefix=tuple(values["prefix"]),
        stop_tokens=tuple(values["stop_tokens"]),
        sampling=sampling,
    )


# --- shapes ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """Shape of every leaf of a model of one layer."""
    one = replace(config, num_layers=1, layers=Layers.LOOP)
    return {path: tuple(leaf.shape) for path, leaf in trees.leaves(parameter_shapes(one))}


def paths(config: ModelConfig) -> list[Path]:
    """The paths of all leaves, in the order in which a forward pass meets them.

    Raises:
        UserError: the configuration has more layers than any model.
    """
    if config.num_layers > MAX_LAYERS:
        raise UserError(f"num_layers={config.num_layers} must be at most {MAX_LAYERS}")
    ordered = sorted(_shapes(config), key=lambda path: _ORDER.index("/".join(path[path[0] == "block_0" : -1])))
    block = [path for path in ordered if path[0] == "block_0"]
    blocks = [(f"block_{i}", *path[1:]) for i in range(config.num_layers) for path in block]
    return [ordered[0], *blocks, *ordered[1 + len(block) :]]


def shape(config: ModelConfig, path: Path) -> tuple[int, ...]:
    """Shape of the leaf at `path`; of the matrix [K, N] where it is packed."""
    return _shapes(config)[("block_0", *path[1:]) if path[0].startswith("block_") else path]


# --- contents --------------------------------------------------------------------------------------------------------


def checked(leaf: Leaf, path: Path, config: ModelConfig, where: str) -> Leaf:
    """`leaf`, if it has the shape that the configuration says and every number in it is one.

    Raises:
        UserError: another shape or type; NaN or infinity; bytes that are no code; a scale that is not positive and finite.
    """
    if tuple(leaf.shape) != shape(config, path):
        raise UserError(f"{where}: {'/'.join(path)} has shape {tuple(leaf.shape)}: must be {shape(config, path)}")
    return checked_numbers(leaf, "/".join(path), where)


def checked_numbers(leaf: Leaf, name: str, where: str) -> Leaf:
    """`checked`, but for the shape: for a stack of leaves as well."""
    if isinstance(leaf, PackedTernary):
        try:
            check(leaf)
        except ValueError as error:
            raise UserError(f"{where}: {name}: {error}") from None
    elif leaf.dtype.name not in _FLOATS:
        raise UserError(f"{where}: {name} has type {leaf.dtype.name}: must be one of {', '.join(_FLOATS)}")
    elif not all_finite(leaf):
        raise UserError(f"{where}: {name} holds NaN or infinity")
    return leaf


def all_finite(values: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, for the float types of 2 and 4 bytes; as fast as the bytes can be read."""
    # Sign apart, the bits of every other number are below those of infinity. Integers, because bfloat16 in NumPy is slow.
    bits = np.dtype(f"u{values.dtype.itemsize}")
    infinity, magnitude = np.array(np.inf, values.dtype).view(bits), bits.type(np.iinfo(bits).max // 2)
    flat = values.T if values.flags.f_contiguous else values
    step = max(1, (1 << 17) // max(1, flat[:1].size))
    for start in range(0, len(flat), step):
        piece = np.ascontiguousarray(flat[start : start + step]).view(bits)
        if ((piece & magnitude) >= infinity).any():
            return False
    return True


# --- from and to trees -----------------------------------------------------------------------------------------------


def from_params(
    params: Params,
    config: ModelConfig,
    *,
    assets: Assets | None = None,
    provenance: dict[str, Any] | None = None,
    where: str = "parameters",
) -> Weights:
    """A parameter tree, stacked or not, as `Weights`."""
    stacked = params.get("blocks")

    def read(path: Path) -> Leaf:
        tree: Any
        tree, index = (stacked, int(path[0].removeprefix("block_"))) if stacked and path[0].startswith("block_") else (params, None)
        for name in path if index is None else path[1:]:
            tree = tree[name]
        if isinstance(tree, PackedTernary):
            codes, scale = (np.asarray(part) if index is None else np.asarray(part[index]) for part in (tree.codes, tree.scale))
            return PackedTernary(codes, scale, k=tree.k, encoding=tree.encoding)
        return np.asarray(tree if index is None else tree[index])

    encodings = {leaf.encoding for _, leaf in trees.leaves(params) if isinstance(leaf, PackedTernary)}
    return Weights(
        config=config,
        read=read,
        encoding=encodings.pop() if encodings else None,
        assets=assets or Assets(),
        provenance=provenance or {},
        where=where,
        tree=lambda: params,
    )


def load(weights: Weights) -> Params:
    """All leaves as a parameter tree in the layout that the configuration says, on the host. float16 becomes float32.

    Raises:
        UserError: a leaf's content is damaged.
    """
    if weights.tree is not None:
        return weights.tree()
    params: Params = {}
    for path in paths(weights.config):
        leaf = weights.read(path)
        if isinstance(leaf, np.ndarray) and leaf.dtype == np.float16:
            leaf = leaf.astype(np.float32)
        if weights.config.layers is Layers.SCAN and path[0].startswith("block_"):
            _put_layer(params, path, leaf, weights.config.num_layers)
        else:
            _place(params, path)[path[-1]] = leaf if isinstance(leaf, PackedTernary) else np.ascontiguousarray(leaf)
        weights.release()
    return params


def _place(params: Params, path: Path) -> Params:
    for name in path[:-1]:
        params = params.setdefault(name, {})
    return params


def _put_layer(params: Params, path: Path, leaf: Leaf, layers: int) -> None:
    """Puts a leaf into its layer of the stack, which is made when the first layer comes."""
    place, index = _place(params, ("blocks", *path[1:])), int(path[0].removeprefix("block_"))
    if isinstance(leaf, PackedTernary):
        if path[-1] not in place:
            codes, scale = (large_array((layers, *part.shape), part.dtype) for part in (leaf.codes, leaf.scale))
            place[path[-1]] = PackedTernary(codes, scale, k=leaf.k, encoding=leaf.encoding)
        stack = place[path[-1]]
        if (stack.shape[1:], stack.scale.shape[1:], stack.encoding) != (leaf.shape, leaf.scale.shape, leaf.encoding):
            raise UserError(f"{'/'.join(path)} is packed in another way than in the layer before it")
        stack.codes[index], stack.scale[index] = leaf.codes, leaf.scale
    else:
        place.setdefault(path[-1], np.empty((layers, *leaf.shape), leaf.dtype))[index] = leaf


# --- packing ---------------------------------------------------------------------------------------------------------


def packed(weights: Weights, encoding: Encoding) -> Weights:
    """The same model with its kernels packed in `encoding`, each when it is asked for.

    Raises:
        UserError: the model's linear layers are not ternary; from `read`, as `params.pack_kernel`.
    """
    if not is_ternary(weights.config):
        raise UserError(f"{weights.where} has linear={weights.config.linear.value}: it has no ternary weights to pack")
    if weights.encoding is encoding:
        return weights

    def read(path: Path) -> Leaf:
        leaf = weights.read(path)
        if isinstance(leaf, PackedTernary):
            return transcode(leaf, encoding)
        if not trees.is_bitlinear(path):
            return leaf
        return trees.pack_kernel(jnp.asarray(leaf), weights.config.quant, encoding, "/".join(path))

    return replace(weights, read=read, encoding=encoding, tree=None)


def frugal(weights: Weights, on_leaf: Callable[[Path], object] = lambda path: None) -> Weights:
    """The same model, which gives back the memory of earlier leaves before it reads the next, and calls `on_leaf` after each."""

    def read(path: Path) -> Leaf:
        weights.release()
        leaf = weights.read(path)
        on_leaf(path)
        return leaf

    return replace(weights, read=read, tree=None)
