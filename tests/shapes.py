"""The small model that tests share."""

from typing import Any

from bitnet_jax.config import ModelConfig


def tiny(**changes: Any) -> ModelConfig:
    """A two-layer model of about 10,000 parameters with two query heads to a key head; `changes` replace fields."""
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "ffn_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_seq_len": 64,
    }
    return ModelConfig(**(fields | changes))
