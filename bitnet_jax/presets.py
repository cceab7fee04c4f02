"""The published model sizes as configurations, a ladder of small ones for experiments, and the published training recipes.

Each group says where its numbers are from and what the source leaves open ("assumed"). Imports `config` and `errors` only.
"""

from dataclasses import replace

from bitnet_jax.config import (
    ActivationQuantizer,
    DType,
    FeedForward,
    ModelConfig,
    NormKind,
    NormPlacement,
    OptimizerConfig,
    QuantConfig,
    Schedule,
    WeightQuantizer,
)
from bitnet_jax.errors import UserError

# --- BitNet b1 -------------------------------------------------------------------------------------------------------

# 2310.11453, Table 5: hidden, layers, heads; peak learning rate.
_B1 = {
    "125m": (768, 12, 12, 2.4e-3),
    "350m": (1024, 24, 16, 1.2e-3),
    "760m": (1536, 24, 16, 1e-3),
    "1.3b": (2048, 24, 32, 8e-4),
    "2.7b": (2560, 32, 32, 6.4e-4),
    "6.7b": (4096, 32, 32, 4.8e-4),
    "13b": (5120, 40, 40, 4e-4),
    "30b": (7168, 48, 56, 4e-4),
}


def _b1(hidden: int, layers: int, heads: int) -> ModelConfig:
    """b1: sign weights, layer norm inside every linear layer, activations per tensor while training (2310.11453, section 2).

    A feed-forward of 4 * hidden in two matrices follows from the paper's energy tables. Assumed, because not stated: gelu, rotary
    positions, an untied head, a context of 2048, and 16000 for a vocabulary printed as "16K".
    """
    return ModelConfig(
        vocab_size=16_000,
        hidden_size=hidden,
        ffn_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        quant=QuantConfig(weight=WeightQuantizer.SIGN, activation=ActivationQuantizer.PER_TENSOR),
        norm=NormPlacement.INSIDE,
        norm_kind=NormKind.LAYER,
        ffn=FeedForward.GELU,
        tie_embeddings=False,
    )


def _b1_recipe(size: str) -> OptimizerConfig:
    """2310.11453, Table 6: Adam (0.9, 0.98), polynomial decay, warm-up 750, no clipping; 40,000 steps of 256K tokens.

    Assumed: the polynomial is of degree one and ends at 0.
    """
    return OptimizerConfig(
        schedule=Schedule.LINEAR,
        learning_rate=_B1[size][3],
        second_learning_rate=None,
        final_learning_rate=0.0,
        warmup_steps=750,
        weight_decay=0.05 if size in ("13b", "30b") else 0.01,
        beta2=0.98,
        clip_norm=None,
    )


# --- BitNet b1.58 ----------------------------------------------------------------------------------------------------

# FAQ, Tables 1 and 2: hidden, GLU width, heads, layers; peaks of the two stages. 7b: a4.8 (2411.04965), section "Setup".
_B158 = {
    "700m": (1536, 4096, 24, 24, 1.5e-3, 1e-3),
    "1.3b": (2048, 5460, 32, 24, 1.2e-3, 8e-4),
    "3b": (3200, 8640, 32, 26, 1.2e-3, 8e-4),
    "3.9b": (3200, 12800, 32, 26, 1.2e-3, 8e-4),
    "7b": (4096, 11008, 32, 32, 1e-3, 6e-4),
}


def _b158(hidden: int, ffn: int, heads: int, layers: int) -> ModelConfig:
    """b1.58 of the FAQ: absmean weights, a gainless RMS norm inside every linear layer, SwiGLU, rotary positions, no biases.

    Assumed, because not stated: LLaMA's vocabulary of 32000, an untied head as in LLaMA, and theta 10000.
    """
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        norm=NormPlacement.INSIDE,
        tie_embeddings=False,
    )


def _b158_recipe(size: str) -> OptimizerConfig:
    """FAQ, Table 2: two linear stages, weight decay 0.1 then 0, warm-up 375, betas (0.9, 0.95); 100,000 steps of 1M tokens.

    The last learning rate, 3e-5, is read off Figure 1c of the 700M run and assumed for the others. Clipping is not stated: none.
    """
    first, second = _B158[size][4:]
    return OptimizerConfig(learning_rate=first, second_learning_rate=second, final_learning_rate=3e-5, clip_norm=None)


# 2504.12285 and the released config.json; nothing assumed. Learning rates and batch size are not published.
_2B4T = ModelConfig(
    vocab_size=128_256,
    hidden_size=2560,
    ffn_size=6912,
    num_layers=30,
    num_heads=20,
    num_kv_heads=5,
    head_dim=128,
    max_seq_len=4096,
    rope_theta=500_000.0,
    norm=NormPlacement.SUB,
    ffn=FeedForward.RELU2,
    tie_embeddings=True,
    init_std=0.02,
    dtype=DType.BFLOAT16,
)

# --- TriLM -----------------------------------------------------------------------------------------------------------

# Spectra (2407.12327): hidden, GLU width, heads, layers; peaks of the two stages.
_TRILM = {
    "99m": (512, 1280, 8, 16, 2.4e-3, 1.5e-3),
    "190m": (768, 2048, 12, 16, 2.4e-3, 1.5e-3),
    "390m": (1024, 2560, 16, 24, 1.8e-3, 1.2e-3),
    "560m": (1280, 3072, 20, 24, 1.6e-3, 1.1e-3),
    "830m": (1536, 4096, 24, 24, 1.5e-3, 1e-3),
    "1.1b": (1792, 5120, 28, 24, 1.3e-3, 9e-4),
    "1.5b": (2048, 6144, 32, 24, 1.2e-3, 8e-4),
    "2.4b": (2304, 7680, 36, 30, 1.2e-3, 8e-4),
    "3.9b": (3072, 9216, 24, 30, 1.2e-3, 8e-4),
}


def _trilm(hidden: int, ffn: int, heads: int, layers: int) -> ModelConfig:
    """TriLM: ternary weights, activations left alone, two block norms with gain and no other (2407.12327).

    The vocabulary is not printed. 50277, the length of the GPT-NeoX-20B tokenizer, gives the printed parameter counts to their last
    digit but for two: 190M (190.50M, printed 190.0M) and 3.9B (3.9896B, printed 3.989B). The published models from 1.1B on have one
    weight scale for each of 2 to 6 model-parallel shards of a matrix; here a matrix has one. Theta 10000 is assumed.
    """
    return ModelConfig(
        vocab_size=50_277,
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        quant=QuantConfig(activation=ActivationQuantizer.NONE),
        norm=NormPlacement.NONE,
        tie_embeddings=False,
    )


def _trilm_recipe(size: str) -> OptimizerConfig:
    """2407.12327: AdamW (0.9, 0.95), linear decay with the peak dropped at 1/2 and weight decay off at 2/3; 300B tokens in steps of 1M.

    Assumed: weight decay 0.1, warm-up 375, final learning rate 3e-5 and no clipping, as in the FAQ of b1.58.
    """
    first, second = _TRILM[size][4:]
    return OptimizerConfig(learning_rate=first, second_learning_rate=second, weight_decay_switch=2 / 3, clip_norm=None)


# --- shapes of bitnet.cpp's benchmarks -------------------------------------------------------------------------------

# 2410.16144, dummy models: hidden, feed-forward width, layers, heads.
_DUMMY = {
    "125m": (768, 3072, 11, 12),
    "350m": (1024, 3072, 24, 16),
    "700m": (1536, 4096, 24, 16),
    "1b": (2048, 3584, 24, 32),
    "1.5b": (1536, 9216, 28, 32),
    "2.5b": (2560, 6912, 30, 20),
    "3.8b": (3840, 8192, 24, 32),
    "7b": (4096, 12032, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "30b": (6656, 16384, 60, 52),
    "70b": (8192, 24576, 80, 64),
    "100b": (8192, 45568, 72, 64),
}


def _dummy(hidden: int, ffn: int, layers: int, heads: int) -> ModelConfig:
    """Shapes for measuring speed and size; no such model was trained.

    Assumed: the structure of the public b1.58 reproductions that they stand for (block norms and one before o_proj and down_proj,
    SwiGLU, tied embeddings, as many key heads as query heads), with LLaMA's vocabulary of 32000.
    """
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        norm=NormPlacement.SUB,
        tie_embeddings=True,
    )


# --- ladder ----------------------------------------------------------------------------------------------------------

# Our own shapes, for experiments that fit a small machine: vocabulary, hidden, GLU width, layers, heads. From 1m on every width is a
# multiple of 128, so that no row of the 2-bit format is padded. The name is the total number of parameters, within 15 %; exactly:
_LADDER = {
    "0.2m": (512, 64, 192, 3, 2),  # 193,728
    "1m": (2048, 128, 384, 4, 4),  # 1,117,312
    "3m": (2048, 256, 512, 4, 4),  # 3,151,104
    "10m": (4096, 384, 1024, 5, 6),  # 10,431,488
    "30m": (8192, 512, 1408, 8, 8),  # 29,908,480
    "100m": (8192, 768, 2304, 12, 12),  # 98,360,064
}


def _ladder(vocab: int, hidden: int, ffn: int, layers: int, heads: int) -> ModelConfig:
    """The structure of 2B4T with SwiGLU: block norms and one before o_proj and down_proj, tied embeddings."""
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_seq_len=1024,
        norm=NormPlacement.SUB,
        tie_embeddings=True,
    )


# --- the table -------------------------------------------------------------------------------------------------------

PRESETS: dict[str, ModelConfig] = {
    **{f"ladder-{size}": _ladder(*row) for size, row in _LADDER.items()},
    **{f"bitnet-b1-{size}": _b1(*row[:3]) for size, row in _B1.items()},
    **{f"bitnet-b1.58-{size}": _b158(*row[:4]) for size, row in _B158.items()},
    "bitnet-b1.58-2b4t": _2B4T,
    **{f"trilm-{size}": _trilm(*row[:4]) for size, row in _TRILM.items()},
    **{f"dummy-{size}": _dummy(*row) for size, row in _DUMMY.items()},
}

_RECIPES: dict[str, OptimizerConfig] = {
    **{f"bitnet-b1-{size}": _b1_recipe(size) for size in _B1},
    **{f"bitnet-b1.58-{size}": _b158_recipe(size) for size in _B158},
    **{f"trilm-{size}": _trilm_recipe(size) for size in _TRILM},
}

# FAQ, Table 2, and a4.8, section "Setup": learning rates of the full-precision LLaMA twins.
_TWIN_LEARNING_RATES = {"700m": 2.5e-4, "1.3b": 2e-4, "3b": 2e-4, "7b": 1.5e-4}
_TWIN_RECIPES: dict[str, OptimizerConfig] = {
    f"bitnet-b1.58-{size}": replace(
        _RECIPES[f"bitnet-b1.58-{size}"], schedule=Schedule.LINEAR, learning_rate=rate, second_learning_rate=None, final_learning_rate=0.0
    )
    for size, rate in _TWIN_LEARNING_RATES.items()
}


def presets() -> list[str]:
    """The names that `ModelConfig.preset` knows."""
    return list(PRESETS)


def recipe(name: str) -> OptimizerConfig:
    """The published optimiser settings of the preset `name`.

    Raises:
        UserError: there is no such preset, or its training was not published (2B4T, the dummy shapes) or never was (the ladder).
    """
    return _look_up(_RECIPES, name, "recipe")


def twin_recipe(name: str) -> OptimizerConfig:
    """The published optimiser settings of the full-precision model that the preset `name` was compared with.

    Linear decay, weight decay 0.1 throughout; the last learning rate is not stated: 0 is assumed.

    Raises:
        UserError: there is no such preset, or no full-precision recipe of it was published.
    """
    return _look_up(_TWIN_RECIPES, name, "full-precision recipe")


def _look_up(table: dict[str, OptimizerConfig], name: str, what: str) -> OptimizerConfig:
    ModelConfig.preset(name)  # an unknown name is reported as such
    if name not in table:
        raise UserError(f"preset {name!r} has no published {what}: must be one of {', '.join(table)}")
    return table[name]
