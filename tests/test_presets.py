"""Presets against the numbers of their papers, and against the model that they build (by shapes alone, nothing is allocated)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax import config as configuration
from bitnet_jax.config import FeedForward, Layers, Linear, ModelConfig, NormPlacement, Schedule
from bitnet_jax.costs import parameters
from bitnet_jax.errors import UserError
from bitnet_jax.presets import PRESETS, presets, recipe, twin_recipe
from bitnet_jax.transformer import Transformer


def shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path and shape of every parameter of the model."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    tree = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    return {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def count(tree: dict[tuple[str, ...], tuple[int, ...]], *names: str) -> int:
    """Parameters below any path that has one of `names` in it; all of them where no name is given."""
    return sum(math.prod(shape) for path, shape in tree.items() if not names or set(names) & set(path))


@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_are_those_of_the_model(name: str) -> None:
    config = PRESETS[name]
    tree, expected = shapes(config), parameters(config)
    assert count(tree) == expected.total
    assert count(tree, "embed") == expected.embedding
    assert count(tree, "head") == expected.head
    assert count(tree, "scale") == expected.norms
    assert count(tree, "q", "k", "v", "o") == expected.attention
    assert count(tree, "gate", "up", "down") == expected.ffn


@pytest.mark.parametrize("layers", Layers)
@pytest.mark.parametrize("norm", NormPlacement)
@pytest.mark.parametrize("ffn", FeedForward)
def test_counted_parameters_are_those_of_the_model_in_every_structure(layers: Layers, norm: NormPlacement, ffn: FeedForward) -> None:
    config = dataclasses.replace(PRESETS["ladder-0.2m"], layers=layers, norm=norm, ffn=ffn, num_kv_heads=1, tie_embeddings=False)
    assert count(shapes(config)) == parameters(config).total


def test_linear_parameters_of_b158_are_those_of_the_faq_shapes() -> None:
    expected = {"700m": 679_477_248, "1.3b": 1_207_762_944, "3b": 3_221_504_000, "3.9b": 4_259_840_000}
    embeddings = {"700m": 49.2e6, "1.3b": 65.5e6, "3b": 102.4e6, "3.9b": 102.4e6}
    for size, linear in expected.items():
        config = PRESETS[f"bitnet-b1.58-{size}"]
        tree = shapes(config)
        assert count(tree, "attn", "ffn") == linear
        assert round(count(tree, "embed"), -5) == embeddings[size]


def test_2b4t_has_its_published_parameters() -> None:
    tree = shapes(PRESETS["bitnet-b1.58-2b4t"])
    assert count(tree, "kernel") == 2_084_044_800
    assert count(tree, "embed") == 328_335_360
    assert count(tree, "scale") == 440_320
    assert count(tree) == 2_412_820_480
    assert tree["blocks", "attn", "k", "kernel"] == (30, 2560, 640)
    assert tree["blocks", "ffn", "sub_norm", "scale"] == (30, 6912)


@pytest.mark.parametrize(
    ("size", "printed", "step"),
    [
        ("99m", 99.74e6, 0.01e6),
        ("390m", 392.4e6, 0.1e6),
        ("560m", 569.2e6, 0.1e6),
        ("830m", 834.0e6, 0.1e6),
        ("1.1b", 1.149e9, 1e6),
        ("1.5b", 1.515e9, 1e6),
        ("2.4b", 2.461e9, 1e6),
        # Two printed counts are not met by the vocabulary that meets the others: 190.497M and 3.98959B.
        ("190m", 190.0e6, 1e6),
        ("3.9b", 3.989e9, 2e6),
    ],
)
def test_trilm_has_its_printed_parameters(size: str, printed: float, step: float) -> None:
    assert abs(parameters(PRESETS[f"trilm-{size}"]).total - printed) <= step / 2


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith(("ladder-", "dummy-"))])
def test_names_of_shapes_say_their_parameters(name: str) -> None:
    number = name.split("-")[1]
    size = float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]
    assert 0.85 < parameters(PRESETS[name]).total / size < 1.15


def test_counts_written_beside_the_ladder_are_right() -> None:
    exact = {"0.2m": 193_728, "1m": 1_117_312, "3m": 3_151_104, "10m": 10_431_488, "30m": 29_908_480, "100m": 98_360_064}
    assert {size: parameters(PRESETS[f"ladder-{size}"]).total for size in exact} == exact


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_have_a_twin_that_differs_in_one_field(name: str) -> None:
    config = ModelConfig.preset(name)
    assert configuration.from_json(ModelConfig, configuration.to_json(config)) == config
    assert config.linear is Linear.BIT
    assert configuration.differences(config, config.twin) == ["linear: bit → full"]
    assert config.hidden_size == config.num_heads * config.head_dim


def test_every_published_size_is_there() -> None:
    sizes = {
        "ladder": "0.2m 1m 3m 10m 30m 100m",
        "bitnet-b1": "125m 350m 760m 1.3b 2.7b 6.7b 13b 30b",
        "bitnet-b1.58": "700m 1.3b 3b 3.9b 7b 2b4t",
        "trilm": "99m 190m 390m 560m 830m 1.1b 1.5b 2.4b 3.9b",
        "dummy": "125m 350m 700m 1b 1.5b 2.5b 3.8b 7b 13b 30b 70b 100b",
    }
    assert presets() == [f"{family}-{size}" for family, names in sizes.items() for size in names.split()]


def test_recipes_are_the_published_ones() -> None:
    large = recipe("bitnet-b1.58-700m")
    assert (large.schedule, large.learning_rate, large.second_learning_rate) == (Schedule.TWO_STAGE_LINEAR, 1.5e-3, 1e-3)
    assert (large.weight_decay, large.warmup_steps, large.beta1, large.beta2, large.final_learning_rate) == (0.1, 375, 0.9, 0.95, 3e-5)
    assert (recipe("bitnet-b1.58-3b").learning_rate, recipe("bitnet-b1.58-3b").second_learning_rate) == (1.2e-3, 8e-4)
    assert [recipe(f"bitnet-b1-{size}").weight_decay for size in ("6.7b", "13b", "30b")] == [0.01, 0.05, 0.05]
    assert (recipe("bitnet-b1-125m").learning_rate, recipe("bitnet-b1-125m").beta2, recipe("bitnet-b1-125m").clip_norm) == (
        2.4e-3,
        0.98,
        None,
    )
    assert recipe("trilm-1.1b").weight_decay_switch == pytest.approx(2 / 3)
    assert (recipe("trilm-99m").learning_rate, recipe("trilm-99m").second_learning_rate) == (2.4e-3, 1.5e-3)
    twin = twin_recipe("bitnet-b1.58-700m")
    assert (twin.schedule, twin.learning_rate, twin.weight_decay) == (Schedule.LINEAR, 2.5e-4, 0.1)


@pytest.mark.parametrize("look_up", [recipe, twin_recipe])
def test_missing_recipes_and_presets_are_named(look_up) -> None:
    with pytest.raises(UserError, match=r"^preset 'bitnet-b1\.58-2b4t' has no published .*: must be one of .*bitnet-b1\.58-700m"):
        look_up("bitnet-b1.58-2b4t")
    with pytest.raises(UserError, match=r"^preset 'llama' is unknown: must be one of ladder-0\.2m, "):
        look_up("llama")
