"""This project's model file, version 1: one safetensors file that holds everything a model needs.

Tensors are named by their path in the parameter tree, joined by '/'. A packed kernel is two of them, `<path>.codes` (uint8, the bytes
of `kernels_pallas.packing`) and `<path>.scale` (float32). The metadata holds, as strings:

    format          "bitnet-jax-model"
    format_version  "1"
    packing         version of the packed bytes, as in `kernels_pallas.packing`
    encoding        "two_bit" or "base3" where the linear layers are packed, "none" where they are latent
    config          the ModelConfig as JSON
    tokenizer       a tokenizer.json, or ""
    provenance      a JSON object

What is not packed is stored in the type that the model computes in, which loses nothing: it would be cast to it at use.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bitnet_jax import config as configs
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import DType, ModelConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.params import Params, is_bitlinear, leaves
from bitnet_jax.transformer import parameter_shapes
from kernels_pallas import FORMAT_VERSION as PACKING_VERSION
from kernels_pallas import Encoding, PackedTernary, bytes_per_row, check

FORMAT = "bitnet-jax-model"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"

_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8)}


class Contents(NamedTuple):
    """What a model file holds; `tokenizer` is the text of a tokenizer.json or None."""

    config: ModelConfig
    params: Params
    tokenizer: str | None
    provenance: dict[str, Any]
    encoding: Encoding | None


# --- writing ---------------------------------------------------------------------------------------------------------


def write(
    path: Path,
    params: Params,
    config: ModelConfig,
    *,
    tokenizer: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    dtype: DType | None = None,
) -> int:
    """Writes a model file and returns its size in bytes. It appears whole or not at all.

    Args:
        path: the file, which must end in .safetensors; one that is there is replaced.
        params: latent parameters, or packed ones.
        config: the model's configuration.
        tokenizer: text of a tokenizer.json.
        provenance: where the model comes from, as JSON values.
        dtype: type of what is not packed; None is the model's compute type where the linear layers are packed, and float32 where not.

    Raises:
        UserError: the path has another suffix, or its folder does not exist.
        RunError: the disk is full.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{path} must end in {SUFFIX}")
    tensors: dict[str, np.ndarray] = {}
    encodings = {leaf.encoding for _, leaf in leaves(params) if isinstance(leaf, PackedTernary)}
    encoding = encodings.pop() if encodings else None
    rest = dtype or (config.dtype if encoding else DType.FLOAT32)
    for name, leaf in ((("/".join(path)), leaf) for path, leaf in leaves(params)):
        if isinstance(leaf, PackedTernary):
            tensors[f"{name}.codes"], tensors[f"{name}.scale"] = np.asarray(leaf.codes), np.asarray(leaf.scale)
        else:
            tensors[name] = np.asarray(jnp.asarray(leaf).astype(rest.value))
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "packing": str(PACKING_VERSION),
        "encoding": encoding.value if encoding else "none",
        "config": configs.to_json(config),
        "tokenizer": tokenizer or "",
        "provenance": json.dumps(dict(provenance or {})),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Contents:
    """The model in the file `path`. Names, shapes and types are held against its configuration before any tensor is read.

    Raises:
        UserError: the file is missing, no safetensors file or not of this format or version; a tensor is missing, surplus, or of another
            shape or type than the configuration says; a code, a scale or a number is invalid.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            config, encoding, metadata = _header(path, file.metadata() or {})
            expected = _expected(config, encoding)
            names = set(file.keys())
            for name in sorted(expected.keys() - names):
                raise UserError(f"{path} lacks tensor {name}")
            for name in sorted(names - expected.keys()):
                raise UserError(f"{path} has tensor {name}, which the configuration does not know")
            for name, (shape, types) in expected.items():
                view = file.get_slice(name)
                if tuple(view.get_shape()) != shape:
                    raise UserError(f"{path}: tensor {name} has shape {tuple(view.get_shape())}: must be {shape}")
                if view.get_dtype() not in types:
                    raise UserError(f"{path}: tensor {name} has type {view.get_dtype()}: must be {' or '.join(types)}")
            params = _assemble(path, {name: file.get_tensor(name) for name in expected}, config, encoding)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file: {error}") from None
    return Contents(config, params, metadata["tokenizer"] or None, _json_object(path, metadata["provenance"]), encoding)


def _header(path: Path, metadata: dict[str, str]) -> tuple[ModelConfig, Encoding | None, dict[str, str]]:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} has format {metadata.get('format')!r}: must be {FORMAT!r}")
    for key, version in (("format_version", FORMAT_VERSION), ("packing", PACKING_VERSION)):
        if metadata.get(key) != str(version):
            raise UserError(f"{path} has {key} {metadata.get(key)!r}: must be {str(version)!r}")
    missing = [key for key in ("encoding", "config", "tokenizer", "provenance") if key not in metadata]
    if missing:
        raise UserError(f"{path} lacks metadata {missing[0]!r}")
    choices = {encoding.value: encoding for encoding in Encoding} | {"none": None}
    if metadata["encoding"] not in choices:
        raise UserError(f"{path} has encoding {metadata['encoding']!r}: must be one of {', '.join(choices)}")
    encoding = choices[metadata["encoding"]]
    config = configs.from_json(ModelConfig, metadata["config"], f"{path}: config")
    if encoding is not None and not is_ternary(config):
        raise UserError(f"{path} has encoding {encoding.value!r}, but its configuration has no ternary layers")
    return config, encoding, metadata


def _expected(config: ModelConfig, encoding: Encoding | None) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and allowed types of every tensor."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for path, leaf in leaves(parameter_shapes(config)):
        name = "/".join(path)
        if encoding is None or not is_bitlinear(path):
            expected[name] = (leaf.shape, ("F32", "BF16"))
            continue
        *layers, k, n = leaf.shape
        group = config.quant.weight_group
        expected[f"{name}.codes"] = ((*layers, n, bytes_per_row(k, encoding)), ("U8",))
        expected[f"{name}.scale"] = ((*layers, k // group, n) if group else tuple(layers), ("F32",))
    return expected


def _assemble(path: Path, tensors: dict[str, np.ndarray], config: ModelConfig, encoding: Encoding | None) -> Params:
    widths = {"o": config.num_heads * config.head_dim, "down": config.ffn_size}
    params: Params = {}
    for name, tensor in tensors.items():
        if name.endswith(".scale") and name.removesuffix(".scale") + ".codes" in tensors:
            continue
        *parents, leaf = name.removesuffix(".codes").split("/")
        if name.endswith(".codes") and encoding is not None:
            value: Any = PackedTernary(
                tensor, tensors[name.removesuffix(".codes") + ".scale"], k=widths.get(parents[-1], config.hidden_size), encoding=encoding
            )
            try:
                check(value)
            except ValueError as error:
                raise UserError(f"{path}: {'/'.join((*parents, leaf))}: {error}") from None
        else:
            value = tensor
            if not np.all(np.isfinite(tensor.astype(np.float32, copy=False))):
                raise UserError(f"{path}: tensor {name} holds NaN or infinity")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return params


def _json_object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: provenance is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: provenance must be an object")
    return value
