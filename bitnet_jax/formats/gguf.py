"""GGUF files of bitnet.cpp, llama.cpp and ik_llama.cpp: models read from them and written for them.

The architecture that a file names decides norms and activation (`gguf_graphs`), the types of its matrices the arithmetic:

    I2_S     bitnet.cpp alone. Activations as int8 per token: this project's own arithmetic, but for sums in int16, which can overflow.
             ik_llama.cpp cannot compute with it, but its llama-quantize makes IQ2_BN of it.
    TQ1_0,   llama.cpp and bitnet.cpp. Activations as int8 per 256 of a token, so not what the model was trained with: logits differ by
    TQ2_0    the rounding of the activations, about 1/127 of the largest in a block
    floats   no quantisation of activations: the full-precision twin

For all ternary types, what TriLM leaves alone is quantised too. A file does not say whether a model was trained that way; one written
here says so itself, in the keys `bitnet_jax.activation` and `bitnet_jax.dtype`, over which other programs pass.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import (
    ActivationQuantizer,
    DType,
    Linear,
    ModelConfig,
    QuantConfig,
)
from bitnet_jax.errors import UserError
from bitnet_jax.formats import gguf_tokenizer
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.gguf_blocks import CHUNK, BlockType, decode_floats, decode_ternary, encode_floats, encode_ternary, i2_s_tail, scales
from bitnet_jax.formats.gguf_container import File, Info, Tensor
from bitnet_jax.formats.gguf_container import write as write_container
from bitnet_jax.formats.gguf_graphs import GRAPHS, architecture_for, as_halves, as_pairs, permuted_heads, tensor_name
from bitnet_jax.formats.weights import Leaf, Path, Weights, checked, paths, shape
from bitnet_jax.params import is_bitlinear
from kernels_pallas import Encoding, PackedTernary

TYPES = ("i2_s", "tq1_0", "tq2_0", "f16", "bf16", "f32", "q8_0")
"""Types of the linear layers that are written."""
EMBEDDINGS = ("f16", "bf16", "f32", "q8_0")
"""Types of the embedding and the head that are written."""
TARGETS = ("bitnet.cpp", "llama.cpp", "ik_llama.cpp")
"""Programs that files are written for."""

_KNOWN = (
    *("vocab_size", "context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon"),
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "expert_count", "expert_used_count"),
)
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "i2_s": 40}
_TQ_GROUP = 256
_ZEROS = 0x55  # four weights of zero in a byte of `Encoding.TWO_BIT`


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: FilePath, *, tokenizer: bool = True) -> Weights:
    """The model in the GGUF file `path`, with the graph that its architecture names.

    Ternary types give packed kernels, all others the full-precision twin. TQ types have a scale for each 256 weights; where all of each
    matrix are equal, as in BitNet, they become its one scale, else `weight_group` is 256.

    Args:
        path: the file.
        tokenizer: False leaves the tokenizer out, which may then be of an unknown kind.

    Raises:
        UserError: it is no GGUF file, is damaged, or holds a model that this project cannot compute; from `Weights.read`, damaged weights.
    """
    file = File(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GRAPHS:
        raise UserError(f"{path}: general.architecture={str(architecture)[:100]!r} is not read: must be one of {', '.join(GRAPHS)}")
    config, stated = _config(file, architecture)
    names = {leaf: tensor_name(leaf) for leaf in paths(config)}
    extra = [name.removesuffix("weight") + "scale" for leaf, name in names.items() if is_bitlinear(leaf) and architecture == "bitnet"]
    extra = [name for name in extra if name in file.tensors]
    _check_names(file, {*names.values(), *extra})
    for leaf, name in names.items():
        expected = shape(config, leaf)[::-1] if leaf[-1] == "kernel" else shape(config, leaf)
        _check_tensor(file, name, expected, ternary=is_bitlinear(leaf))
    for name in extra:
        _check_tensor(file, name, (1,), ternary=False)
    kinds = {file.tensors[name].kind for leaf, name in names.items() if is_bitlinear(leaf)}
    if len({kind.ternary for kind in kinds}) > 1:
        raise UserError(f"{path} has linear layers of types {', '.join(sorted(kind.name for kind in kinds))}: must all be ternary, or none")
    ternary = any(kind.ternary for kind in kinds)
    if ternary:
        group = _TQ_GROUP if _has_groups(file, [name for leaf, name in names.items() if is_bitlinear(leaf)]) else None
        config = replace(config, linear=Linear.BIT, quant=QuantConfig(weight_group=group, activation=stated))
    assets = gguf_tokenizer.read(file.metadata, config.vocab_size, str(path)) if tokenizer else leafwise.Assets()

    def read_leaf(leaf: Path) -> Leaf:
        with np.errstate(over="ignore", invalid="ignore"):  # `checked` finds what is not finite
            found = _leaf(file, names[leaf], leaf, config, architecture)
        return checked(found, leaf, config, str(path))

    return Weights(
        config=config,
        read=read_leaf,
        encoding=Encoding.TWO_BIT if ternary else None,
        assets=assets,
        provenance={
            "file": path.name,
            "architecture": architecture,
            "graph": "llama.cpp" if architecture in ("llama", "bitnet") else "bitnet.cpp",
            "types": sorted(kind.name for kind in kinds),
        },
        where=str(path),
        release=file.release,
    )


class _Keys:
    """Keys of one architecture, checked."""

    def __init__(self, file: File, architecture: str) -> None:
        self.file, self.prefix = file, f"{architecture}."

    def wrong(self, name: str, rule: str) -> UserError:
        found = repr(self.file.metadata.get(self.prefix + name))
        return UserError(f"{self.file.path}: {self.prefix}{name}={' '.join(found.split())[:100]} must be {rule}")

    def count(self, name: str, default: int | None = None) -> int:
        found = self.file.metadata.get(self.prefix + name, default)
        if type(found) is not int or not 0 < found < 2**31:
            raise self.wrong(name, "a whole number from 1 to 2147483647")
        return found

    def real(self, name: str, default: float | None = None) -> float:
        """The shortest decimal number of those that are stored alike."""
        found = self.file.metadata.get(self.prefix + name, default)
        if type(found) not in (int, float):
            raise self.wrong(name, "a number")
        return float(str(np.float32(found))) if abs(found) < 3e38 else float(found)

    def must_be(self, name: str, value: int) -> None:
        found = self.file.metadata.get(self.prefix + name, value)
        if type(found) is not int or found != value:
            raise self.wrong(name, f"{value}: nothing else is computed here")

    def ours(self, name: str, default: str) -> str:
        """A key of this project."""
        found = self.file.metadata.get(f"bitnet_jax.{name}", default)
        if not isinstance(found, str):
            raise UserError(f"{self.file.path}: bitnet_jax.{name} must be text")
        return found


def _config(file: File, architecture: str) -> tuple[ModelConfig, ActivationQuantizer]:
    """The configuration of the full-precision twin, and how activations are quantised should the weights be ternary."""
    keys = _Keys(file, architecture)
    for key in file.metadata:
        if key.startswith(keys.prefix) and key.removeprefix(keys.prefix) not in _KNOWN:
            raise UserError(f"{file.path}: metadata {key[:100]!r} is not known: it may change what the model computes")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} lacks tensor token_embd.weight")
    vocab = file.tensors["token_embd.weight"].shape[0]
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads)
    keys.must_be("attention.value_length", head_dim)
    keys.must_be("rope.dimension_count", head_dim)
    keys.must_be("vocab_size", vocab)
    keys.must_be("expert_count", 0)
    if keys.real("rope.scaling.factor", 1.0) not in (0.0, 1.0):
        raise keys.wrong("rope.scaling.factor", "1: scaled rotary positions are not computed here")
    norm, ffn = GRAPHS[architecture]
    try:
        config = ModelConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            ffn_size=keys.count("feed_forward_length"),
            num_layers=keys.count("block_count"),
            num_heads=heads,
            num_kv_heads=keys.count("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_seq_len=keys.count("context_length"),
            rope_theta=keys.real("rope.freq_base", 10_000.0),
            norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
            linear=Linear.FULL,
            norm=norm,
            ffn=ffn,
            tie_embeddings="output.weight" not in file.tensors,
            dtype=DType(keys.ours("dtype", "float32")),
        )
        return config, ActivationQuantizer(keys.ours("activation", "per_token"))
    except ValueError as error:
        raise UserError(f"{file.path}: {error}") from None


def _check_names(file: File, expected: set[str]) -> None:
    for kind, names in (("lacks", expected - file.tensors.keys()), ("has unknown", file.tensors.keys() - expected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = ", ".join(name if name.isprintable() else repr(name) for name in sorted(names)[:3])
            raise UserError(f"{file.path} {kind} tensor {shown}{more}")


def _check_tensor(file: File, name: str, expected: tuple[int, ...], *, ternary: bool) -> None:
    info = file.tensors[name]
    if info.shape != expected:
        raise UserError(f"{file.path}: {name} has shape {list(info.shape)}: must be {list(expected)}, as the metadata say")
    if info.kind.ternary and not ternary:
        raise UserError(f"{file.path}: {name} has type {info.kind.name}: must be of floats")


def _has_groups(file: File, names: list[str]) -> bool:
    """Whether a matrix has more than one scale. Blocks of zeros may have the scale 0, and say nothing."""
    for name in names:
        info = file.tensors[name]
        if info.kind is not BlockType.I2_S:
            found = scales(info.kind, file.raw(name), info.shape[0])
            found = found[found != 0]
            file.release()
            if found.size and (found != found[0]).any():
                return True
    return False


def _leaf(file: File, name: str, path: Path, config: ModelConfig, architecture: str) -> Leaf:
    info, raw, heads = file.tensors[name], file.raw(name), permuted_heads(path, config, architecture)
    order = slice(None) if heads is None else as_halves(info.shape[0], heads)
    factor = name.removesuffix("weight") + "scale"
    times = decode_floats(file.tensors[factor].kind, file.raw(factor), (1,))[0].astype(np.float32) if factor in file.tensors else None
    if info.kind.ternary:
        return _packed_leaf(info, raw, order, times, config.quant.weight_group, name)
    values = decode_floats(info.kind, raw, info.shape)[order]
    if times is not None:
        values = values.astype(np.float32) * times
    return values.T if path[-1] == "kernel" else values


def _packed_leaf(info: Info, raw: np.ndarray, order: Any, times: Any, group: int | None, name: str) -> PackedTernary:
    rows, k = info.shape
    codes, found = decode_ternary(info.kind, raw, rows, name)
    if found.ndim and group is None:
        used = found[found != 0]
        scale = _only_zeros_unscaled(codes, found, np.float32(used[0] if used.size else 1)).max()
    elif found.ndim:
        scale = np.ascontiguousarray(_only_zeros_unscaled(codes, found, np.float32(found.max() or 1))[order].T)
    else:
        scale = found if group is None else np.full((k // group, rows), found)
    if times is not None:
        scale = scale * times
    return PackedTernary(codes[order], np.asarray(scale, np.float32), k=k, encoding=Encoding.TWO_BIT)


def _only_zeros_unscaled(codes: np.ndarray, found: np.ndarray, scale: np.float32) -> np.ndarray:
    """The scales of blocks as float32, with `scale` for 0 where all weights are 0 as well: llama-quantize writes such blocks."""
    values = found.astype(np.float32)
    missing = values == 0
    if missing.any():
        blocks = codes.reshape(*found.shape, -1)
        if (blocks[missing] != _ZEROS).any():
            return values * 0  # which no check lets pass
        values[missing] = scale
    return values


# --- writing ---------------------------------------------------------------------------------------------------------


def write(path: FilePath, weights: Weights, *, type: str, embedding: str, target: str) -> int:
    """Writes a model for the program `target` and returns the file's size in bytes.

    TQ types keep a scale as float16, rounded to 11 bits, but for the architecture `bitnet`, where it stands beside the matrix as float32.
    Norms are float32. What the three programs compute of it: see the head of this file.

    Args:
        path: the file; it appears whole or not at all.
        weights: the model, latent or packed.
        type: of the linear layers, one of `TYPES`. A BitNet takes a ternary one, a full-precision model any other.
        embedding: of the embedding and the head, one of `EMBEDDINGS`.
        target: the program, one of `TARGETS`.

    Raises:
        UserError: the program or the type cannot express the model, with the reason; a weight is too large for float16.
        RunError: as `files.whole_file`.
    """
    for name, value, allowed in (("type", type, TYPES), ("embedding", embedding, EMBEDDINGS), ("target", target, TARGETS)):
        if value not in allowed:
            raise UserError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    config = weights.config.for_inference
    architecture = architecture_for(config, target)
    linear, table = BlockType[type.upper()], BlockType[embedding.upper()]
    _refuse_type(config, linear, table, target)
    if linear.ternary:
        weights = leafwise.packed(weights, Encoding.TWO_BIT)
    metadata = _metadata(config, architecture, type, linear, table) | gguf_tokenizer.write(weights.assets, config.vocab_size)
    beside: dict[Path, np.ndarray] | None = {} if architecture == "bitnet" and linear.name.startswith("TQ") else None
    tensors: list[Tensor] = []
    for leaf in paths(config):
        kind = linear if is_bitlinear(leaf) else table if leaf[0] in ("embed", "head") else BlockType.F32
        sizes = shape(config, leaf)[::-1] if leaf[-1] == "kernel" else shape(config, leaf)
        name = tensor_name(leaf)
        tensors.append(Tensor(name, kind, sizes, lambda leaf=leaf, kind=kind: _pieces(weights, leaf, kind, architecture, beside)))
        if beside is not None and kind is linear:
            name = name.removesuffix("weight") + "scale"
            tensors.append(Tensor(name, BlockType.F32, (1,), lambda leaf=leaf, beside=beside: [beside.pop(leaf)]))
    return write_container(path, metadata, tensors)


def _refuse_type(config: ModelConfig, linear: BlockType, table: BlockType, target: str) -> None:
    """Raises UserError where `target` cannot read a type, or the type cannot hold the model."""
    quant, name = config.quant, linear.name.lower()
    if is_ternary(config) is not linear.ternary:
        allowed = [kind for kind in TYPES if BlockType[kind.upper()].ternary is not linear.ternary]
        what = "a ternary model, whose activations float types would leave alone" if is_ternary(config) else "no ternary model"
        raise UserError(f"type={name}: this is {what}: must be one of {', '.join(allowed)}")
    if config.linear is Linear.BIT and not is_ternary(config):
        raise UserError(f"linear=bit with weight quantiser {quant.weight.value}: no program quantises activations alone")
    if (linear, target) in ((BlockType.I2_S, "llama.cpp"), (BlockType.TQ1_0, "ik_llama.cpp"), (BlockType.TQ2_0, "ik_llama.cpp")):
        raise UserError(f"type={name} is not known to {target}")
    if linear.ternary and quant.activation is not ActivationQuantizer.NONE and quant.activation_bits != 8:
        raise UserError(f"activation_bits={quant.activation_bits} must be 8: no program quantises activations to other bits")
    if linear.ternary and quant.weight_group is not None and (linear is BlockType.I2_S or quant.weight_group % _TQ_GROUP):
        raise UserError(f"weight_group={quant.weight_group} with type={name}: I2_S has one scale for a matrix, TQ types one for each 256")
    attention = config.num_heads * config.head_dim
    shards = quant.weight_shards
    cut = [size // shards for size in (attention, config.ffn_size)]  # inputs of o and down that share a scale
    if linear.ternary and shards > 1 and (linear is BlockType.I2_S or any(size % _TQ_GROUP for size in cut)):
        raise UserError(f"weight_shards={shards} with type={name}: I2_S has one scale for a matrix, TQ types one for each 256")
    for key, size in (("hidden_size", config.hidden_size), ("ffn_size", config.ffn_size), ("num_heads * head_dim", attention)):
        if size % linear.weights:
            raise UserError(f"{key}={size} must be a multiple of {linear.weights} for type={name}")
    if config.hidden_size % table.weights:
        raise UserError(f"hidden_size={config.hidden_size} must be a multiple of {table.weights} for embedding={table.name.lower()}")
    rows = config.num_kv_heads * config.head_dim
    if linear is BlockType.I2_S and rows % 4:
        raise UserError(f"num_kv_heads * head_dim={rows} must be a multiple of 4 for type=i2_s: bitnet.cpp multiplies four rows at a time")


def _metadata(config: ModelConfig, architecture: str, type: str, linear: BlockType, table: BlockType) -> dict[str, Any]:
    facts = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.ffn_size,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }
    found: dict[str, Any] = {"general.architecture": architecture, "general.type": "model", "general.file_type": _FILE_TYPES[type]}
    if BlockType.Q8_0 in (linear, table) or linear.ternary:
        found["general.quantization_version"] = 2
    found |= {f"{architecture}.{name}": value for name, value in facts.items()}
    found["bitnet_jax.dtype"] = config.dtype.value
    if linear.ternary:
        found["bitnet_jax.activation"] = config.quant.activation.value
    return found


def _pieces(
    weights: Weights, path: Path, kind: BlockType, architecture: str, beside: dict[Path, np.ndarray] | None
) -> Iterator[np.ndarray]:
    """The bytes of a tensor; the one scale of a TQ matrix goes to `beside` where that is given, and 1 where it has several."""
    name, config = "/".join(path), weights.config
    leaf = checked(weights.read(path), path, config, weights.where)
    heads = permuted_heads(path, config, architecture)
    if not isinstance(leaf, PackedTernary):
        rows = leaf.T if path[-1] == "kernel" else np.atleast_2d(leaf)
        order = np.arange(len(rows)) if heads is None else as_pairs(len(rows), heads)
        for chunk in _chunks(rows.shape):
            yield encode_floats(kind, np.asarray(rows[order[chunk]]), name)
        return
    order = slice(None) if heads is None else as_pairs(leaf.n, heads)
    codes, scale = np.asarray(leaf.codes)[order], np.asarray(leaf.scale)
    if kind is BlockType.I2_S:
        yield np.ascontiguousarray(codes)
        yield i2_s_tail(scale)
        return
    if scale.ndim == 0:
        scale = np.full((leaf.k // _TQ_GROUP, leaf.n), scale)
        if beside is not None:
            beside[path], scale = scale[0, :1].astype("<f4"), np.ones_like(scale)
    else:
        scale = np.repeat(scale, (leaf.group or 0) // _TQ_GROUP, 0)[:, order]
        if beside is not None:
            beside[path] = np.ones(1, "<f4")
    yield from _tq_pieces(kind, codes, scale.T, name)


def _tq_pieces(kind: BlockType, codes: np.ndarray, scale: np.ndarray, name: str) -> Iterator[np.ndarray]:
    with np.errstate(over="ignore"):
        d = scale.astype("<f2")
    if not (np.isfinite(d) & (d > 0)).all():
        raise UserError(f"{name} has scale {scale[~(np.isfinite(d) & (d > 0))][0]:.6g}: must be from 6e-8 to 65504 for {kind.name.lower()}")
    for chunk in _chunks((len(codes), codes.shape[1] * 4)):
        yield encode_ternary(kind, codes[chunk], d[chunk])


def _chunks(sizes: tuple[int, ...]) -> Iterable[slice]:
    step = max(1, CHUNK // sizes[1])
    return [slice(start, start + step) for start in range(0, sizes[0], step)]
