"""`Weights` as a folder that transformers loads, without code of its own beside it."""

import functools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from bitnet_jax.config import DType
from bitnet_jax.errors import UserError
from bitnet_jax.formats import safetensors
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.files import file_size, whole_directory
from bitnet_jax.formats.huggingface import assets, configuration, names, packing
from bitnet_jax.formats.huggingface.configuration import Layout
from bitnet_jax.formats.huggingface.folder import CONFIG, INDEX, SINGLE
from bitnet_jax.formats.safetensors import Tensor
from bitnet_jax.formats.weights import Weights
from bitnet_jax.params import is_bitlinear
from kernels_pallas import Encoding, PackedTernary, unpack

SHARD_BYTES = 5 * 10**9
"""Largest file of tensors, unless one tensor is larger."""

_FLOATS = {DType.FLOAT32: "F32", DType.BFLOAT16: "BF16"}
_METADATA = {"format": "pt"}  # transformers refuses a file that does not say for which framework it was written


def write(path: Path, weights: Weights, *, layout: str = "packed", dtype: DType | None = None, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes the folder `path`, one leaf in memory at a time, and returns its size in bytes. It appears whole or not at all.

    packed: four weights a byte and a `weight_scale`. It multiplies (`autobitlinear` of transformers) for BitNetForCausalLM. For
    LlamaForCausalLM it divides (`bitlinear`), as in the published checkpoints, if every scale of the model is the reciprocal of a number
    in float32; five in six are, and else it multiplies. Every kernel is read twice, for the scales decide that and their common type.

    master: latent weights, or those of a full-precision model. A model that quantises weights alone (TriLM) is written as a Llama of -s, 0
    and s, and is read back with variant="trilm".

    Args:
        path: the folder; what is there must be empty.
        weights: the model.
        layout: "packed" or "master".
        dtype: type of what is not packed, and the one that config.json names; None is the one that loses nothing.
        shard_bytes: size from which the tensors are spread over several files.

    Raises:
        UserError: transformers would compute another function, with the reason; or the folder cannot be written.
        RunError: the disk is full.
    """
    config = weights.config
    form = configuration.plan(config, layout, packed=weights.encoding is not None)
    floats = _FLOATS[dtype or weights.stored]
    if form.packed or form.trilm:
        weights = leafwise.packed(weights, Encoding.TWO_BIT)
    if form.packed:
        stored = _scales(weights)
        if form.divides:
            reciprocals = {path: _reciprocal(scale) for path, scale in stored.items()}
            exact = {path: value for path, value in reciprocals.items() if value is not None}
            form, stored = (form, exact) if len(exact) == len(stored) else (replace(form, divides=False), stored)
        if not all(_is_bfloat16(scale) for scale in stored.values()):
            if dtype is DType.BFLOAT16:
                raise UserError("dtype=bfloat16 rounds the scales, which are no bfloat16 numbers: must be float32")
            floats = "F32"  # transformers casts scales to the type that config.json declares
        tensors = _packed(weights, form, floats, stored)
    else:
        if form.trilm and dtype is None and floats == "BF16":
            floats = "BF16" if all(_is_bfloat16(scale) for scale in _scales(weights).values()) else "F32"
        tensors = _master(weights, form, floats)
    declared = next(kind for kind, name in _FLOATS.items() if name == floats)
    bos, eos = weights.assets.prefix[:1], assets.end_of_text(weights.assets)
    fields = configuration.compose(config, form, declared, bos=bos[0] if bos else None, eos=eos)
    texts = {CONFIG: json.dumps(fields, indent=2) + "\n", **assets.files(weights.assets, config)}
    with whole_directory(path) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        _write_shards(folder, tensors, shard_bytes)
    return file_size(path)


def _write_shards(folder: Path, tensors: list[Tensor], shard_bytes: int) -> None:
    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * safetensors.DTYPES[tensor.dtype].itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        safetensors.write(folder / SINGLE, tensors, _METADATA)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors.write(folder / name, shard, _METADATA)
        places |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# --- tensors ---------------------------------------------------------------------------------------------------------


def _packed(weights: Weights, form: Layout, floats: str, stored: dict[leafwise.Path, np.ndarray]) -> list[Tensor]:
    scale_type = "BF16" if all(_is_bfloat16(scale) for scale in stored.values()) else "F32"

    def kernel(path: leafwise.Path) -> np.ndarray:
        return packing.encode(_matrix(weights, path))

    tensors = []
    for path in leafwise.paths(weights.config):
        name = names.name(path, form)
        if path not in stored:
            tensors.append(_float(weights, path, name, floats))
            continue
        k, n = leafwise.shape(weights.config, path)
        tensors.append(Tensor(name, "U8", (packing.rows(n), k), _once(functools.partial(kernel, path))))
        value = stored[path].astype(safetensors.DTYPES[scale_type]).reshape(1)
        tensors.append(Tensor(name + names.SCALE, scale_type, (1,), _once(lambda value=value: value)))
    return tensors


def _master(weights: Weights, form: Layout, floats: str) -> list[Tensor]:
    return [_float(weights, path, names.name(path, form), floats) for path in leafwise.paths(weights.config)]


def _float(weights: Weights, path: leafwise.Path, name: str, floats: str) -> Tensor:
    shape, transposed = leafwise.shape(weights.config, path), path[-1] == "kernel"

    def values() -> np.ndarray:
        leaf = weights.read(path)
        if isinstance(leaf, PackedTernary):
            leaf = _dequantized(leaf)
        leaf = leaf.astype(safetensors.DTYPES[floats], copy=False)
        return leaf.T if transposed else leaf

    return Tensor(name, floats, shape[::-1] if transposed else shape, _once(values))


def _once(values: Callable[[], np.ndarray]) -> Callable[[], Iterable[np.ndarray]]:
    return lambda: (values() for _ in range(1))


def _matrix(weights: Weights, path: leafwise.Path) -> PackedTernary:
    leaf = weights.read(path)
    assert isinstance(leaf, PackedTernary)
    return leaf


def _dequantized(matrix: PackedTernary) -> np.ndarray:
    values, scale = np.asarray(unpack(matrix)).astype(np.float32), np.asarray(matrix.scale)
    return values * (scale if scale.ndim == 0 else np.repeat(scale, matrix.k // len(scale), 0))


# --- scales ----------------------------------------------------------------------------------------------------------


def _scales(weights: Weights) -> dict[leafwise.Path, np.ndarray]:
    """The scale float32 of every packed kernel; all of them are read for it."""
    return {path: np.array(_matrix(weights, path).scale) for path in leafwise.paths(weights.config) if is_bitlinear(path)}


def _reciprocal(scale: np.ndarray) -> np.ndarray | None:
    """A number in float32 whose reciprocal is `scale`, a bfloat16 one if there is; None where there is none."""
    with np.errstate(over="ignore", divide="ignore"):
        near = np.asarray(np.float32(1) / scale, np.float32)
        # If the reciprocal of the nearest number is another, so are those of its neighbours, but a bfloat16 one may be further off.
        candidates = (near.astype(ml_dtypes.bfloat16).astype(np.float32), near)
        return next((value for value in candidates if np.isfinite(value) and np.float32(1) / value == scale), None)


def _is_bfloat16(values: np.ndarray) -> bool:
    return bool((values.astype(ml_dtypes.bfloat16).astype(np.float32) == values).all())
