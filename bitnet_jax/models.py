"""A model as people use it: configuration, parameters and tokenizer, from any format that this project reads."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from bitnet_jax import config as configs
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import Arithmetic, ModelConfig, TrainConfig
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats import model_file, orbax_folder
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets, Weights
from bitnet_jax.params import Params, leaves
from bitnet_jax.training import checkpoints, run_directory
from bitnet_jax.transformer import parameter_shapes
from kernels_pallas import Encoding, PackedTernary, mosaic_tpu


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that was loaded.

    Attributes:
        config: shape and arithmetic.
        params: latent or packed parameters.
        tokenizer: None where the source has none.
        provenance: where it comes from, as plain JSON values.
        kind: "run", "model file", "Hugging Face folder", "GGUF file", "StableHLO folder" or "orbax folder".
        chat_template: Jinja source that makes one text of a conversation; None where the source has none.
        prefix: ids that stand before every text, as when the model was trained.
        stop_tokens: ids that end a text or a turn; empty where only the tokenizer's end of text does.
        sampling: what its authors sample with, as `weights.Assets`.
        release: gives back the memory that looking at a mapped file has taken; the parameters come back when they are used.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    provenance: dict[str, Any]
    kind: str
    chat_template: str | None = None
    prefix: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    sampling: dict[str, float] = field(default_factory=dict)
    release: Callable[[], None] = lambda: None

    @property
    def packed(self) -> bool:
        """Whether the linear layers are packed."""
        return any(_is_packed(leaf) for _, leaf in leaves(self.params))

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UserError where there is none."""
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer: text cannot become tokens")
        return self.tokenizer

    def weights(self, params: Params | None = None) -> Weights:
        """The model as the writers of `formats` take it, with other parameters, such as packed ones, if they are given."""
        assets = Assets(
            tokenizer=self.tokenizer.to_json() if self.tokenizer else None,
            chat_template=self.chat_template,
            prefix=self.prefix,
            stop_tokens=self.stop_tokens,
            sampling=self.sampling,
        )
        params = self.params if params is None else params
        return leafwise.from_params(params, self.config, assets=assets, provenance=self.provenance, where="the model")


_warn = logging.getLogger("bitnet_jax").warning


def load(
    path: str | Path,
    warn: Callable[[str], None] = _warn,
    *,
    pack: bool = False,
    variant: str | None = None,
    revision: str | None = None,
) -> Model:
    """The model at `path`, in any format that `open_weights` knows; arguments and errors are those of `open_weights`, but for `pack`:
    with it, ternary kernels are packed while they are read, where that changes no number. It is for text, which is then made sooner."""
    weights, kind = open_weights(path, warn, variant=variant, revision=revision)
    if pack and weights.encoding is None and is_ternary(weights.config) and weights.config.quant.arithmetic is not Arithmetic.FAKE:
        weights = leafwise.packed(weights, Encoding.TWO_BIT)
    assets = weights.assets
    return Model(
        config=weights.config,
        # What a file is mapped to is used where it lies, without a copy, by a device that shares the host's memory.
        params=_laid_out(jax.device_put(leafwise.load(weights))),
        tokenizer=Tokenizer.from_json(assets.tokenizer, f"{weights.where}: tokenizer") if assets.tokenizer else None,
        provenance=weights.provenance,
        kind=kind,
        chat_template=assets.chat_template,
        prefix=assets.prefix,
        stop_tokens=assets.stop_tokens,
        sampling=assets.sampling,
        release=weights.release,
    )


def _laid_out(params: Params) -> Params:
    """Packed codes as the kernel of the default device reads them: a TPU's wants outputs innermost, or lays them out anew in every call."""
    if jax.default_backend() != "tpu":
        return params
    return jax.tree.map(lambda leaf: mosaic_tpu.place(leaf) if _is_packed(leaf) else leaf, params, is_leaf=_is_packed)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedTernary)


def open_weights(
    path: str | Path, warn: Callable[[str], None] = _warn, *, variant: str | None = None, revision: str | None = None
) -> tuple[Weights, str]:
    """The model at `path`, leaf by leaf, and what kind of thing is there.

    A run's folder (its newest whole checkpoint); a model file (.safetensors); a GGUF file (.gguf); a folder as Hugging Face,
    `formats.stablehlo` or `formats.orbax_folder` write it; or, where nothing has that path, the name `owner/model` of a model on the
    Hugging Face hub, which is downloaded.

    Args:
        path: folder, file or name.
        warn: called with one line for each damaged checkpoint that was passed over, and with the revision of what was downloaded.
        variant: "trilm" for a Hugging Face folder whose config.json is a plain Llama's but whose weights are TriLM's.
        revision: branch, tag or commit of a model on the hub.

    Raises:
        UserError: there is nothing at `path`, or nothing that this project reads, or it is damaged.
    """
    from bitnet_jax.formats import hub

    name, place = str(path), Path(path)
    if not place.exists() and hub.is_name(name):
        place, commit = hub.download(name, revision)
        warn(f"{name} is at revision {commit}")
    elif revision is not None:
        raise UserError(f"revision={revision} is for a model on the hub: {name} is none")
    weights, kind = _open(place, warn, variant)
    if variant is not None and kind != "Hugging Face folder":
        raise UserError(f"variant={variant} is for a Hugging Face folder: {place} is a {kind}")
    return weights, kind


def _open(path: Path, warn: Callable[[str], None], variant: str | None) -> tuple[Weights, str]:
    from bitnet_jax.formats import gguf, huggingface, stablehlo

    if path.is_dir():
        if stablehlo.is_artefact(path):
            return stablehlo.read(path), "StableHLO folder"
        if orbax_folder.is_model(path):
            return orbax_folder.read(path), "orbax folder"
        if huggingface.is_checkpoint(path):
            return huggingface.read(path, variant=variant), "Hugging Face folder"
        return _open_run(path, warn), "run"
    if not path.exists():
        raise UserError(f"{path} does not exist: must be a run's folder, a model file (.safetensors, .gguf), a folder of Hugging Face's")
    if path.suffix == ".gguf":
        return gguf.read(path), "GGUF file"
    return model_file.read(path), "model file"


def _open_run(directory: Path, warn: Callable[[str], None]) -> Weights:
    if not run_directory.is_run(directory):
        raise UserError(f"{directory} is no run: it has no {run_directory.CONFIG}")
    config = configs.read(TrainConfig, directory / run_directory.CONFIG).model
    params, step = checkpoints.read_params(directory / run_directory.CHECKPOINTS, parameter_shapes(config), warn)
    text = directory / "tokenizer.json"
    assets = Assets(tokenizer=Tokenizer.read(text).to_json() if text.exists() else None)
    provenance = {"run": str(directory), "step": step, **load_provenance(directory)}
    return leafwise.from_params(params, config, assets=assets, provenance=provenance, where=str(directory))


def load_provenance(directory: Path) -> dict[str, Any]:
    """The record of a run's starts; empty where there is none. Raises UserError where it is no JSON object."""
    path = directory / run_directory.PROVENANCE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must be an object")
    return found
