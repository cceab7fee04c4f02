"""What the papers print about costs, and the models that they print it of: the formulas of `bitnet_jax.costs` beside those numbers.

Sources: b1 (2310.11453), b1.58 (2402.17764), 2B4T (2504.12285), Spectra (2407.12327). What is "read" stands in a figure and was read
from its vector graphics; everything else is printed.
"""

import math
from dataclasses import dataclass, replace

from bitnet_jax import costs
from bitnet_jax.config import DType, Linear, ModelConfig, NormPlacement
from bitnet_jax.costs import Precision
from bitnet_jax.presets import PRESETS

GB = 1e9


def _b1(hidden: int, layers: int, heads: int) -> ModelConfig:
    return replace(
        PRESETS["bitnet-b1-30b"],
        hidden_size=hidden,
        ffn_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
    )


def _llama(hidden: int, ffn: int, layers: int, heads: int) -> ModelConfig:
    """A model of b1.58 of one of LLaMA's shapes."""
    return replace(
        PRESETS["bitnet-b1.58-7b"],
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
    )


def _rival(layers: int, hidden: int, query: int, key: int, ffn: int) -> ModelConfig:
    """Linear layers of a gated model in full precision, of so many query and key features."""
    return ModelConfig(
        vocab_size=32,
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=query // 64,
        num_kv_heads=key // 64,
        head_dim=64,
        norm=NormPlacement.NONE,
        linear=Linear.FULL,
    )


# --- energy ----------------------------------------------------------------------------------------------------------

B1_70B = _b1(8192, 80, 64)
"""b1's structure at the size of b1.58's largest."""
B1_SHAPES = {size: PRESETS[f"bitnet-b1-{size}"] for size in ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "30b")} | {
    "70b": B1_70B
}
"""The shapes that both papers' energy is of; what b1.58 calls 3B and 7B are 2.7b and 6.7b."""
B1_RATIOS = {"125m": 8.8, "350m": 11.0, "760m": 15.0, "1.3b": 18.6, "2.7b": 21.7, "6.7b": 29.1, "13b": 32.9, "30b": 38.8}
"""b1, Figure 1: energy of fp16 over that of the BitNet."""
B158_RATIOS = {"1.3b": 18.6, "2.7b": 21.7, "6.7b": 29.1, "13b": 32.9, "70b": 41.2}
"""b1.58, Figure 3: the same."""
B158_JOULES = {"1.3b": (0.322, 0.0173), "2.7b": (0.666, 0.0307), "6.7b": (1.684, 0.0578), "13b": (3.276, 0.0993), "70b": (16.67, 0.404)}
"""b1.58, Figure 3, read: joules of 512 tokens in fp16 and of the BitNet."""
PRODUCTS_ALONE = (0.16 + 0.34) / 0.007
"""b1.58, Figure 3: 71.4, fp16 multiply-adds over int8 additions at 7 nm; what the ratio of a whole model stays below."""


def joules(size: str) -> tuple[float, float]:
    """Energy of 512 tokens in fp16 and of the BitNet, by `costs.energy`."""
    return costs.energy(B1_SHAPES[size], Precision.FP16).total, costs.energy(B1_SHAPES[size]).total


def ratio_scaled_once(size: str) -> float:
    """The ratio where q, k and v share the scaling of their one input: T K multiplications in fp16 for three matrices, not for each."""
    shape, (full, ternary) = B1_SHAPES[size], joules(size)
    return full / (ternary - shape.num_layers * 2 * 512 * shape.hidden_size * 0.34e-12)


@dataclass(frozen=True, kw_only=True)
class Small:
    """A row of 2B4T's Table 1: printed energy in joules and memory of non-embedding weights in GB."""

    config: ModelConfig
    joules: float
    memory: float

    @property
    def weights(self) -> float:
        """GB of the linear layers at 1.58 or 16 bits a weight."""
        return (1.58 if self.config.linear is Linear.BIT else 16) * costs.parameters(self.config).linear / 8 / GB


TABLE_2B4T = {
    "BitNet b1.58 2B4T": Small(config=PRESETS["bitnet-b1.58-2b4t"], joules=0.028, memory=0.4),
    "LLaMA-3.2-1B": Small(config=_rival(16, 2048, 2048, 512, 8192), joules=0.258, memory=2),
    "Gemma-3-1B": Small(config=_rival(26, 1152, 1024, 256, 6912), joules=0.186, memory=1.4),
    "Qwen2.5-1.5B": Small(config=_rival(28, 1536, 1536, 256, 8960), joules=0.347, memory=2.6),
    "SmolLM2-1.7B": Small(config=_rival(24, 2048, 2048, 2048, 8192), joules=0.425, memory=3.2),
    "MiniCPM-2B": Small(config=_rival(40, 2304, 2304, 2304, 5760), joules=0.649, memory=4.8),
}

# --- memory ----------------------------------------------------------------------------------------------------------

B158_SHAPES = {size: PRESETS[f"bitnet-b1.58-{size}"] for size in ("700m", "1.3b", "3b", "3.9b", "7b")} | {
    "13b": _llama(5120, 13824, 40, 40),
    "70b": _llama(8192, 22016, 80, 64),  # LLaMA's 65B: LLaMA-2's 70B would take 138 GB in fp16, more than is printed
}
B158_MEMORY: dict[str, tuple[float | None, float]] = {
    "700m": (2.08, 0.80),
    "1.3b": (3.34, 1.14),
    "3b": (7.89, 2.22),
    "3.9b": (None, 2.38),
    "7b": (14.6, 3.32),
    "13b": (27.5, 5.37),
    "70b": (131.7, 18.4),
}
"""GB on a GPU of LLaMA in fp16 and of the BitNet: b1.58, Table 1; from 7b on Figure 2, read."""


def weights(size: str) -> tuple[float, float]:
    """GB of the weights alone in fp16, and with two bits for a linear layer's weight and fp16 for embedding and head."""
    count = costs.parameters(B158_SHAPES[size])
    return 2 * count.total / GB, (count.linear / 4 + 2 * (count.total - count.linear)) / GB


SPECTRA_BITS = {
    "99m": (0.90, 1.60),
    "190m": (1.42, 3.05),
    "390m": (2.11, 6.28),
    "560m": (2.76, 9.11),
    "830m": (3.55, 13.34),
    "1.1b": (4.42, 18.39),
    "1.5b": (5.36, 24.23),
    "2.4b": (7.23, 39.38),
    "3.9b": (10.76, 63.83),
}
"""Spectra, table of the models: 10^9 bits of TriLM and of FloatLM."""


def spectra_bits(size: str) -> tuple[float, float]:
    """10^9 bits at 1.58 a ternary weight and 16 any other; and at 16 for all."""
    count = costs.parameters(PRESETS[f"trilm-{size}"])
    return (1.58 * count.linear + 16 * (count.total - count.linear)) / 1e9, 16 * count.total / 1e9


# --- batches at 70B --------------------------------------------------------------------------------------------------

BATCHES = {"fp16": 16, "b1.58": 176}
"""b1.58, Table 3: most sequences of 512 tokens on two cards of 80 GB."""


@dataclass(frozen=True, kw_only=True)
class CardMemory:
    """batch = floor((usable - model) / sequence), in GB: two constants, which two printed batches fix.

    Attributes:
        usable: of two cards of 80 GB.
        sequence: of 512 tokens.
        cache: of which the keys and values of 512 tokens take at 8 bits each.
    """

    usable: float
    sequence: float
    cache: float

    def batch(self, model: float) -> int:
        """Sequences beside a model of so many GB without any."""
        return math.floor((self.usable - model) / self.sequence + 1e-9)


def card_memory() -> CardMemory:
    """The constants: from both batches and the memory of the models in Figure 2."""
    full, ternary = B158_MEMORY["70b"]
    assert full is not None
    sequence = (full - ternary) / (BATCHES["b1.58"] - BATCHES["fp16"])
    shape = replace(B158_SHAPES["70b"], dtype=DType.BFLOAT16)
    cache = costs.kv_cache_bytes(shape, batch=1, capacity=512) / 2 / GB
    return CardMemory(usable=full + BATCHES["fp16"] * sequence, sequence=sequence, cache=cache)
