"""A model as an orbax checkpoint: for programs in JAX that restore a parameter tree and know nothing of this project's files.

model.json   format, version, encoding, the ModelConfig, assets but the tokenizer, and provenance
tokenizer.json
params/      the parameter tree, as `orbax.checkpoint.StandardCheckpointer` writes it; a packed kernel is {"codes", "scale"}
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_jax import config as configs
from bitnet_jax import orbax_errors
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import DType, ModelConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.formats import model_file
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.files import file_size, whole_directory
from bitnet_jax.formats.weights import Weights
from bitnet_jax.params import Params, map_leaves
from kernels_pallas import Encoding, PackedTernary

FORMAT = "bitnet-jax-orbax"
FORMAT_VERSION = 1
MANIFEST = "model.json"
_PARAMS = "params"
_MAX_JSON = 64 << 20
_MOST_COMPRESSED = 32  # bytes of a tree to a byte on the disk; weights hardly compress, and zeros without end are an attack


def is_model(directory: Path) -> bool:
    """Whether `directory` is such a folder."""
    return (directory / MANIFEST).is_file()


def write(directory: Path, weights: Weights) -> int:
    """Writes the folder and returns its size in bytes. It appears whole or not at all.

    Orbax takes a whole tree; what it is given lies in a mapped file, written leaf by leaf beside it and removed afterwards.

    Raises:
        UserError: there is something at `directory`, or its parent does not exist.
        RunError: the disk is full.
    """
    import orbax.checkpoint as ocp

    with whole_directory(directory) as folder:
        mapped = folder / "mapped.safetensors"
        model_file.write(mapped, weights)
        source = model_file.read(mapped)
        params = map_leaves(lambda _, leaf: _plain(leaf), leafwise.load(source))
        orbax_errors.ignore_abandoned_writes()
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((folder / _PARAMS).absolute(), params)
        except Exception as error:  # orbax passes on whatever its threads met
            raise RunError(f"{directory} could not be written: {orbax_errors.first_line(error)}") from error
        assets = asdict(weights.assets)
        tokenizer = assets.pop("tokenizer")
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "encoding": weights.encoding.value if weights.encoding else None,
            "stored": source.stored.value,
            "config": configs.to_dict(weights.config),
            "assets": assets,
            "provenance": weights.provenance,
        }
        (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        del params, source
        mapped.unlink()
    return file_size(directory)


def _plain(leaf: Any) -> Any:
    return {"codes": leaf.codes, "scale": leaf.scale} if isinstance(leaf, PackedTernary) else leaf


def read(directory: Path) -> Weights:
    """The model in such a folder, restored whole.

    Raises:
        UserError: the folder is not of this format or version, or damaged.
    """
    import orbax.checkpoint as ocp

    manifest = _manifest(directory)
    where = f"{directory / MANIFEST}"
    config = configs.from_dict(ModelConfig, manifest["config"], f"{where}: config")
    try:
        encoding = Encoding(manifest["encoding"]) if manifest["encoding"] is not None else None
        stored = DType(manifest["stored"])
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if encoding is not None and not is_ternary(config):
        raise UserError(f"{where} has encoding {encoding.value!r}, but its configuration has no ternary layers")
    target = _target(config, encoding, stored)
    claimed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
    held = file_size(directory / _PARAMS) if (directory / _PARAMS).is_dir() else 0
    if claimed > _MOST_COMPRESSED * held:
        raise UserError(f"{directory / _PARAMS} has {held} bytes: too few for the {claimed} that the configuration says")

    def restore() -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            # Before any array is read: orbax abandons the others where one does not fit, and they end at any later moment.
            held: Any = checkpointer.metadata((directory / _PARAMS).absolute()).item_metadata
            _compare(held.tree, target, "params")
            return checkpointer.restore((directory / _PARAMS).absolute(), target)

    params, reason = orbax_errors.attempt(restore)
    if reason is not None:
        raise UserError(f"{directory / _PARAMS} cannot be restored: {reason}")
    text = directory / "tokenizer.json"
    try:
        if text.is_symlink() or (text.is_file() and text.stat().st_size > _MAX_JSON):
            raise UserError(f"{text} must be a plain file of at most {_MAX_JSON} bytes")
        tokenizer = text.read_text(encoding="utf-8") if text.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{text} cannot be read: {error}") from None
    weights = leafwise.from_params(
        _packed(params, config, encoding),
        config,
        assets=leafwise.assets_from_json(manifest["assets"], config, tokenizer, f"{where}: assets"),
        provenance=manifest["provenance"],
        where=str(directory),
    )
    for path in leafwise.paths(config):
        leafwise.checked(weights.read(path), path, config, str(directory))
    return weights


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UserError(f"{path} has {path.stat().st_size} bytes: must be at most {_MAX_JSON}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    expected = {"format": str, "format_version": int, "encoding": object, "stored": str, "config": dict, "assets": dict, "provenance": dict}
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} must have format {FORMAT!r} and format_version {FORMAT_VERSION}")
    for name, kind in expected.items():
        if not isinstance(found.get(name), kind):
            raise UserError(f"{path} must have {name}, of type {kind.__name__}")
    return found


def _target(config: ModelConfig, encoding: Encoding | None, stored: DType) -> Params:
    """Shapes and types of the tree that was written, on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target: Params = {}
    for name, (part, kind, shape, _) in model_file.tensors(config, encoding).items():
        *parents, last = name.removesuffix(f".{part}").split("/") if part else name.split("/")
        place = target
        for parent in (*parents, last) if part else parents:
            place = place.setdefault(parent, {})
        dtype = {"U8": np.uint8, "F32": np.float32}[kind] if kind else stored.value
        place[part or last] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return target


def _compare(held: Any, target: Any, name: str) -> None:
    """Raises ValueError where a tree on the disk has other names, shapes or types than `target`."""
    if isinstance(target, dict):
        if not isinstance(held, dict) or held.keys() != target.keys():
            raise ValueError(f"{name} must hold {', '.join(sorted(target))}")
        for key in target:
            _compare(held[key], target[key], f"{name}/{key}")
    elif isinstance(held, dict) or (tuple(held.shape), np.dtype(held.dtype)) != (target.shape, target.dtype):
        raise ValueError(f"{name} must have shape {target.shape} and type {target.dtype}")


def _packed(params: Params, config: ModelConfig, encoding: Encoding | None) -> Params:
    """The tree with every {"codes", "scale"} as the packed kernel that it was, on the host."""
    sizes = {path[-2]: leafwise.shape(config, path)[0] for path in leafwise.paths(config) if path[-1] == "kernel"}

    def walk(tree: Any, name: str) -> Any:
        if encoding is not None and isinstance(tree, dict) and tree.keys() == {"codes", "scale"}:
            return PackedTernary(np.asarray(tree["codes"]), np.asarray(tree["scale"]), k=sizes[name], encoding=encoding)
        if isinstance(tree, dict):
            return {key: walk(value, name if key == "kernel" else key) for key, value in tree.items()}
        return np.asarray(tree)

    return walk(params, "")
