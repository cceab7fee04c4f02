"""A checkpoint's folder as `Weights`: everything but the tensors' contents is checked at once, and contents leaf by leaf."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitnet_jax.config import DType, ModelConfig
from bitnet_jax.errors import UserError
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.huggingface import assets, configuration, names, packing
from bitnet_jax.formats.huggingface.configuration import Layout
from bitnet_jax.formats.huggingface.folder import CONFIG, INDEX, SINGLE, Folder, Tensors
from bitnet_jax.formats.weights import Leaf, Weights
from bitnet_jax.params import is_bitlinear
from bitnet_jax.quant import EPS
from kernels_pallas import Encoding

_SMALLEST_GROUP = 16
"""Inputs that share a scale, at least: with very few, any matrix is -s, 0 and s."""


def is_checkpoint(path: Path) -> bool:
    """Whether the folder `path` is one of Hugging Face's: it has tensors under the name that they have there, or names an architecture."""
    if any((path / name).exists() for name in (SINGLE, INDEX)):
        return True
    try:
        fields = Folder(path).json(CONFIG) or {}
    except UserError:
        return False
    return "architectures" in fields or "model_type" in fields


def read(path: Path, variant: str | None = None) -> Weights:
    """The checkpoint in the folder `path`.

    Args:
        path: the folder.
        variant: "trilm" where the matrices hold -s, 0 and s and the activations are not quantised, which config.json cannot say.

    Raises:
        UserError: a file is missing, too large, damaged or outside the folder; config.json asks for what this project does not compute; a
            tensor is missing, surplus, or of another shape or type than config.json says. From `Weights.read`: its content is damaged.
    """
    folder = Folder(path)
    fields = folder.json(CONFIG)
    if fields is None:
        raise UserError(f"{path} has no {CONFIG}")
    config, layout = configuration.parse(fields, variant, f"{path / CONFIG}")
    tensors = Tensors(folder)
    _check(tensors, config, layout)
    if layout.trilm:
        config = replace(config, quant=replace(config.quant, weight_group=_shared_scale(tensors, config, layout)))
    floats = {info.dtype for info in tensors.info.values() if info.dtype in names.FLOATS}

    def leaf(place: leafwise.Path) -> Leaf:
        return _leaf(tensors, place, config, layout)

    return Weights(
        config=config,
        read=leaf,
        encoding=Encoding.TWO_BIT if layout.packed else None,
        assets=assets.read(folder, fields, config),
        provenance={"source": str(path), "architecture": layout.architecture},
        where=str(path),
        stored=DType.BFLOAT16 if floats == {"BF16"} else DType.FLOAT32,
        release=tensors.release,
    )


def _check(tensors: Tensors, config: ModelConfig, layout: Layout) -> None:
    """Holds names, shapes and types against the configuration."""
    where, info = tensors.where, tensors.info
    if config.num_layers > len(info):
        raise UserError(f"{where} has {len(info)} tensors: too few for num_hidden_layers={config.num_layers}")
    expected = names.forms(config, layout)
    if config.tie_embeddings and names.HEAD in info:  # a copy, which `_leaf` holds against the embedding
        expected[names.HEAD] = expected[names.EMBEDDING]
    missing = [name for name in expected if name not in info]
    if missing:
        raise UserError(f"{where} lacks tensor {missing[0]}{_others(missing)}")
    surplus = sorted(info.keys() - expected.keys())
    if surplus:
        raise UserError(f"{where} has tensor {surplus[0][:100]}{_others(surplus)}, which its {CONFIG} does not know")
    for name, form in expected.items():
        found = info[name]
        if found.shape not in form.shapes:
            raise UserError(f"{where}: tensor {name} has shape {found.shape}: must be {form.shapes[0]}")
        if found.dtype not in form.dtypes:
            raise UserError(f"{where}: tensor {name} has type {found.dtype}: must be {' or '.join(form.dtypes)}")


def _others(found: list[str]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""


def _leaf(tensors: Tensors, path: leafwise.Path, config: ModelConfig, layout: Layout) -> Leaf:
    name = names.name(path, layout)
    values = tensors.read(name)
    if layout.packed and is_bitlinear(path):
        scale = _scale(tensors, name, layout)
        try:
            packed = packing.decode(values, scale, leafwise.shape(config, path)[1])
        except ValueError as error:
            raise UserError(f"{tensors.where}: tensor {name}: {error}") from None
        return leafwise.checked(packed, path, config, tensors.where)
    if name == names.EMBEDDING and config.tie_embeddings and names.HEAD in tensors.info:
        _check_copy(tensors, values)
    return leafwise.checked(values.T if path[-1] == "kernel" else values, path, config, tensors.where)


def _scale(tensors: Tensors, name: str, layout: Layout) -> np.ndarray:
    """The factor float32 () of a packed matrix: `weight_scale`, or its reciprocal where the layer divides by it."""
    scale = tensors.read(name + names.SCALE).astype(np.float32).reshape(())
    if not (np.isfinite(scale) and scale > 0):
        raise UserError(f"{tensors.where}: tensor {name}{names.SCALE} is {scale}: must be positive and finite")
    if not layout.divides:
        return scale
    with np.errstate(over="ignore"):  # `leafwise.checked` finds the infinity
        return np.asarray(np.float32(1) / scale, np.float32)


def _check_copy(tensors: Tensors, embedding: np.ndarray) -> None:
    head, step = tensors.read(names.HEAD), max(1, (1 << 22) // embedding.shape[1])
    same = head.dtype == embedding.dtype
    for start in range(0, len(head), step):
        same = same and np.array_equal(head[start : start + step].view(np.uint8), embedding[start : start + step].view(np.uint8))
    if not same:
        raise UserError(f"{tensors.where} has {names.HEAD}, which differs from {names.EMBEDDING}, though tie_word_embeddings is true")


# --- TriLM -----------------------------------------------------------------------------------------------------------


def _shared_scale(tensors: Tensors, config: ModelConfig, layout: Layout) -> int | None:
    """The largest `weight_group` for which every matrix holds -s, 0 and s in each group; None is one s for a matrix.

    Each model-parallel shard of training has its own s. The shards of o_proj and down_proj lie along the inputs, those of the others along
    the outputs, and a group within one column lies in one shard if it divides the inputs of a shard.
    """
    width = math.gcd(config.hidden_size, config.ffn_size, config.num_heads * config.head_dim)
    groups = [None, *(size for size in range(width, _SMALLEST_GROUP - 1, -1) if width % size == 0)]
    kernels = [path for path in leafwise.paths(config) if is_bitlinear(path)]
    bad = ""
    for group in groups:
        for path in kernels:
            name = names.name(path, layout)
            if not _is_ternary(tensors.read(name), group):
                bad = name
                break
        else:
            return group
    tensors.release()
    raise UserError(f"{tensors.where}: tensor {bad} does not hold -s, 0 and s alone, with s of at least {EPS}: it is no TriLM's")


def _is_ternary(stored: np.ndarray, group: int | None) -> bool:
    """Whether [N, K] has one magnitude besides zero, or one in each `group` of K in each row."""
    pieces = np.array_split(stored, max(1, stored.size >> 22))
    matrix_top = None if group else max(np.abs(piece.astype(np.float32)).max() for piece in pieces)
    for piece in pieces:
        magnitude = np.abs(piece.astype(np.float32)).reshape(len(piece), -1, group or stored.shape[1])
        top = magnitude.max(-1, keepdims=True) if group else np.full((1, 1, 1), matrix_top, np.float32)
        # A smaller magnitude than EPS would be held up to it when the matrix is quantised again.
        if not (((magnitude == 0) | (magnitude == top)).all() and ((top == 0) | (top >= EPS)).all()):
            return False
    return True
