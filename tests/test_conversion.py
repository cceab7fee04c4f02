"""A model goes through every format and comes back the same, and what is not proved is not kept."""

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax import conversion, models
from bitnet_jax.config import DType, FeedForward, Linear, ModelConfig, NormPlacement
from bitnet_jax.conversion import Format, Options, Program, convert
from bitnet_jax.data import byte_tokenizer
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.random_model import random_packed
from bitnet_jax.formats.weights import Assets, Weights
from kernels_pallas import Encoding, PackedTernary
from tests.shapes import tiny

CONFIG = tiny(
    vocab_size=257, hidden_size=256, ffn_size=512, num_heads=4, num_kv_heads=2, head_dim=64, ffn=FeedForward.RELU2, dtype=DType.BFLOAT16
)
ASSETS = Assets(tokenizer=byte_tokenizer().to_json(), chat_template="{{ messages[0].content }}", prefix=(256,), stop_tokens=(256,))

EXACT = {
    "packed": (Format.PACKED, Options()),
    "base3.safetensors": (Format.PACKED, Options(encoding=Encoding.BASE3)),
    "hf": (Format.HF_PACKED, Options()),
    "i2_s.gguf": (Format.GGUF, Options()),
    "tq2_0.gguf": (Format.GGUF, Options(type="tq2_0", program=Program.BITNET_CPP)),
    "tq1_0.gguf": (Format.GGUF, Options(type="tq1_0", program=Program.BITNET_CPP)),
    "orbax": (Format.ORBAX, Options()),
    "stablehlo": (Format.STABLEHLO, Options(platforms=("cpu",), capacity=64)),
}
"""Every way to write a packed model that holds the numbers of `random_packed` exactly."""


def same(mine: Weights, theirs: Weights) -> None:
    """Every code and number of two packed models is equal."""
    mine, theirs = (leafwise.packed(one, Encoding.TWO_BIT) for one in (mine, theirs))
    assert leafwise.paths(mine.config) == leafwise.paths(theirs.config)
    for path in leafwise.paths(mine.config):
        a, b = mine.read(path), theirs.read(path)
        if isinstance(a, PackedTernary):
            assert isinstance(b, PackedTernary)
            assert np.array_equal(a.codes, b.codes), path
            a, b = a.scale, b.scale
            b = b.reshape(-1)[0] if b.ndim and (b == b.reshape(-1)[0]).all() else b
        assert np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), path
        mine.release()
        theirs.release()


def round_trip(config: ModelConfig, folder: Path) -> None:
    """A random model is written in one format after the other, each from the one before, and ends as it began."""
    first = random_packed(config, ASSETS if config.vocab_size == 257 else None)
    source = first
    for name, (to, options) in EXACT.items():
        place = folder / (name if "." in name or to is not Format.PACKED else f"{name}.safetensors")
        converted = convert(source, place, to, options)
        assert converted.proof.floats_differ == 0, name
        assert converted.proof.tokens_differ == 0, name
        earlier, (source, _) = source, models.open_weights(place)
        same(earlier, source)
    same(first, source)


@pytest.mark.slow
def test_a_model_goes_through_every_format_and_comes_back(tmp_path: Path) -> None:
    round_trip(CONFIG, tmp_path)
    text = "To be, or not to be: ½ ﬁn\n\n"
    assert models.load(tmp_path / "stablehlo").need_tokenizer().encode(text).tolist() == byte_tokenizer().encode(text).tolist()
    last = models.open_weights(tmp_path / "stablehlo")[0].assets
    assert (last.prefix, last.stop_tokens, last.chat_template) == (ASSETS.prefix, ASSETS.stop_tokens, ASSETS.chat_template)


@pytest.mark.huge
def test_a_model_of_the_shape_of_2b4t_goes_through_every_format_and_comes_back(tmp_path: Path) -> None:
    round_trip(ModelConfig.preset("bitnet-b1.58-2b4t"), tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert peak < 4


def test_what_is_not_proved_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"before")

    def disproved(*args: object, **options: object) -> None:
        raise RunError("is not the model it was made from")

    monkeypatch.setattr(conversion, "prove", disproved)
    for to, name in ((Format.PACKED, "a.safetensors"), (Format.ORBAX, "b")):
        with pytest.raises(RunError, match="is not the model"):
            convert(random_packed(CONFIG), tmp_path / name, to)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("config", "to", "options", "message"),
    [
        (CONFIG, Format.LATENT, Options(), "is packed: its latent weights are gone"),
        (replace(CONFIG, linear=Linear.FULL), Format.PACKED, Options(), "has no ternary weights to pack"),
        (replace(CONFIG, norm=NormPlacement.INSIDE), Format.HF_PACKED, Options(), "inside"),
        (replace(CONFIG, norm=NormPlacement.INSIDE), Format.GGUF, Options(), "inside"),
        (CONFIG, Format.GGUF, Options(type="tq2_0"), "llama.cpp"),
        (CONFIG, Format.GGUF, Options(type="q9"), "q9"),
        (CONFIG, Format.GGUF, Options(embedding="q9"), "q9"),
        (CONFIG, Format.STABLEHLO, Options(platforms=("abacus",)), "abacus"),
        (CONFIG, Format.STABLEHLO, Options(capacity=1000), "1000"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, config: ModelConfig, to: Format, options: Options, message: str
) -> None:
    suffix = {Format.PACKED: ".safetensors", Format.LATENT: ".safetensors", Format.GGUF: ".gguf"}.get(to, "")
    with pytest.raises(UserError, match=message) as caught:
        convert(random_packed(config), tmp_path / f"out{suffix}", to, options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
