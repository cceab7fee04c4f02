"""This project's model file, version 1: one safetensors file that holds everything a model needs, and is mapped and not copied.

Tensors are named by their path in the stacked parameter tree, joined by '/'. A packed kernel is two of them, `<path>.codes` (uint8, the
bytes of `kernels_pallas.packing`) and `<path>.scale` (float32). The metadata holds, as strings:

    format          "bitnet-jax-model"
    format_version  "1"
    packing         version of the packed bytes, as in `kernels_pallas.packing`
    encoding        "two_bit" or "base3" where the linear layers are packed, "none" where they are latent
    config          the ModelConfig as JSON
    tokenizer       a tokenizer.json, or ""
    assets          a JSON object: what else goes with the weights, as `weights.Assets`
    provenance      a JSON object

What is not packed has the type that it came in; beside packed kernels it has the type that the model computes in, if that is the smaller
one. That loses nothing: it would be cast to it at use.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bitnet_jax import config as configs
from bitnet_jax import partition
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import DType, Layers, ModelConfig
from bitnet_jax.errors import UserError
from bitnet_jax.formats import safetensors
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets, Leaf, Weights
from bitnet_jax.params import Params, is_bitlinear
from kernels_pallas import FORMAT_VERSION as PACKING_VERSION
from kernels_pallas import Encoding, PackedTernary, bytes_per_row

FORMAT = "bitnet-jax-model"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"

_FLOATS = {DType.FLOAT32: "F32", DType.BFLOAT16: "BF16"}


# --- writing ---------------------------------------------------------------------------------------------------------


def write(path: Path, weights: Weights, *, dtype: DType | None = None) -> int:
    """Writes a model file, one layer's matrix in memory at a time, and returns its size in bytes. It appears whole or not at all.

    Args:
        path: the file, which must end in .safetensors; one that is there is replaced.
        weights: the model, latent or packed.
        dtype: type of what is not packed; None is the one that loses nothing.

    Raises:
        UserError: the path has another suffix, or its folder does not exist.
        RunError: the disk is full.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{path} must end in {SUFFIX}")
    config, encoding = weights.config, weights.encoding
    floats = _FLOATS[dtype or _float_type(weights)]
    scales: dict[leafwise.Path, np.ndarray] = {}

    def leaf(path: leafwise.Path) -> Leaf:
        found = weights.read(path)
        if isinstance(found, PackedTernary):
            scales[path] = np.asarray(found.scale)
            return found
        return np.asarray(jnp.asarray(found).astype(safetensors.DTYPES[floats]))

    def codes(paths: list[leafwise.Path]) -> Iterator[np.ndarray]:
        return (np.asarray(found.codes) for found in map(leaf, paths) if isinstance(found, PackedTernary))

    def scale(paths: list[leafwise.Path]) -> Iterator[np.ndarray]:
        for path in paths:
            if path not in scales:
                leaf(path)
            yield scales[path]

    def values(paths: list[leafwise.Path]) -> Iterator[np.ndarray]:
        return (found for found in map(leaf, paths) if isinstance(found, np.ndarray))

    pieces = {"codes": codes, "scale": scale, "": values}
    planned = [
        safetensors.Tensor(name, kind or floats, shape, lambda part=part, paths=paths: pieces[part](paths))
        for name, (part, kind, shape, paths) in tensors(config, encoding).items()
    ]
    assets = asdict(weights.assets)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "packing": str(PACKING_VERSION),
        "encoding": encoding.value if encoding else "none",
        "config": configs.to_json(config),
        "tokenizer": assets.pop("tokenizer") or "",
        "assets": json.dumps(assets),
        "provenance": json.dumps(weights.provenance),
    }
    return safetensors.write(path, planned, metadata)


def _float_type(weights: Weights) -> DType:
    """The smallest type in which what is not packed loses nothing."""
    return weights.config.dtype if weights.encoding and weights.config.dtype is DType.BFLOAT16 else weights.stored


def tensors(config: ModelConfig, encoding: Encoding | None) -> dict[str, tuple[str, str | None, tuple[int, ...], list[leafwise.Path]]]:
    """Of every tensor by name: part of a packed kernel or "", type or None where it is one of the float types, shape, and its leaves."""
    stacks: dict[str, list[leafwise.Path]] = {}
    for path in leafwise.paths(config):
        stacked = config.layers is Layers.SCAN and path[0].startswith("block_")
        stacks.setdefault("/".join(("blocks", *path[1:]) if stacked else path), []).append(path)
    found: dict[str, tuple[str, str | None, tuple[int, ...], list[leafwise.Path]]] = {}
    for name, paths in stacks.items():
        shape = leafwise.shape(config, paths[0])
        lead = (len(paths),) if name.startswith("blocks/") else ()
        if encoding is None or not is_bitlinear(paths[0]):
            found[name] = ("", None, (*lead, *shape), paths)
            continue
        k, n = shape
        scales = config.quant.scale_shape(k, n, partition.cut_axis("/".join(paths[0]), config.quant))
        found[f"{name}.codes"] = ("codes", "U8", (*lead, n, bytes_per_row(k, encoding)), paths)
        found[f"{name}.scale"] = ("scale", "F32", (*lead, *scales), paths)
    return found


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Weights:
    """The model in the file `path`, mapped. Names, shapes and types are held against its configuration; contents when they are read.

    Raises:
        UserError: the file is missing, no safetensors file or not of this format or version; a tensor is missing, surplus, or of another
            shape or type than the configuration says. From `read` and `tree`: a code, a scale or a number is invalid.
    """
    file = safetensors.File(path)
    config, encoding, assets, provenance = _header(path, file.metadata)
    if config.num_layers > len(file.tensors) and config.layers is Layers.LOOP:
        raise UserError(f"{path} has {len(file.tensors)} tensors: too few for num_layers={config.num_layers}")
    expected = tensors(config, encoding)
    for name in sorted(expected.keys() - file.tensors.keys()):
        raise UserError(f"{path} lacks tensor {name}")
    for name in sorted(file.tensors.keys() - expected.keys()):
        raise UserError(f"{path} has tensor {name[:100]}, which the configuration does not know")
    for name, (_, kind, shape, _) in expected.items():
        info = file.tensors[name]
        if info.shape != shape:
            raise UserError(f"{path}: tensor {name} has shape {info.shape}: must be {shape}")
        if info.dtype not in ((kind,) if kind else _FLOATS.values()):
            raise UserError(f"{path}: tensor {name} has type {info.dtype}: must be {kind or ' or '.join(_FLOATS.values())}")

    def take(name: str, k: int, index: int | None) -> Leaf:
        def part(name: str) -> np.ndarray:
            return file.read(name) if index is None else file.read(name)[index]

        if encoding is None or f"{name}.codes" not in expected:
            return part(name)
        return PackedTernary(part(f"{name}.codes"), part(f"{name}.scale"), k=k, encoding=encoding)

    def leaf(at: leafwise.Path) -> Leaf:
        stacked = config.layers is Layers.SCAN and at[0].startswith("block_")
        name, index = ("/".join(("blocks", *at[1:])), int(at[0].removeprefix("block_"))) if stacked else ("/".join(at), None)
        return leafwise.checked(take(name, leafwise.shape(config, at)[0], index), at, config, str(path))

    def tree() -> Params:
        params: Params = {}
        for name in expected:
            if name.endswith(".scale") and name.removesuffix(".scale") + ".codes" in expected:
                continue
            paths = expected[name][3]
            *parents, last = name.removesuffix(".codes").split("/")
            found = take("/".join((*parents, last)), leafwise.shape(config, paths[0])[0], None)
            place = params
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = leafwise.checked_numbers(found, "/".join((*parents, last)), str(path))
            file.release()  # what was checked comes back when it is used
        return params

    kinds = {file.tensors[name].dtype for name, (_, kind, _, _) in expected.items() if kind is None}
    return Weights(
        config=config,
        read=leaf,
        encoding=encoding,
        assets=assets,
        provenance=provenance,
        where=str(path),
        stored=DType.BFLOAT16 if kinds == {"BF16"} else DType.FLOAT32,
        release=file.release,
        tree=tree,
    )


def _header(path: Path, metadata: dict[str, str]) -> tuple[ModelConfig, Encoding | None, Assets, dict[str, Any]]:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} has format {metadata.get('format', '')[:100]!r}: must be {FORMAT!r}")
    for key, version in (("format_version", FORMAT_VERSION), ("packing", PACKING_VERSION)):
        if metadata.get(key) != str(version):
            raise UserError(f"{path} has {key} {metadata.get(key, '')[:100]!r}: must be {str(version)!r}")
    missing = [key for key in ("encoding", "config", "tokenizer", "assets", "provenance") if key not in metadata]
    if missing:
        raise UserError(f"{path} lacks metadata {missing[0]!r}")
    choices = {encoding.value: encoding for encoding in Encoding} | {"none": None}
    if metadata["encoding"] not in choices:
        raise UserError(f"{path} has encoding {metadata['encoding'][:100]!r}: must be one of {', '.join(choices)}")
    encoding = choices[metadata["encoding"]]
    config = configs.from_json(ModelConfig, metadata["config"], f"{path}: config")
    if encoding is not None and not is_ternary(config):
        raise UserError(f"{path} has encoding {encoding.value!r}, but its configuration has no ternary layers")
    assets = leafwise.assets_from_json(_json_object(path, metadata, "assets"), config, metadata["tokenizer"] or None, f"{path}: assets")
    return config, encoding, assets, _json_object(path, metadata, "provenance")


def _json_object(path: Path, metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {key} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} must be an object")
    return value
