"""StableHLO artefacts, version 1: a folder with a model's prefill and decode as `jax.export` programs, its weights, and a runner.

    manifest.json         what is below, versions, and the sha256 of every other file
    weights.safetensors   this project's model file (`model_file`), layers stacked: the first argument of both programs
    prefill.bin           programs as `jax.export.Exported.serialize` writes them; `deserialize(…).mlir_module_serialized` is the
    decode.bin            bare StableHLO portable artefact for other compilers
    tokenizer.json        where the model has one
    run.py                `stablehlo_runner`: continues a prompt, with jax and numpy alone
    flatbuffers.zip       the Python package that `jax.export` reads programs with, which jax does not bring

Both programs are pure functions of weights {name: array}, cache k and v [L, B, S, K, H] (both donated) and length [B] int32:

    prefill   (weights, k, v, length, tokens [B, chunk] int32, count [B] int32) → (logits [B, V] float32, k, v, length + count)
    decode    (weights, k, v, length, token [B] int32) → (logits [B, V] float32, k, v, length + 1)

`prefill` appends the first `count` tokens of each row, its logits are those behind the last of them (of no use where count is 0). A
cache has S = capacity + chunk positions: while no length passes `capacity`, nothing is ever written past its end. Flat, the arguments
stand in the order of the manifest's `arguments`; a module for several platforms has an int32 before them, the platform's index.

The products of packed weights are those of the portable implementation, "xla", whatever the exporting machine has. jax promises that
a program runs with a jaxlib built up to 6 months after the one that exported it, and up to 3 weeks before
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees). Programs are small and the weights are apart: what has
expired is exported anew from the weights.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from bitnet_jax import config as configs
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import Layers, ModelConfig, Remat
from bitnet_jax.data.prepared import check_vocabulary
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.formats import model_file, stablehlo_runner
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.files import file_size, whole_directory
from bitnet_jax.formats.weights import Weights
from bitnet_jax.params import Params
from bitnet_jax.transformer import KVCache, Transformer
from kernels_pallas import Encoding, PackedTernary

FORMAT = "bitnet-jax-stablehlo"
FORMAT_VERSION = 1
PLATFORMS = ("cpu", "cuda", "tpu")
"""Platforms that programs are lowered for, all on one machine."""
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"

_FIELDS = {
    "format": str,
    "format_version": int,
    "jax": str,
    "jaxlib": str,
    "calling_convention": int,
    "platforms": list,
    "vocabulary": int,
    "prefix": list,
    "stop_tokens": list,
    "config": dict,
    "encoding": str,
    "batch": int,
    "chunk": int,
    "capacity": int,
    "cache": dict,
    "arguments": dict,
    "files": dict,
}
_FILES = (WEIGHTS, "prefill.bin", "decode.bin", "run.py", "flatbuffers.zip")
_MAX_MANIFEST = 1 << 20  # bytes: a dozen times the longest that is written
_MAX_CAPACITY = 4096  # the default's upper bound: a cache that long of a large model is as large as its weights


# --- writing ---------------------------------------------------------------------------------------------------------


def write(
    directory: Path,
    weights: Weights,
    *,
    encoding: Encoding | None = None,
    platforms: Sequence[str] = PLATFORMS,
    batch: int = 1,
    chunk: int = 64,
    capacity: int | None = None,
) -> int:
    """Writes an artefact, one layer's matrix in memory at a time, and returns its size in bytes. It appears whole or not at all.

    Args:
        directory: a new or an empty folder.
        weights: the model; a ternary one is packed.
        encoding: of a ternary model's matrices; None is the one they have, or two_bit where they are latent.
        platforms: of `PLATFORMS`.
        batch: rows (B) that a call continues.
        chunk: tokens that a call of prefill takes from each row.
        capacity: longest text in tokens, prompt and new ones; None is the model's max_seq_len, but at most 4096.

    Raises:
        UserError: a value is out of range, the folder is not empty, or the flatbuffers package is not installed.
        RunError: the disk is full.
    """
    config = replace(weights.config, layers=Layers.SCAN)
    capacity = min(config.max_seq_len, _MAX_CAPACITY) if capacity is None else capacity
    if capacity > config.max_seq_len:
        raise UserError(f"capacity={capacity} must be at most the model's max_seq_len={config.max_seq_len}")
    for name, value in (("batch", batch), ("chunk", chunk), ("capacity", capacity)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise UserError(f"platforms={list(platforms)} must be of {', '.join(PLATFORMS)}")
    assets = weights.assets
    tokenizer = Tokenizer(assets.tokenizer, f"{weights.where}: tokenizer") if assets.tokenizer else None
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    end = () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
    if is_ternary(config):
        packed = leafwise.packed(weights, encoding or weights.encoding or Encoding.TWO_BIT)
        weights = replace(packed, stored=config.dtype)  # as a model file stores what is beside packed matrices
    weights = replace(weights, config=config, assets=replace(assets, tokenizer=None))

    with whole_directory(directory) as folder:
        _write_reader(folder / "flatbuffers.zip")
        sizes = {"batch": batch, "chunk": chunk, "capacity": capacity}
        functions, arguments = _programs(weights, **sizes)
        versions = set()
        with _without_places():
            for name, function in functions.items():
                exported = export.export(jax.jit(function, donate_argnums=(1, 2)), platforms=platforms)(*arguments[name].values())
                (folder / f"{name}.bin").write_bytes(exported.serialize())
                versions.add(exported.calling_convention_version)
        model_file.write(folder / WEIGHTS, weights)
        (folder / "run.py").write_bytes(Path(stablehlo_runner.__file__).read_bytes())
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "jax": jax.__version__,
            "jaxlib": metadata.version("jaxlib"),
            "calling_convention": max(versions),
            "platforms": list(platforms),
            "vocabulary": config.vocab_size if tokenizer is None else tokenizer.vocab_size,
            "prefix": list(assets.prefix),
            "stop_tokens": list(assets.stop_tokens or end),
            **_described(weights, **sizes),
            "files": {part.name: {"bytes": part.stat().st_size, "sha256": _sha256(part)} for part in sorted(folder.iterdir())},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return file_size(directory)


def _write_reader(path: Path) -> None:
    """The flatbuffers package as a ZIP file that Python imports from, the same bytes every time."""
    try:
        import flatbuffers
    except ImportError:
        raise UserError("exporting to StableHLO needs the package flatbuffers: pip install flatbuffers") from None
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for module in sorted(Path(flatbuffers.__file__).parent.glob("*.py")):
            archive.writestr(zipfile.ZipInfo(f"flatbuffers/{module.name}"), module.read_bytes(), zipfile.ZIP_DEFLATED)


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """While in it, programs do not name the source that they come from, with folders of this machine: it would be a fifth of the bytes."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


# --- programs --------------------------------------------------------------------------------------------------------


def _programs(
    weights: Weights, *, batch: int, chunk: int, capacity: int
) -> tuple[dict[str, Callable[..., Any]], dict[str, dict[str, Any]]]:
    """`prefill` and `decode`, and the shapes and types of their arguments, both by name."""
    config, encoding = weights.config, weights.encoding
    model = Transformer(replace(config.for_inference, remat=Remat.NONE), implementation="xla")

    def forward(tensors: Any, k: Any, v: Any, length: Any, tokens: Any, last: Any) -> tuple[Any, KVCache]:
        output: Any = model.apply({"params": _tree(tensors, config, encoding)}, tokens, KVCache(k, v, length), last)
        return output.logits[:, 0].astype(jnp.float32), output.cache

    def prefill(tensors: Any, k: Any, v: Any, length: Any, tokens: Any, count: Any) -> tuple[Any, Any, Any, Any]:
        logits, cache = forward(tensors, k, v, length, tokens, jnp.maximum(count - 1, 0))
        return logits, cache.k, cache.v, length + count

    def decode(tensors: Any, k: Any, v: Any, length: Any, token: Any) -> tuple[Any, Any, Any, Any]:
        logits, cache = forward(tensors, k, v, length, token[:, None], jnp.zeros_like(length))
        return logits, cache.k, cache.v, cache.length

    cache = jax.eval_shape(lambda: KVCache.empty(config, batch, capacity + chunk))
    first = {"weights": _tensors(weights), "k": cache.k, "v": cache.v, "length": cache.length}
    tokens = jax.ShapeDtypeStruct((batch, chunk), jnp.int32)
    arguments = {"prefill": first | {"tokens": tokens, "count": cache.length}, "decode": first | {"token": cache.length}}
    return {"prefill": prefill, "decode": decode}, arguments


def _tensors(weights: Weights) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every tensor of the weights' file, which are the programs' first argument."""
    types = {"U8": "uint8", "F32": "float32", None: weights.stored.value}
    found = model_file.tensors(weights.config, weights.encoding)
    return {name: jax.ShapeDtypeStruct(shape, types[kind]) for name, (_, kind, shape, _) in found.items()}


def _tree(tensors: dict[str, Any], config: ModelConfig, encoding: Encoding | None) -> Params:
    """The parameter tree of the tensors of a model file."""
    params: Params = {}
    for name, (part, _, _, paths) in model_file.tensors(config, encoding).items():
        if part == "scale":
            continue
        *parents, last = name.removesuffix(".codes").split("/")
        leaf = tensors[name]
        if part and encoding is not None:
            scale = tensors[name.removesuffix(".codes") + ".scale"]
            leaf = PackedTernary(leaf, scale, k=leafwise.shape(config, paths[0])[0], encoding=encoding)
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return params


def _described(weights: Weights, *, batch: int, chunk: int, capacity: int) -> dict[str, Any]:
    """What the manifest says of model and programs: all that follows from the configuration and the three sizes."""

    def entry(name: str, array: Any) -> dict[str, Any]:
        return {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)}

    def listed(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        tensors = [entry(f"weights/{name}", array) for name, array in sorted(arguments["weights"].items())]
        return tensors + [entry(name, array) for name, array in arguments.items() if name != "weights"]

    _, arguments = _programs(weights, batch=batch, chunk=chunk, capacity=capacity)
    cache = arguments["decode"]["k"]
    return {
        "config": configs.to_dict(weights.config),
        "encoding": weights.encoding.value if weights.encoding else "none",
        "batch": batch,
        "chunk": chunk,
        "capacity": capacity,
        "cache": {"shape": list(cache.shape), "dtype": str(cache.dtype)},
        "arguments": {name: listed(found) for name, found in arguments.items()},
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def is_artefact(directory: Path) -> bool:
    """Whether `directory` is such a folder."""
    return (directory / MANIFEST).is_file()


def read(directory: Path) -> Weights:
    """The model in an artefact. Its programs and its runner are compared with their hashes, and neither loaded nor run.

    Raises:
        UserError: a file is missing, surplus, a link, or another than the manifest says; the manifest is of another format or version, or
            says something else than the weights' own configuration. Otherwise as `model_file.read`.
    """
    where = directory / MANIFEST
    manifest = _manifest(where)
    files = manifest["files"]
    optional = {TOKENIZER} & files.keys()
    if files.keys() != {*_FILES, *optional}:
        wrong = sorted(files.keys() ^ {*_FILES, *optional})[0]
        raise UserError(f"{where}: files must be {', '.join(_FILES)}, and perhaps {TOKENIZER}: {wrong[:100]!r} is surplus or missing")
    for name in sorted({part.name for part in directory.iterdir()} ^ {MANIFEST, *files}):
        raise UserError(f"{directory / name[:100]} is {'missing' if name in files else 'not in the manifest'}")
    for name, entry in files.items():
        part = directory / name
        if part.is_symlink() or not part.is_file():
            raise UserError(f"{part} must be a plain file, and no link")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise UserError(f"{where}: {name} must have bytes and sha256")
        if entry["bytes"] != part.stat().st_size:
            raise UserError(f"{part} has {part.stat().st_size} bytes: the manifest says {str(entry['bytes'])[:100]}")
        if entry["sha256"] != _sha256(part):
            raise UserError(f"{part} is damaged: its sha256 is not the manifest's")
    weights = model_file.read(directory / WEIGHTS)
    for name, value in _described(weights, **{name: manifest[name] for name in ("batch", "chunk", "capacity")}).items():
        if manifest[name] != value:
            raise UserError(f"{where}: {name} is not that of {WEIGHTS}")
    assets = weights.assets
    if optional:
        assets = replace(assets, tokenizer=Tokenizer.read(directory / TOKENIZER).to_json())
    return replace(weights, assets=assets, where=str(directory))


def _manifest(path: Path) -> dict[str, Any]:
    """The fields of a manifest, of the right types; `files` and what `_described` gives are still to be compared."""
    try:
        if path.is_symlink() or path.stat().st_size > _MAX_MANIFEST:
            raise UserError(f"{path} must be a plain file of at most {_MAX_MANIFEST} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {str(error)[:200]}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} must have format {FORMAT!r} and format_version {FORMAT_VERSION}")
    if found.keys() != _FIELDS.keys():
        wrong = sorted(found.keys() ^ _FIELDS.keys())[0]
        raise UserError(f"{path} {'has unknown' if wrong in found else 'lacks'} field {wrong[:100]!r}")
    for name, kind in _FIELDS.items():
        if type(found[name]) is not kind:
            raise UserError(f"{path}: {name} must be of type {kind.__name__}")
    for name in ("batch", "chunk", "capacity"):
        if not 1 <= found[name] < 2**31:
            raise UserError(f"{path}: {name} must be from 1 to 2147483647")
    return found


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- running ---------------------------------------------------------------------------------------------------------


def generate(directory: Path, ids: Sequence[int], new_tokens: int) -> list[int]:
    """The tokens that the artefact's own runner makes, in a process of its own. It runs what is in the folder: trust it first.

    Raises:
        RunError: the runner failed; its last line says why.
    """
    command = [sys.executable, "-I", str(directory / "run.py"), "--ids", ",".join(map(str, ids)), "--tokens", str(new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{directory / 'run.py'} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}")
    return [int(token) for token in done.stdout.strip().split(",") if token]
