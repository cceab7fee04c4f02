"""config.json is taken at its word, and what it cannot say truthfully is refused."""

from dataclasses import replace
from typing import Any

import pytest

from bitnet_jax.config import (
    ActivationQuantizer,
    DType,
    FeedForward,
    Linear,
    ModelConfig,
    NormKind,
    NormPlacement,
    QuantConfig,
    WeightQuantizer,
)
from bitnet_jax.errors import UserError
from bitnet_jax.formats.huggingface.configuration import Layout, compose, parse, plan
from tests.shapes import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
BITNET = {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", **SIZES}
ONEBITLLM = {"architectures": ["BitnetForCausalLM"], "model_type": "llama", "weight_bits": 1, "input_bits": 8, **SIZES}
QUANTIZATION = {"quant_method": "bitnet"}


def test_what_is_absent_has_the_default_of_its_class() -> None:
    config, layout = parse(BITNET, None, "config.json")
    assert (config.norm, config.ffn, config.linear) == (NormPlacement.SUB, FeedForward.RELU2, Linear.FULL)
    assert (config.rope_theta, config.norm_eps, config.tie_embeddings, config.max_seq_len) == (5e5, 1e-5, False, 2048)
    assert not layout.packed
    config, layout = parse(LLAMA | {"quantization_config": QUANTIZATION}, None, "config.json")
    assert (config.norm, config.ffn, config.linear) == (NormPlacement.NONE, FeedForward.SWIGLU, Linear.BIT)
    assert (config.rope_theta, config.norm_eps, config.dtype, config.head_dim) == (1e4, 1e-6, DType.FLOAT32, 8)
    assert (layout.packed, layout.divides) == (True, True)
    config, layout = parse(ONEBITLLM | {"torch_dtype": "float16"}, None, "config.json")
    assert (config.norm, config.ffn, config.linear, config.dtype) == (
        NormPlacement.SUB,
        FeedForward.SWIGLU,
        Linear.BIT,
        DType.FLOAT32,
    )
    assert parse(LLAMA | {"num_key_value_heads": None}, None, "config.json")[0].num_kv_heads == 6
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 7, "rope_scaling": {"type": "default"}}
    assert parse(LLAMA | theta, None, "config.json")[0].rope_theta == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (LLAMA | {"architectures": ["Qwen2ForCausalLM"]}, "architectures=['Qwen2ForCausalLM'] is not supported"),
        (LLAMA | {"architectures": []}, "architectures=[] is not supported"),
        (LLAMA | {"architectures": [{}]}, "is not supported"),
        (SIZES | {"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
        (LLAMA | {"model_type": "bitnet"}, "model_type='bitnet' must be 'llama' for LlamaForCausalLM"),
        (LLAMA | {"attention_bias": True}, "attention_bias=True changes the model"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias=True changes the model"),
        (LLAMA | {"sliding_window": 4096}, "sliding_window=4096 changes the model"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 changes the model"),
        (LLAMA | {"layer_types": ["sliding_attention"] * 2}, "layer_types="),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type='llama3' is not supported"),
        (LLAMA | {"rope_scaling": {"type": "default", "factor": 8.0}}, "rope_scaling.factor=8.0 is not supported"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn' is not supported"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        (LLAMA | {"rope_parameters": [1]}, "rope_parameters=[1] must be an object"),
        (LLAMA | {"rope_parameters": {"rope_theta": 2.0}, "rope_theta": 3.0}, "must be the same"),
        (LLAMA | {"rope_theta": -1}, "rope_theta=-1 must be a positive number"),
        (LLAMA | {"rope_theta": "x"}, "rope_theta='x' must be a positive number"),
        (LLAMA | {"rms_norm_eps": 2}, "norm_eps=2.0 must lie between 0 and 1"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu' must be one of silu, relu2"),
        (LLAMA | {"torch_dtype": "float8"}, "torch_dtype='float8' must be one of"),
        (LLAMA | {"torch_dtype": "float16", "dtype": "bfloat16"}, "must be the same"),
        (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        (LLAMA | {"vocab_size": 0}, "vocab_size=0 must be an integer from 1"),
        (LLAMA | {"vocab_size": -5}, "vocab_size=-5 must be an integer from 1"),
        (LLAMA | {"vocab_size": 61.0}, "vocab_size=61.0 must be an integer"),
        (LLAMA | {"vocab_size": True}, "vocab_size=True must be an integer"),
        (LLAMA | {"vocab_size": 10**9}, "vocab_size=1000000000 must be an integer from 1 to 16777216"),
        (LLAMA | {"num_attention_heads": 2**20, "head_dim": 2**20}, "num_attention_heads * head_dim = 1099511627776"),
        (LLAMA | {"num_attention_heads": 7}, "hidden_size=48 must be a multiple of num_attention_heads=7"),
        (LLAMA | {"num_key_value_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
        (LLAMA | {"head_dim": 7}, "head_dim=7 must be even"),
        ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "hidden_size is missing"),
        ({key: value for key, value in BITNET.items() if key != "num_key_value_heads"}, "num_key_value_heads is missing"),
        (BITNET | {"head_dim": 16}, "num_attention_heads * head_dim = 96 must be hidden_size=48 for BitNetForCausalLM"),
        (ONEBITLLM | {"weight_bits": 2}, "weight_bits=2 must be 1 for BitnetForCausalLM"),
        (ONEBITLLM | {"input_bits": None}, "input_bits=None must be 8"),
        (ONEBITLLM | {"quantization_config": QUANTIZATION}, "quantization_config must be absent for BitnetForCausalLM"),
        (LLAMA | {"quantization_config": []}, "quantization_config must be an object"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq' must be 'bitnet'"),
        (LLAMA | {"quantization_config": QUANTIZATION | {"use_rms_norm": True}}, "use_rms_norm=True is not supported"),
        (LLAMA | {"quantization_config": QUANTIZATION | {"linear_class": "x"}}, "linear_class='x' must be one of"),
        (LLAMA | {"quantization_config": QUANTIZATION | {"quantization_mode": "online"}}, "must be 'offline' for linear_class"),
        (LLAMA | {"quantization_config": QUANTIZATION | {"modules_to_not_convert": ["q_proj", "lm_head"]}}, "must name none but"),
        (LLAMA | {"quantization_config": QUANTIZATION | {"modules_to_not_convert": []}}, "must name 'lm_head'"),
    ],
)
def test_what_would_be_computed_differently_is_refused_with_key_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(fields, None, "config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


def test_a_trilm_must_be_a_plain_llama() -> None:
    assert parse(LLAMA, "trilm", "config.json")[1] == Layout(architecture="LlamaForCausalLM", trilm=True)
    for fields in (BITNET, LLAMA | {"quantization_config": QUANTIZATION}):
        with pytest.raises(UserError, match="variant='trilm' must be a LlamaForCausalLM without quantization_config"):
            parse(fields, "trilm", "config.json")
    with pytest.raises(UserError, match="variant='x' is unknown"):
        parse(LLAMA, "x", "config.json")


LIKE = tiny()
NO_ACTIVATION = QuantConfig(activation=ActivationQuantizer.NONE)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (LIKE, "packed"),
        (LIKE, "master"),
        (replace(LIKE, norm=NormPlacement.NONE, ffn=FeedForward.RELU2, tie_embeddings=False, rope_theta=123.5), "packed"),
        (replace(LIKE, norm=NormPlacement.NONE, head_dim=20, num_kv_heads=1), "master"),
        (replace(LIKE, linear=Linear.FULL, norm_eps=1e-7, max_seq_len=77), "master"),
        (replace(LIKE, linear=Linear.FULL, norm=NormPlacement.NONE), "master"),
    ],
)
def test_what_is_written_is_read_again(config: ModelConfig, layout: str) -> None:
    form = plan(config, layout, packed=False)
    fields = compose(config, form, config.dtype, bos=None, eos=None)
    assert parse(fields, None, "config.json") == (config, form)


@pytest.mark.parametrize(
    ("config", "layout", "packed", "message"),
    [
        (replace(LIKE, norm=NormPlacement.INSIDE), "packed", False, "norm=inside"),
        (replace(LIKE, norm_kind=NormKind.LAYER), "packed", False, "norm_kind=layer"),
        (replace(LIKE, ffn=FeedForward.GELU), "master", False, "ffn=gelu"),
        (replace(LIKE, head_dim=10), "packed", False, "num_heads * head_dim = 40: must be hidden_size=32"),
        (replace(LIKE, norm=NormPlacement.NONE, num_heads=6), "packed", False, "hidden_size=32: must be a multiple of num_heads=6"),
        (replace(LIKE, linear=Linear.FULL), "packed", False, "linear=full in the packed layout"),
        (replace(LIKE, quant=NO_ACTIVATION), "packed", False, "activation=none in the packed layout"),
        (replace(LIKE, quant=QuantConfig(activation_bits=4)), "packed", False, "activation_bits=4"),
        (replace(LIKE, quant=QuantConfig(weight_group=16)), "packed", False, "weight_group=16"),
        (replace(LIKE, quant=QuantConfig(weight_group=16)), "master", False, "weight_group=16"),
        (replace(LIKE, quant=QuantConfig(weight_shards=2)), "packed", False, "weight_shards=2: it has one scale"),
        (replace(LIKE, quant=QuantConfig(weight_shards=2)), "master", False, "weight_shards=2: it has one scale"),
        (replace(LIKE, quant=QuantConfig(weight=WeightQuantizer.ABSMEDIAN)), "master", False, "absmedian in the master layout"),
        (replace(LIKE, quant=QuantConfig(weight=WeightQuantizer.ZERO_ONE)), "master", False, "zero_one in the master layout"),
        (replace(LIKE, quant=QuantConfig(weight=WeightQuantizer.NONE)), "master", False, "weight quantiser none"),
        (LIKE, "master", True, "packed weights in the master layout"),
        (replace(LIKE, ffn_size=50), "packed", False, "ffn_size=50 in the packed layout"),
        (replace(LIKE, norm=NormPlacement.NONE, num_kv_heads=1, head_dim=6), "packed", False, "num_kv_heads * head_dim=6"),
    ],
)
def test_a_model_that_transformers_would_compute_differently_is_refused(
    config: ModelConfig, layout: str, packed: bool, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        plan(config, layout, packed=packed)
    assert str(caught.value).startswith("transformers cannot express ")
    assert message in str(caught.value)


def test_other_weight_quantisers_fit_the_packed_layout() -> None:
    for weight in (WeightQuantizer.ABSMEDIAN, WeightQuantizer.ABSMAX, WeightQuantizer.SIGN, WeightQuantizer.ZERO_ONE):
        assert plan(replace(LIKE, quant=QuantConfig(weight=weight)), "packed", packed=False).packed
    per_tensor = QuantConfig(activation=ActivationQuantizer.PER_TENSOR)  # per token once trained
    assert plan(replace(LIKE, quant=per_tensor), "packed", packed=True).packed
    with pytest.raises(UserError, match="layout='x' is unknown"):
        plan(LIKE, "x", packed=False)


def test_the_fields_of_the_published_2b4t_are_understood() -> None:
    fields = {
        "architectures": ["BitNetForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig"},
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "relu2",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 4096,
        "model_type": "bitnet",
        "num_attention_heads": 20,
        "num_hidden_layers": 30,
        "num_key_value_heads": 5,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
    }
    config, layout = parse(fields, None, "config.json")
    assert config == replace(ModelConfig.preset("bitnet-b1.58-2b4t"), init_std=None)
    assert layout == Layout(architecture="BitNetForCausalLM", packed=True)
