"""The readers that are fed with mutated files: valid files to start from, and what a reader may do with any other."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bitnet_jax.errors import UserError
from bitnet_jax.formats import gguf, gguf_container, model_file, safetensors, stablehlo
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets, Weights
from tests.fuzz import mutations

FORMATS = ("gguf", "safetensors", "packed", "manifest")


@dataclass(frozen=True, repr=False)
class Target:
    """A reader.

    Attributes:
        path: the file that is mutated.
        seeds: valid contents of it.
        mutate: (bytes of a seed, random numbers) → bytes.
        read_header: the checks that look at nothing but the header; what most inputs are given to.
        read: everything: header, configuration, and the contents of all tensors.
    """

    path: Path
    seeds: tuple[bytes, ...]
    mutate: Callable[[bytes, Random], bytes]
    read_header: Callable[[Path], object]
    read: Callable[[Path], object]

    def refusal(self, data: bytes, *, whole: bool = True) -> str | None:
        """What the reader says against `data`; None where it takes it. Any error but a UserError of one line passes through."""
        self.path.unlink(missing_ok=True)  # never under a mapping that is still held
        self.path.write_bytes(data)
        try:
            (self.read if whole else self.read_header)(self.path)
        except UserError as error:
            message = str(error)
            if not message.isprintable() or len(message) > 2100:
                raise AssertionError(f"a message must be one short line: {message[:300]!r}") from None
            return message
        return None


def _read_leaves(weights: Weights) -> None:
    for path in leafwise.paths(weights.config):
        weights.read(path)


def _read_tensors(path: Path) -> None:
    file = safetensors.File(path)
    for name in file.tensors:
        file.read(name).tobytes()


def target(name: str, folder: Path) -> Target:
    """The target called `name`, one of `FORMATS`, whose files lie in `folder`."""
    if name == "gguf":
        return _gguf(folder)
    if name == "manifest":
        return _manifest(folder)
    path = folder / "mutated.safetensors"
    if name == "safetensors":
        return Target(path, tuple(_model_files(folder)), mutations.safetensors, safetensors.File, _read_tensors)
    if name == "packed":
        seeds = tuple(_model_files(folder))
        return Target(path, seeds, mutations.packed, model_file.read, lambda path: _read_leaves(model_file.read(path)))
    raise ValueError(f"{name} must be one of {', '.join(FORMATS)}")


def _model(*, text: bool = True, **changes: object) -> Weights:
    """A small model, whose weights are random and the same every time; `text`: with a tokenizer, which is most of a header."""
    import jax
    import numpy as np

    from bitnet_jax.data import byte_tokenizer
    from bitnet_jax.transformer import parameter_shapes
    from tests.shapes import tiny

    fields = {"vocab_size": 257 if text else 16, "hidden_size": 128, "ffn_size": 128, "num_heads": 4, "head_dim": 32, "num_layers": 1}
    config = tiny(**{**fields, **changes})
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape, np.float32), parameter_shapes(config))
    assets = Assets(tokenizer=byte_tokenizer().to_json(), chat_template="{{ messages }}", stop_tokens=(256,), sampling={"top_p": 0.5})
    return leafwise.from_params(params, config, assets=assets if text else None, provenance={"seed": 0})


def _model_files(folder: Path) -> list[bytes]:
    from kernels_pallas import Encoding

    seeds: list[bytes] = []
    for encoding, changes in ((Encoding.TWO_BIT, {}), (Encoding.BASE3, {"tie_embeddings": False}), (None, {"num_layers": 2})):
        small = {"hidden_size": 32, "ffn_size": 48, "head_dim": 8, "num_layers": 2, **changes}
        weights = _model(text=not seeds, **small)
        seed = folder / "seed.safetensors"
        model_file.write(seed, weights if encoding is None else leafwise.packed(weights, encoding))
        seeds.append(seed.read_bytes())
        seed.unlink()
    return seeds


def _gguf(folder: Path) -> Target:
    from bitnet_jax.config import FeedForward, Linear, NormPlacement

    llama = {"norm": NormPlacement.NONE}
    wide, narrow = {"hidden_size": 256, "ffn_size": 256, "head_dim": 64}, {"hidden_size": 32, "ffn_size": 48, "head_dim": 8}
    seeds: list[bytes] = []
    for options, changes in (
        (("i2_s", "f16", "bitnet.cpp"), {"ffn": FeedForward.RELU2}),
        (("tq2_0", "q8_0", "llama.cpp"), {**llama, **wide}),
        (("f32", "bf16", "llama.cpp"), {**llama, "linear": Linear.FULL, "tie_embeddings": False, **narrow}),
    ):
        kind, embedding, program = options
        seed = folder / "seed.gguf"
        gguf.write(seed, _model(text=not seeds, **changes), type=kind, embedding=embedding, target=program)
        seeds.append(seed.read_bytes())
        seed.unlink()
    path = folder / "mutated.gguf"
    return Target(path, tuple(seeds), mutations.gguf, gguf_container.File, lambda path: _read_leaves(gguf.read(path)))


def _manifest(folder: Path) -> Target:
    directory = folder / "artefact"
    if directory.exists():
        shutil.rmtree(directory)
    stablehlo.write(directory, _model(hidden_size=32, ffn_size=48, head_dim=8), platforms=["cpu"], chunk=4, capacity=8)
    path = directory / stablehlo.MANIFEST
    seed = json.dumps(json.loads(path.read_text("utf-8"))).encode()

    def read(path: Path) -> None:
        _read_leaves(stablehlo.read(path.parent))

    return Target(path, (seed,), mutations.manifest, lambda path: stablehlo.read(path.parent), read)
