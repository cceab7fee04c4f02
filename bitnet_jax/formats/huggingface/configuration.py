"""config.json and `ModelConfig`: what transformers computes for the one, said with the other.

A key that is absent has the default of its class in transformers. A key that changes the computation into one that this project does
not do is an error.
"""

from dataclasses import dataclass
from typing import Any

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

BITNET, LLAMA, ONEBITLLM = "BitNetForCausalLM", "LlamaForCausalLM", "BitnetForCausalLM"
TRILM = "trilm"
MAX_SIZE = 1 << 24
"""Largest size of an axis that is believed: more inputs than a packed matrix can have, more tokens than any vocabulary."""

_MODEL_TYPES = {BITNET: "bitnet", LLAMA: "llama", ONEBITLLM: "llama"}
_ACTIVATIONS = {"silu": FeedForward.SWIGLU, "relu2": FeedForward.RELU2}
_DTYPES = {"float32": DType.FLOAT32, "float16": DType.FLOAT32, "bfloat16": DType.BFLOAT16}  # squared relu overflows float16
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attention_chunk_size": (None,),
    "partial_rotary_factor": (None, 1),
}
"""Values that leave the computation as it is, of keys that else would change it."""
_NOT_CONVERTED = ("lm_head", "lm_head.weight", "embed_tokens", "model.embed_tokens", "norm", "model.norm")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the tensors of a checkpoint are stored.

    Attributes:
        architecture: class in transformers, which decides the names.
        packed: BitLinear weights are uint8 with a `weight_scale` beside them.
        divides: the output is divided by `weight_scale` (`bitlinear`), not multiplied (`autobitlinear`).
        trilm: the matrices hold -s, 0 and s.
    """

    architecture: str
    packed: bool = False
    divides: bool = False
    trilm: bool = False


# --- reading ---------------------------------------------------------------------------------------------------------


def parse(fields: dict[str, Any], variant: str | None, where: str) -> tuple[ModelConfig, Layout]:
    """The model and the layout that the fields of a config.json describe.

    Raises:
        UserError: a field is missing, not of its type, out of bounds, or asks for what this project does not compute.
    """
    if variant not in (None, TRILM):
        raise UserError(f"variant={variant!r} is unknown: must be {TRILM!r}, or none")
    architecture = _architecture(fields, where)
    for key, values in _HARMLESS.items():
        if fields.get(key) not in values:
            raise UserError(f"{where}: {key}={_shown(fields[key])} changes the model into one that is not supported")
    layers = fields.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise UserError(f"{where}: layer_types={_shown(layers)} must all be 'full_attention'")
    layout = _layout(fields, architecture, variant, where)
    bitnet = architecture == BITNET
    sizes: dict[str, Any] = {
        ours: _integer(fields, theirs, where)
        for ours, theirs in (
            ("vocab_size", "vocab_size"),
            ("hidden_size", "hidden_size"),
            ("ffn_size", "intermediate_size"),
            ("num_layers", "num_hidden_layers"),
            ("num_heads", "num_attention_heads"),
        )
    }
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    if "num_key_value_heads" not in fields and bitnet:
        raise UserError(f"{where}: num_key_value_heads is missing")
    kv_heads = _integer(fields, "num_key_value_heads", where) if fields.get("num_key_value_heads") is not None else heads
    if fields.get("head_dim") is not None:
        head_dim = _integer(fields, "head_dim", where)
    elif hidden % heads:
        raise UserError(f"{where}: hidden_size={hidden} must be a multiple of num_attention_heads={heads} where there is no head_dim")
    else:
        head_dim = hidden // heads
    if heads * head_dim > MAX_SIZE:
        raise UserError(f"{where}: num_attention_heads * head_dim = {heads * head_dim} must be at most {MAX_SIZE}")
    if layout.architecture != LLAMA and heads * head_dim != hidden:
        raise UserError(f"{where}: num_attention_heads * head_dim = {heads * head_dim} must be hidden_size={hidden} for {architecture}")
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{where}: tie_word_embeddings={_shown(tied)} must be true or false")
    ternary = layout.packed or layout.trilm or architecture == ONEBITLLM or fields.get("quantization_config") is not None
    try:
        return ModelConfig(
            **sizes,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_seq_len=_integer(fields, "max_position_embeddings", where, default=2048, largest=2**31 - 1),
            rope_theta=_rope_theta(fields, 5e5 if bitnet else 1e4, where),
            linear=Linear.BIT if ternary else Linear.FULL,
            quant=QuantConfig(weight=WeightQuantizer.ABSMAX, activation=ActivationQuantizer.NONE) if layout.trilm else QuantConfig(),
            norm=NormPlacement.NONE if architecture == LLAMA else NormPlacement.SUB,
            norm_eps=_number(fields.get("rms_norm_eps", 1e-5 if bitnet else 1e-6), "rms_norm_eps", where),
            ffn=_ACTIVATIONS[_choice(fields, "hidden_act", _ACTIVATIONS, "relu2" if bitnet else "silu", where)],
            tie_embeddings=tied,
            dtype=_dtype(fields, where),
        ), layout
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _architecture(fields: dict[str, Any], where: str) -> str:
    named, kind = fields.get("architectures"), fields.get("model_type")
    if named is None:
        named = [name for name in (BITNET, LLAMA) if _MODEL_TYPES[name] == kind]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in tuple(_MODEL_TYPES):
        said = f"architectures={_shown(fields['architectures'])}" if "architectures" in fields else f"model_type={_shown(kind)}"
        raise UserError(f"{where}: {said} is not supported: must be one of {', '.join(_MODEL_TYPES)}")
    if kind != _MODEL_TYPES[named[0]]:
        raise UserError(f"{where}: model_type={_shown(kind)} must be {_MODEL_TYPES[named[0]]!r} for {named[0]}")
    return named[0]


def _layout(fields: dict[str, Any], architecture: str, variant: str | None, where: str) -> Layout:
    if architecture == ONEBITLLM:
        for key, value in (("weight_bits", 1), ("input_bits", 8)):
            if fields.get(key) != value:
                raise UserError(f"{where}: {key}={_shown(fields.get(key))} must be {value} for {architecture}")
    quantization = fields.get("quantization_config")
    if variant == TRILM and (architecture != LLAMA or quantization is not None):
        raise UserError(f"{where}: variant={variant!r} must be a {LLAMA} without quantization_config")
    if quantization is None:
        return Layout(architecture=architecture, trilm=variant == TRILM)
    where = f"{where}: quantization_config"
    if architecture == ONEBITLLM:
        raise UserError(f"{where} must be absent for {architecture}")
    if not isinstance(quantization, dict):
        raise UserError(f"{where} must be an object")
    if quantization.get("quant_method") != "bitnet":
        raise UserError(f"{where}: quant_method={_shown(quantization.get('quant_method'))} must be 'bitnet'")
    if quantization.get("use_rms_norm") not in (None, False):
        raise UserError(f"{where}: use_rms_norm={_shown(quantization['use_rms_norm'])} is not supported: must be false")
    divides = _choice(quantization, "linear_class", ("bitlinear", "autobitlinear"), "bitlinear", where) == "bitlinear"
    online = _choice(quantization, "quantization_mode", ("offline", "online"), "offline", where) == "online"
    if divides and online:
        raise UserError(f"{where}: quantization_mode='online' must be 'offline' for linear_class='bitlinear'")
    kept = quantization.get("modules_to_not_convert")
    if kept is not None and (not isinstance(kept, list) or any(name not in _NOT_CONVERTED for name in kept)):
        raise UserError(f"{where}: modules_to_not_convert={_shown(kept)} must name none but the head, the embedding and the last norm")
    if kept is not None and "lm_head" not in kept:  # transformers converts the module, whatever is said of its weight
        raise UserError(f"{where}: modules_to_not_convert={_shown(kept)} must name 'lm_head': a ternary head is not supported")
    return Layout(architecture=architecture, packed=not online, divides=divides)


def _rope_theta(fields: dict[str, Any], default: float, where: str) -> float:
    """Base of the rotary frequencies, from where transformers 4 and 5 put it; any scaling is refused."""
    found = {"rope_theta": fields["rope_theta"]} if fields.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        parameters = fields.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise UserError(f"{where}: {key}={_shown(parameters)} must be an object")
        rules: dict[str, tuple[Any, ...]] = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (None, 1)}
        for name, value in parameters.items():
            if name == "rope_theta":
                found[f"{key}.{name}"] = value
            elif value not in rules.get(name, ()):
                raise UserError(f"{where}: {key}.{name}={_shown(value)} is not supported: only the unscaled rotary embedding is")
    values = {name: _number(value, name, where) for name, value in found.items()}
    if len(set(values.values())) > 1:
        raise UserError(f"{where}: {' and '.join(f'{name}={value}' for name, value in values.items())} must be the same")
    return next(iter(values.values()), default)


def _dtype(fields: dict[str, Any], where: str) -> DType:
    named = {key: fields[key] for key in ("dtype", "torch_dtype") if fields.get(key) is not None}
    for key in named:
        _choice(fields, key, _DTYPES, "", where)
    if len(set(named.values())) > 1:
        raise UserError(f"{where}: {' and '.join(f'{key}={value!r}' for key, value in named.items())} must be the same")
    return _DTYPES[next(iter(named.values()), "float32")]


def _integer(fields: dict[str, Any], key: str, where: str, *, default: int | None = None, largest: int = MAX_SIZE) -> int:
    value = fields.get(key, default)
    if value is None:
        raise UserError(f"{where}: {key} is missing")
    if type(value) is not int or not 1 <= value <= largest:
        raise UserError(f"{where}: {key}={_shown(value)} must be an integer from 1 to {largest}")
    return value


def _number(value: Any, key: str, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise UserError(f"{where}: {key}={_shown(value)} must be a positive number")
    return float(value)


def _choice(fields: dict[str, Any], key: str, choices: Any, default: str, where: str) -> str:
    value = fields.get(key, default)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{where}: {key}={_shown(value)} must be one of {', '.join(choices)}")
    return value


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:80] + "…"


# --- writing ---------------------------------------------------------------------------------------------------------


def plan(config: ModelConfig, layout: str, *, packed: bool) -> Layout:
    """How `config` is stored in `layout` "packed" or "master"; `packed`: the weights that there are have no latent form.

    Raises:
        UserError: transformers would compute another function; the line says why.
    """
    if layout not in ("packed", "master"):
        raise UserError(f"layout={layout!r} is unknown: must be 'packed' or 'master'")
    quant, width = config.for_inference.quant, config.num_heads * config.head_dim
    weight_only = config.linear is Linear.BIT and quant.activation is ActivationQuantizer.NONE
    _refuse(config.norm is NormPlacement.INSIDE, "norm=inside: transformers has no norm of that place without gain")
    _refuse(config.norm_kind is NormKind.LAYER, "norm_kind=layer: its norms are root mean square")
    _refuse(config.ffn is FeedForward.GELU, "ffn=gelu: its feed-forward is gated")
    architecture = BITNET if config.norm is NormPlacement.SUB else LLAMA
    if architecture == BITNET:
        _refuse(width != config.hidden_size, f"num_heads * head_dim = {width}: must be hidden_size={config.hidden_size} for {architecture}")
    else:
        multiple = config.hidden_size % config.num_heads == 0
        _refuse(not multiple, f"hidden_size={config.hidden_size}: must be a multiple of num_heads={config.num_heads} for {architecture}")
    if config.linear is Linear.FULL:
        _refuse(layout == "packed", "linear=full in the packed layout: there are no ternary weights; the master layout takes it")
        return Layout(architecture=architecture)
    if quant.weight is WeightQuantizer.NONE:
        raise UserError("transformers cannot express weight quantiser none with linear=bit")
    if weight_only:
        _refuse(layout == "packed", "activation=none in the packed layout: it quantises activations; the master layout takes it")
        return Layout(architecture=architecture, trilm=True)
    eight = quant.activation_bits == 8
    _refuse(not eight, f"activation_bits={quant.activation_bits}: its activations have 8 bits")
    _refuse(quant.weight_group is not None, f"weight_group={quant.weight_group}: it has one scale for a matrix")
    _refuse(quant.weight_shards > 1, f"weight_shards={quant.weight_shards}: it has one scale for a matrix")
    if layout == "master":
        _refuse(
            quant.weight is not WeightQuantizer.ABSMEAN, f"weight quantiser {quant.weight.value} in the master layout: its own is absmean"
        )
        _refuse(packed, "packed weights in the master layout: the mean of their magnitudes is another scale; the packed layout takes them")
        return Layout(architecture=architecture)
    outputs = {"hidden_size": config.hidden_size, "ffn_size": config.ffn_size, "num_heads * head_dim": width}
    for name, size in {**outputs, "num_kv_heads * head_dim": config.num_kv_heads * config.head_dim}.items():
        _refuse(size % 4 != 0, f"{name}={size} in the packed layout: four outputs share a byte; it must be a multiple of 4")
    return Layout(architecture=architecture, packed=True, divides=architecture == LLAMA)


def _refuse(condition: bool, reason: str) -> None:
    if condition:
        raise UserError(f"transformers cannot express {reason}")


def compose(config: ModelConfig, layout: Layout, stored: DType, *, bos: int | None, eos: int | list[int] | None) -> dict[str, Any]:
    """The fields of config.json, under keys that transformers 4.52 and 5 both read; `stored` is the type of what is not packed."""
    fields: dict[str, Any] = {
        "architectures": [layout.architecture],
        "model_type": _MODEL_TYPES[layout.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": next(name for name, kind in _ACTIVATIONS.items() if kind is config.ffn),
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": stored.value,
        "use_cache": True,
    }
    if layout.architecture == LLAMA:
        fields |= {"head_dim": config.head_dim, "mlp_bias": False}
    if config.linear is Linear.BIT and not layout.trilm:
        fields["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if layout.divides else "autobitlinear",
            "quantization_mode": "offline" if layout.packed else "online",
            "modules_to_not_convert": ["lm_head"],
        }
    return fields
