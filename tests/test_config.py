"""Configurations: the JSON form is exact and strict, rules name value and rule, twins differ in one field."""

import dataclasses
import json

import pytest

from bitnet_jax import config as configs
from bitnet_jax.config import DataConfig, Linear, ModelConfig, OptimizerConfig, OutputConfig, QuantConfig, TrainConfig, WeightQuantizer
from bitnet_jax.errors import UserError
from tests.shapes import tiny

FULL = TrainConfig(
    model=tiny(quant=QuantConfig(weight=WeightQuantizer.SIGN, weight_group=16), init_std=0.02), data=DataConfig(seq_len=32),
    optimizer=OptimizerConfig(warmup_steps=3, clip_norm=None), output=OutputConfig(wandb_project="x"), steps=10,
)  # fmt: skip


def test_json_round_trip_is_the_identity():
    text = configs.to_json(FULL)
    assert configs.from_json(TrainConfig, text) == FULL
    assert json.loads(text)["model"]["quant"]["weight"] == "sign"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(colour=1), "config has unknown field 'colour'"),
        (lambda c: c["model"].update(widht=1), "config.model has unknown field 'widht'"),
        (lambda c: c["model"].pop("vocab_size"), "config.model lacks field 'vocab_size'"),
        (lambda c: c["model"].update(vocab_size="61"), "config.model.vocab_size='61' must be of type int"),
        (lambda c: c["model"].update(vocab_size=True), "config.model.vocab_size=True must be of type int"),
        (lambda c: c["model"].update(vocab_size=-1), "vocab_size=-1 must be from 1"),
        (lambda c: c["model"].update(norm="outside"), "config.model.norm='outside' must be one of inside, sub, none"),
        (lambda c: c["model"].update(rope_theta=float("nan")), "config.model.rope_theta=nan must be a finite number"),
        (lambda c: c.update(optimizer=[]), "config.optimizer must be an object"),
        (lambda c: c.update(batch_size=6, accumulation=4), "batch_size=6 must be a multiple of accumulation=4"),
        (lambda c: c["model"].update(num_kv_heads=3), "num_heads=4 must be a multiple of num_kv_heads=3"),
        (lambda c: c["model"]["quant"].update(weight_group=20), "hidden_size=32 must be a multiple of weight_group=20"),
        (lambda c: c["model"]["quant"].update(weight_shards=0), "weight_shards=0 must be at least 1"),
        (lambda c: c["model"]["quant"].update(weight_shards=2), "weight_shards=2 and weight_group=16 both say what shares a scale"),
        (
            lambda c: c["model"]["quant"].update(weight_group=None, weight_shards=3),
            "num_heads * head_dim=32 must be a multiple of weight_shards=3",
        ),
        (
            lambda c: c["model"]["quant"].update(weight_group=None, weight_shards=32),
            "num_kv_heads * head_dim=16 must be a multiple of weight_shards=32",
        ),
        (lambda c: c["model"].update(ffn_size=50, quant={"weight_shards": 4}), "ffn_size=50 must be a multiple of weight_shards=4"),
        (lambda c: c["data"].update(seq_len=65), "seq_len=65 must be at most the model's max_seq_len=64"),
        (lambda c: c["optimizer"].update(warmup_steps=10), "warmup_steps=10 must be below steps=10"),
        (lambda c: c["optimizer"].update(quant_warmup_steps=11), "quant_warmup_steps=11 must be at most steps=10"),
        (lambda c: c["optimizer"].update(quant_warmup_steps=-1), "quant_warmup_steps=-1 must not be negative"),
        (lambda c: c["optimizer"].update(ema_decay=1.0), "ema_decay=1.0 must lie between 0 and 1, or be none"),
    ],
)
def test_a_wrong_field_is_named_with_its_rule(edit, message):
    values = configs.to_dict(FULL)
    edit(values)
    with pytest.raises(UserError) as caught:
        configs.from_dict(TrainConfig, values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shards_are_of_the_model_and_none_where_nothing_is_said():
    config = tiny(quant=QuantConfig(weight_shards=2))
    assert configs.from_json(ModelConfig, configs.to_json(config)) == config
    values = configs.to_dict(tiny())
    values["quant"].pop("weight_shards")  # a configuration from before there were any
    assert configs.from_dict(ModelConfig, values) == tiny()
    assert tiny(linear=Linear.FULL, ffn_size=49, quant=QuantConfig(weight_shards=2)).twin.quant.weight_shards == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear": "full"}, "linear='full' must be one of Linear.BIT, Linear.FULL"),
        ({"hidden_size": 32.0}, "hidden_size=32.0 must be of type int"),
        ({"num_layers": True}, "num_layers=True must be of type int"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a number"),
        ({"quant": None}, "quant=None must be of type QuantConfig"),
    ],
)
def test_a_value_of_another_type_does_not_choose_silently(changes, message):
    """`linear="full"` is equal to neither choice, and would train a BitNet under the name of its twin."""
    with pytest.raises(UserError) as caught:
        tiny(**changes)
    assert message in str(caught.value)


def test_a_number_of_steps_has_an_end():
    with pytest.raises(UserError, match="steps=3000000000 must be from 1 to 2147483647"):
        dataclasses.replace(FULL, steps=3_000_000_000)


def test_what_was_trained_per_tensor_is_used_per_token():
    config = tiny(quant=QuantConfig(activation=configs.ActivationQuantizer.PER_TENSOR))
    assert config.for_inference == tiny()
    assert tiny().for_inference == tiny()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_text_that_is_no_configuration_is_an_error(text):
    with pytest.raises(UserError):
        configs.from_json(ModelConfig, text)


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"preset 'gpt-5' is unknown: must be one of .*bitnet-b1.58-2b4t"):
        ModelConfig.preset("gpt-5")


def test_a_twin_differs_in_one_field():
    assert configs.differences(FULL.model, FULL.model.twin) == ["linear: bit → full"]
    assert FULL.model.twin.linear is Linear.FULL


def test_differences_name_nested_fields():
    other = dataclasses.replace(FULL, seed=1, model=tiny(quant=QuantConfig(weight=WeightQuantizer.SIGN), init_std=0.02))
    assert configs.differences(FULL, other) == ["model.quant.weight_group: 16 → None", "seed: 0 → 1"]


def test_every_field_says_what_it_is():
    """The text under a field is its help on the command line."""
    import inspect
    import re

    source = inspect.getsource(configs)
    for kind in (QuantConfig, ModelConfig, DataConfig, OptimizerConfig, OutputConfig, TrainConfig):
        for f in dataclasses.fields(kind):
            assert re.search(rf'^    {f.name}: .*\n    """', source, re.MULTILINE), f"{kind.__name__}.{f.name}"
