"""From any format that this project reads to any that it writes: leaf by leaf, proved, and kept only then."""

import enum
import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path

from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import ActivationQuantizer, DType
from bitnet_jax.errors import UserError
from bitnet_jax.formats import model_file, orbax_folder
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.files import file_size
from bitnet_jax.formats.proof import Progress, Proof, no_progress, prove
from bitnet_jax.formats.weights import Weights
from bitnet_jax.models import open_weights
from kernels_pallas import Encoding


class Format(enum.Enum):
    """What a model can be written as."""

    PACKED = "packed"  # this project's file, 2 or 1.6 bits a weight
    LATENT = "latent"  # this project's file, with latent or full-precision weights
    HF_PACKED = "hf-packed"  # a Hugging Face folder, 2 bits a weight
    HF_MASTER = "hf-master"  # a Hugging Face folder, latent or full-precision weights
    GGUF = "gguf"  # for bitnet.cpp, llama.cpp and ik_llama.cpp
    STABLEHLO = "stablehlo"  # compiled programs beside packed weights
    ORBAX = "orbax"  # a parameter tree for other programs in JAX


class Program(enum.Enum):
    """Programs that GGUF files are written for."""

    BITNET_CPP = "bitnet.cpp"
    LLAMA_CPP = "llama.cpp"
    IK_LLAMA_CPP = "ik_llama.cpp"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What some formats leave to choose.

    Attributes:
        encoding: of packed weights, for `PACKED` and `STABLEHLO`.
        type: of the linear layers' weights in GGUF: i2_s, tq1_0, tq2_0, f16, bf16, f32 or q8_0; None is i2_s for bitnet.cpp, tq2_0 for the
            others, and f16 for full-precision models.
        embedding: type of the embedding in GGUF: f16, bf16, f32 or q8_0.
        program: the program that the GGUF file is for; None is bitnet.cpp for i2_s, and llama.cpp otherwise.
        dtype: of what is not packed, for `PACKED`, `LATENT` and Hugging Face's; None is the one that loses nothing.
        platforms: that the StableHLO programs are for.
        capacity: tokens that the StableHLO programs' cache holds; None is the model's longest sequence, but at most 4096.
    """

    encoding: Encoding = Encoding.TWO_BIT
    type: str | None = None
    embedding: str | None = None
    program: Program | None = None
    dtype: DType | None = None
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    capacity: int | None = None


_OPTIONS = {
    Format.PACKED: {"encoding", "dtype"},
    Format.LATENT: {"dtype"},
    Format.HF_PACKED: {"dtype"},
    Format.HF_MASTER: {"dtype"},
    Format.GGUF: {"type", "embedding", "program"},
    Format.STABLEHLO: {"encoding", "platforms", "capacity"},
    Format.ORBAX: set[str](),
}
"""What each format leaves to choose."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What came of a conversion: size of the result in bytes, and its proof."""

    size: int
    proof: Proof


def convert(
    source: Weights,
    destination: Path,
    to: Format,
    options: Options | None = None,
    *,
    progress: Progress = no_progress,
) -> Converted:
    """Writes `source` in another format, reads the result back, proves it, and only then gives it its name.

    What is at `destination` stays as it is until then, and for good where the proof fails or anything else happens.

    Args:
        source: the model, as `models.open_weights` gives it.
        destination: file or folder.
        to: the format.
        options: what that format leaves to choose.
        progress: called with a stage's name, what is done of it, and of how much.

    Raises:
        UserError: the format cannot hold the model, with the reason; or the destination cannot be written.
        RunError: the result is not the model, or the disk is full.
    """
    options = options or Options()
    destination = destination.absolute()
    _check(source, destination, to, options)
    total, done = len(leafwise.paths(source.config)), 0

    def count(path: leafwise.Path) -> None:
        nonlocal done
        del path
        done = min(done + 1, total)
        progress("writing", done, total)

    draft, old = (destination.with_name(f".{destination.stem}.{os.getpid()}.{kind}{destination.suffix}") for kind in ("draft", "old"))
    try:
        _write(draft, leafwise.frugal(_form(source, to, options), count), to, options)
        # What TriLM's weights are, a Hugging Face folder cannot say by itself.
        weight_only = is_ternary(source.config) and source.config.quant.activation is ActivationQuantizer.NONE
        result, _ = open_weights(draft, variant="trilm" if to is Format.HF_MASTER and weight_only else None)
        proof = prove(source, replace(result, where=str(destination)), rounds=_rounds(to, options, source), progress=progress)
        size = file_size(draft)
        if destination.is_dir():
            os.replace(destination, old)
        os.replace(draft, destination)
    finally:
        for left in (draft, old):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return Converted(size=size, proof=proof)


def _check(source: Weights, destination: Path, to: Format, options: Options) -> None:
    """Raises UserError for what would fail only after hours, or take away what nobody meant to lose."""
    if to is Format.LATENT and source.encoding is not None:
        raise UserError(f"{source.where} is packed: its latent weights are gone")
    for field in fields(Options):
        if field.name not in _OPTIONS[to] and getattr(options, field.name) != field.default:
            raise UserError(f"{field.name} is no choice of {to.value}: it has {', '.join(sorted(_OPTIONS[to])) or 'none'}")
    suffix = {Format.PACKED: ".safetensors", Format.LATENT: ".safetensors", Format.GGUF: ".gguf"}.get(to)
    if suffix is not None and destination.suffix != suffix:
        raise UserError(f"{destination} must end in {suffix}")
    if not destination.parent.is_dir():
        raise UserError(f"{destination} cannot be written: No such folder as {destination.parent}")
    real = destination.resolve()
    if real in (Path.cwd(), *Path.cwd().parents) or real in (given := Path(source.where).resolve(), *given.parents) or not destination.name:
        raise UserError(f"{destination} holds the source or the current folder: must be another path")
    if destination.is_symlink() or (destination.exists() and destination.is_dir() is not (suffix is None)):
        raise UserError(f"{destination} exists and is no {'folder' if suffix is None else 'file'}")
    if destination.is_dir() and any(destination.iterdir()) and not _is_written_here(destination):
        raise UserError(f"{destination} is a folder, but no model's that is written here: it is not replaced")


def _is_written_here(directory: Path) -> bool:
    from bitnet_jax.formats import huggingface, stablehlo

    return stablehlo.is_artefact(directory) or orbax_folder.is_model(directory) or huggingface.is_checkpoint(directory)


def _form(source: Weights, to: Format, options: Options) -> Weights:
    """`source` as the format keeps it: packed, or as it is."""
    if to is Format.PACKED or (to is Format.STABLEHLO and is_ternary(source.config)):
        return leafwise.packed(source, options.encoding)
    if to is Format.HF_PACKED or (to is Format.GGUF and is_ternary(source.config)):
        return leafwise.packed(source, Encoding.TWO_BIT)
    return source


def _write(path: Path, weights: Weights, to: Format, options: Options) -> None:
    from bitnet_jax.formats import gguf, huggingface, stablehlo

    if to in (Format.PACKED, Format.LATENT):
        model_file.write(path, weights, dtype=options.dtype)
    elif to is Format.ORBAX:
        orbax_folder.write(path, weights)
    elif to is Format.STABLEHLO:
        stablehlo.write(path, weights, platforms=options.platforms, capacity=options.capacity)
    elif to is Format.GGUF:
        kind, program = _gguf_choices(options, weights)
        gguf.write(path, weights, type=kind, embedding=options.embedding or "f16", target=program.value)
    else:
        huggingface.write(path, weights, layout="packed" if to is Format.HF_PACKED else "master", dtype=options.dtype)


def _gguf_choices(options: Options, weights: Weights) -> tuple[str, Program]:
    """Type and program, each following from the other where only one is given."""
    program = options.program or (Program.LLAMA_CPP if options.type not in (None, "i2_s") else Program.BITNET_CPP)
    if options.type is not None:
        return options.type, program
    if not is_ternary(weights.config):
        return "f16", options.program or Program.LLAMA_CPP
    return ("i2_s" if program is Program.BITNET_CPP else "tq2_0"), program


def _rounds(to: Format, options: Options, source: Weights) -> bool:
    """Whether the result may hold other floats than the source."""
    if to is Format.GGUF:
        return True  # scales as float16, embeddings as asked; the proof counts what differs
    return options.dtype not in (None, DType.FLOAT32, source.stored)
