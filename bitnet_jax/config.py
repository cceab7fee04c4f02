"""Configurations: frozen, keyword-only dataclasses, presets for every published size, and a strict JSON round trip.

Imports nothing but the standard library and `errors`, so that reading a configuration never starts JAX.
A full-precision twin differs from its BitNet in one field: `ModelConfig.linear`.
"""

import dataclasses
import enum
import json
import math
import types
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from bitnet_jax.errors import UserError

FORMAT_VERSION = 1
"""Version of the JSON form. It rises when a field changes its meaning."""
_LARGEST = 3.4e38  # finite in float32


# --- choices ---------------------------------------------------------------------------------------------------------


class Linear(enum.Enum):
    """What the linear layers of attention and feed-forward are. The one field in which a twin differs."""

    BIT = "bit"  # BitLinear: weights and activations quantised as `QuantConfig` says
    FULL = "full"  # the same layer with quantisation switched off


class WeightQuantizer(enum.Enum):
    """How a weight matrix becomes codes in {-1, 0, 1} and a scale. Equations: `quant.py`."""

    NONE = "none"
    ABSMEAN = "absmean"  # b1.58: round(W / mean|W|)
    ABSMEDIAN = "absmedian"  # Reloaded: round(W / median|W|)
    ABSMAX = "absmax"  # ablation: round(W / max|W|)
    SIGN = "sign"  # b1: sign(W - mean W), scale mean|W|
    ZERO_ONE = "zero_one"  # ablation of b1.58's FAQ: round(W / mean|W|), where it is positive


class ActivationQuantizer(enum.Enum):
    """Over what the absmax of the activations is taken."""

    NONE = "none"
    PER_TOKEN = "per_token"
    PER_TENSOR = "per_tensor"  # while training; per token afterwards. Microbatches are tensors of their own


class Arithmetic(enum.Enum):
    """How the quantised product is computed while training."""

    INTEGER = "integer"  # operands are the integer codes, scales after the product: what packed inference computes
    INT8 = "int8"  # the same numbers from int8 operands and int32 sums, for devices whose matrix unit has them
    FAKE = "fake"  # operands are the dequantised values, as in transformers and the FAQ


class NormPlacement(enum.Enum):
    """Where the normalisation in front of the quantiser stands."""

    INSIDE = "inside"  # inside every linear layer, without gain; no block norms (FAQ of b1.58)
    SUB = "sub"  # block norms, and one before o_proj and one before down_proj (2B4T)
    NONE = "none"  # block norms only (LLaMA, TriLM)


class NormKind(enum.Enum):
    RMS = "rms"
    LAYER = "layer"  # b1: mean subtracted


class FeedForward(enum.Enum):
    SWIGLU = "swiglu"  # down(silu(gate x) * up x)
    RELU2 = "relu2"  # down(relu(gate x)^2 * up x)
    GELU = "gelu"  # down(gelu(up x)): two matrices, as in b1


class Layers(enum.Enum):
    """How the stack of blocks is written: one scanned block over stacked parameters, or a Python loop over `block_0`, `block_1`, …"""

    SCAN = "scan"
    LOOP = "loop"


class Remat(enum.Enum):
    """What a block keeps for the backward pass."""

    NONE = "none"  # everything
    DOTS = "dots"  # results of the matrix products
    FULL = "full"  # the block's input only


class DType(enum.Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Gather(enum.Enum):
    """What travels of a ternary matrix that is cut up over devices, when it is multiplied. The results are the same."""

    LATENT = "latent"  # the latent weights forward, their codes backward
    INT8 = "int8"  # weights are quantised where they lie; a byte for each code travels
    TWO_BIT = "two_bit"  # likewise, a byte for four codes


class Schedule(enum.Enum):
    """Shapes of learning rate and weight decay over the run. Equations: `training/schedules.py`."""

    TWO_STAGE_LINEAR = "two_stage_linear"  # FAQ of b1.58
    TWO_STAGE_COSINE = "two_stage_cosine"  # 2B4T
    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class NonFinite(enum.Enum):
    """What happens at a step whose loss or gradient is not finite. Parameters are left as they were in either case."""

    SKIP = "skip"  # count it, go on; stop after `non_finite_limit` in a row
    STOP = "stop"  # stop at the first


# --- model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a BitLinear quantises. Has no effect where `ModelConfig.linear` is `FULL`."""

    weight: WeightQuantizer = WeightQuantizer.ABSMEAN
    """Weight quantiser."""
    weight_group: int | None = None
    """Input features that share one weight scale within a column; None is one scale for the whole matrix."""
    weight_shards: int = 1
    """Equal parts of a matrix, along the axis that model parallelism cuts (`partition.RULES`), which are quantised each for itself. A
    property of the model, whatever the mesh; with `mesh.tensor` of these, or a divisor, no device needs another's weights for a scale."""
    activation: ActivationQuantizer = ActivationQuantizer.PER_TOKEN
    """Activation quantiser."""
    activation_bits: int = 8
    """Bits of an activation code, 2 to 8."""
    arithmetic: Arithmetic = Arithmetic.INTEGER
    """Operands of the training product: integer codes (exactly what packed inference computes), as floating-point numbers or int8, or
    dequantised values."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(2 <= self.activation_bits <= 8, f"activation_bits={self.activation_bits} must be from 2 to 8")
        if self.weight_group is not None:
            _require(self.weight_group > 0, f"weight_group={self.weight_group} must be positive, or none for one scale per matrix")
        _require(self.weight_shards >= 1, f"weight_shards={self.weight_shards} must be at least 1")
        _require(
            self.weight_shards == 1 or self.weight_group is None,
            f"weight_shards={self.weight_shards} and weight_group={self.weight_group} both say what shares a scale: must be 1, or none",
        )
        if self.arithmetic is Arithmetic.INT8:
            none = [name for name in ("weight", "activation") if getattr(self, name).value == "none"]
            _require(not none, f"arithmetic=int8 needs quantised operands: {' and '.join(none)} must not be none")

    @property
    def for_inference(self) -> "QuantConfig":
        """Per token where training was per tensor: a token's result must not depend on its neighbours (b1, section 2)."""
        per_tensor = self.activation is ActivationQuantizer.PER_TENSOR
        return replace(self, activation=ActivationQuantizer.PER_TOKEN) if per_tensor else self

    def scale_shape(self, inputs: int, outputs: int, axis: int | None) -> tuple[int, ...]:
        """Shape of the packed scale of a matrix [K, N]: () for one, [G, N] where K / G inputs of a column share one.

        `axis` is the one that `weight_shards` cut: -2, the inputs, of o and down, or -1, the outputs, of all others.
        """
        if self.weight_group is not None:
            return (inputs // self.weight_group, outputs)
        if self.weight_shards == 1:
            return ()
        return (self.weight_shards if axis == -2 else 1, outputs)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and arithmetic of a decoder-only transformer."""

    vocab_size: int
    """Rows of the embedding (V)."""
    hidden_size: int
    """Width of the residual stream (D)."""
    ffn_size: int
    """Width of the feed-forward (F)."""
    num_layers: int
    """Number of blocks (L)."""
    num_heads: int
    """Query heads (N)."""
    num_kv_heads: int
    """Key and value heads (K); num_heads must be a multiple of it."""
    head_dim: int
    """Features of one head (H)."""
    max_seq_len: int = 2048
    """Longest sequence that the model is meant for."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies, theta^(-2i/H)."""
    linear: Linear = Linear.BIT
    """BitLinear, or its full-precision twin."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantisers of the BitLinear layers."""
    norm: NormPlacement = NormPlacement.SUB
    """Place of the norm in front of the quantiser."""
    norm_kind: NormKind = NormKind.RMS
    """Root-mean-square norm, or layer norm (b1)."""
    norm_eps: float = 1e-5
    """Added to the variance inside the norm."""
    ffn: FeedForward = FeedForward.SWIGLU
    """Feed-forward: gated silu, gated squared relu, or plain gelu."""
    tie_embeddings: bool = True
    """Whether the output head is the embedding."""
    init_std: float | None = None
    """Standard deviation of initial weights; None is 1/sqrt(fan in) for matrices and 0.02 for embeddings."""
    dtype: DType = DType.FLOAT32
    """Type of activations and products; parameters and scales stay float32."""
    logits_dtype: DType = DType.FLOAT32
    """Type of the logits."""
    layers: Layers = Layers.SCAN
    """One scanned block, or a loop of named blocks."""
    remat: Remat = Remat.NONE
    """What a block keeps for the backward pass."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("vocab_size", "hidden_size", "ffn_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_seq_len"):
            value = getattr(self, name)
            _require(0 < value < 2**31, f"{name}={value} must be from 1 to 2147483647")
        _require(
            self.num_heads % self.num_kv_heads == 0, f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        _require(0 < self.rope_theta < _LARGEST, f"rope_theta={self.rope_theta} must be positive and finite")
        _require(0 < self.norm_eps < 1, f"norm_eps={self.norm_eps} must lie between 0 and 1")
        if self.init_std is not None:
            _require(0 < self.init_std < _LARGEST, f"init_std={self.init_std} must be positive and finite")
        if self.linear is Linear.BIT and self.quant.weight_group is not None:
            for name, size in (
                ("hidden_size", self.hidden_size),
                ("ffn_size", self.ffn_size),
                ("num_heads * head_dim", self.num_heads * self.head_dim),
            ):
                _require(size % self.quant.weight_group == 0, f"{name}={size} must be a multiple of weight_group={self.quant.weight_group}")
        if self.linear is Linear.BIT:
            for name, size in (
                ("num_heads * head_dim", self.num_heads * self.head_dim),
                ("num_kv_heads * head_dim", self.num_kv_heads * self.head_dim),
                ("ffn_size", self.ffn_size),
            ):
                shards = self.quant.weight_shards
                _require(size % shards == 0, f"{name}={size} must be a multiple of weight_shards={shards}")

    @property
    def for_inference(self) -> "ModelConfig":
        """The same model as it is used once trained: activations that were quantised per tensor are quantised per token (b1, section 2)."""
        return replace(self, quant=self.quant.for_inference)

    @property
    def twin(self) -> "ModelConfig":
        """The full-precision twin: the same in every field but `linear`."""
        return replace(self, linear=Linear.FULL)

    @staticmethod
    def preset(name: str) -> "ModelConfig":
        """The published configuration called `name`; `presets()` lists the names.

        Raises:
            UserError: no preset has that name.
        """
        from bitnet_jax.presets import PRESETS

        if name not in PRESETS:
            raise UserError(f"preset {name!r} is unknown: must be one of {', '.join(PRESETS)}")
        return PRESETS[name]


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes token windows."""

    source: str = "shakespeare"
    """'shakespeare' (38 plays, public domain); a file, folder or glob of .txt, .jsonl, .jsonl.zst or .parquet; or 'hf:NAME[:CONFIG]', a
    data set of the Hugging Face hub."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet records."""
    tokenizer: str = "bpe"
    """'bpe' (trained on the corpus, as large as the model's vocabulary), 'bytes', or the path of a tokenizer.json."""
    seq_len: int = 256
    """Tokens of one training window (T)."""
    validation_fraction: float = 0.05
    """Share of the documents held out, above 0 and at most 0.5; the end of the text where that is less than half a document."""
    cache_dir: str | None = None
    """Folder of tokenised corpora; None is the user's cache folder."""
    stall_timeout: float = 600.0
    """Seconds that a run waits for a batch before it stops and names the source; 0 waits for ever."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.seq_len >= 2, f"seq_len={self.seq_len} must be at least 2")
        _require(0 <= self.stall_timeout < math.inf, f"stall_timeout={self.stall_timeout} must be zero or positive, and finite")
        _require(0 < self.validation_fraction <= 0.5, f"validation_fraction={self.validation_fraction} must lie above 0 and be at most 0.5")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedules."""

    schedule: Schedule = Schedule.TWO_STAGE_LINEAR
    """Shape of learning rate and weight decay."""
    learning_rate: float = 1.5e-3
    """Peak learning rate; of stage one where there are two stages."""
    second_learning_rate: float | None = 1.0e-3
    """Peak of stage two: of the line that it is the latter part of (two_stage_linear), or where its cosine starts (two_stage_cosine).
    Single-stage schedules ignore it."""
    final_learning_rate: float = 3e-5
    """Learning rate at the last step."""
    warmup_steps: int = 375
    """Steps of linear warm-up."""
    stage_switch: float = 0.5
    """Share of the run at which the second learning-rate stage begins."""
    weight_decay: float = 0.1
    """Decoupled weight decay; in two-stage schedules off in stage two. Never on norms and embeddings."""
    weight_decay_switch: float | None = None
    """Share of the run at which a two-stage schedule turns weight decay off; None is `stage_switch` (TriLM: 2/3)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None does not clip."""
    quant_warmup_steps: int = 0
    """Update from which a BitLinear is quantised in full; before it, in part, from nothing on. Here and not in `QuantConfig`, for it is
    of the run's steps: the model that comes of it is the same."""
    ema_decay: float | None = None
    """Decay of a moving average of the parameters that is kept beside them; none keeps none. It changes no parameter."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("learning_rate", "final_learning_rate", "weight_decay", "eps"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"{name}={value} must be zero or positive, and finite")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be at least 0 and below 1")
        _require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must not be negative")
        _require(0 < self.stage_switch < 1, f"stage_switch={self.stage_switch} must lie between 0 and 1")
        if self.weight_decay_switch is not None:
            _require(0 < self.weight_decay_switch <= 1, f"weight_decay_switch={self.weight_decay_switch} must lie above 0 and be at most 1")
        if self.schedule in (Schedule.TWO_STAGE_LINEAR, Schedule.TWO_STAGE_COSINE):
            _require(
                self.second_learning_rate is not None and 0 <= self.second_learning_rate < math.inf,
                f"second_learning_rate={self.second_learning_rate} must be zero or positive for schedule={self.schedule.value}",
            )
        if self.clip_norm is not None:
            _require(self.clip_norm > 0, f"clip_norm={self.clip_norm} must be positive, or none")
        _require(self.quant_warmup_steps >= 0, f"quant_warmup_steps={self.quant_warmup_steps} must not be negative")
        if self.ema_decay is not None:
            _require(0 < self.ema_decay < 1, f"ema_decay={self.ema_decay} must lie between 0 and 1, or be none")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How a run is divided among devices. It changes the rounding of sums and nothing else, so a resumed run may change it."""

    data: int = 1
    """Groups of devices that share the batch and each hold all parameters."""
    fsdp: int | None = None
    """Devices that share the batch, and among which parameters, gradients and moments are cut up; none is all that the others leave."""
    tensor: int = 1
    """Devices that share the features of each layer; every cut size of the model must be a multiple of it."""
    sequence: int = 1
    """Devices that share the positions of a window; seq_len must be a multiple of it."""
    gather: Gather = Gather.LATENT
    """What of the ternary weights travels among the devices of `fsdp`."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("data", "tensor", "sequence") + (() if self.fsdp is None else ("fsdp",)):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run shows and keeps. Nothing here changes a number of the run, so a resumed run may change it."""

    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0 evaluates only at the end."""
    eval_windows: int = 64
    """Held-out windows of one evaluation during training."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one more is written at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, at least 2 so that a damaged one has a predecessor."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Weights & Biases project to log to (extra 'wandb'); none does not log there."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("log_every", "checkpoint_every", "eval_windows"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        _require(self.eval_every >= 0, f"eval_every={self.eval_every} must not be negative")
        _require(self.keep_checkpoints >= 2, f"keep_checkpoints={self.keep_checkpoints} must be at least 2")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. What decides its numbers must be the same when it is resumed: all but `output`, `mesh`, `data.cache_dir` and
    the policy on non-finite steps."""

    model: ModelConfig
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and tokens."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser and schedules."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Logs and checkpoints."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""
    steps: int = 1000
    """Optimiser steps of the whole run."""
    batch_size: int = 16
    """Windows of one optimiser step, over all devices."""
    accumulation: int = 1
    """Microbatches that one step is computed in; batch_size must be a multiple of it."""
    z_loss: float = 0.0
    """Weight of mean(log Z)^2 in the loss; 0 is off."""
    non_finite: NonFinite = NonFinite.SKIP
    """What to do at a non-finite loss or gradient."""
    non_finite_limit: int = 10
    """Non-finite steps in a row after which a run stops with its last checkpoint kept."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("steps", "batch_size", "accumulation", "non_finite_limit"):
            _require(1 <= getattr(self, name) < 2**31, f"{name}={getattr(self, name)} must be from 1 to 2147483647")
        _require(
            self.batch_size % self.accumulation == 0, f"batch_size={self.batch_size} must be a multiple of accumulation={self.accumulation}"
        )
        _require(self.z_loss >= 0, f"z_loss={self.z_loss} must not be negative")
        _require(0 <= self.seed < 2**32, f"seed={self.seed} must be from 0 to 4294967295")
        _require(
            self.data.seq_len <= self.model.max_seq_len,
            f"seq_len={self.data.seq_len} must be at most the model's max_seq_len={self.model.max_seq_len}",
        )
        if self.mesh.gather is not Gather.LATENT:
            quant = self.model.quant
            ternary = self.model.linear is Linear.BIT and quant.weight is not WeightQuantizer.NONE
            _require(
                ternary and quant.arithmetic is not Arithmetic.FAKE,
                f"gather={self.mesh.gather.value} sends the codes of ternary weights: must be latent for linear={self.model.linear.value} "
                f"with weight={quant.weight.value} and arithmetic={quant.arithmetic.value}",
            )
            _require(
                self.optimizer.quant_warmup_steps == 0,
                f"gather={self.mesh.gather.value} sends codes, and quant_warmup_steps={self.optimizer.quant_warmup_steps} needs latent "
                "weights: must be latent, or 0",
            )
        _require(self.optimizer.warmup_steps < self.steps, f"warmup_steps={self.optimizer.warmup_steps} must be below steps={self.steps}")
        _require(
            self.optimizer.quant_warmup_steps <= self.steps,
            f"quant_warmup_steps={self.optimizer.quant_warmup_steps} must be at most steps={self.steps}",
        )


def _check_types(config: Any) -> None:
    """A string where an enum belongs would compare unequal to every choice, and so choose something else without a word."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        _check_type(hints[f.name], getattr(config, f.name), f.name)


def _check_type(hint: Any, value: Any, where: str) -> None:
    if isinstance(hint, types.UnionType):  # only `X | None` occurs
        if value is None:
            return
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if issubclass(hint, enum.Enum):
        if not isinstance(value, hint):
            names = ", ".join(f"{hint.__name__}.{choice.name}" for choice in hint)
            raise UserError(f"{where}={value!r} must be one of {names}")
    elif hint is float:
        if type(value) not in (int, float):
            raise UserError(f"{where}={value!r} must be a number")
    elif not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r} must be of type {hint.__name__}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


# --- JSON ------------------------------------------------------------------------------------------------------------

Config = TypeVar("Config", QuantConfig, ModelConfig, DataConfig, OptimizerConfig, MeshConfig, OutputConfig, TrainConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as plain JSON values: enums by value, nested configurations as objects."""
    return {f.name: _to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(kind: type[Config], values: Any, where: str = "config") -> Config:
    """The configuration of type `kind` that `to_dict` wrote.

    Raises:
        UserError: a field is unknown, is missing, has a value of the wrong type, or breaks a rule of the configuration.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} must be an object, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise UserError(f"{where} has unknown field {unknown[0]!r}: must be one of {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where} lacks field {missing[0]!r}")
    return kind(**{name: _from_json(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def to_json(config: Any) -> str:
    """`config` as indented JSON text; `from_json` reads it back to an equal value."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(kind: type[Config], text: str, where: str = "config") -> Config:
    """The configuration that `to_json` wrote.

    Raises:
        UserError: the text is not JSON, or is not a configuration of this kind.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    return from_dict(kind, values, where)


def read(kind: type[Config], path: Path) -> Config:
    """The configuration in the JSON file `path`; raises UserError where it is missing or wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return from_json(kind, text, str(path))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The fields in which two configurations of one type differ, as 'name: old value → new value'."""
    rows: list[str] = []
    for f in dataclasses.fields(old):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(before):
            rows += differences(before, after, f"{prefix}{f.name}.")
        elif before != after:
            rows.append(f"{prefix}{f.name}: {_to_json(before)} → {_to_json(after)}")
    return rows


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return value.value if isinstance(value, enum.Enum) else value


def _from_json(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # only `X | None` occurs
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(Any, hint), value, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            raise UserError(f"{where}={value!r} must be one of {', '.join(str(choice.value) for choice in hint)}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise UserError(f"{where}={value!r} must be {'a finite number' if hint is float else f'of type {hint.__name__}'}")
    return value
