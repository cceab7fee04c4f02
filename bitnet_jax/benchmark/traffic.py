"""Bytes that one step of decoding must read: what bounds its speed, whatever the program."""

from dataclasses import dataclass

from bitnet_jax import costs
from bitnet_jax.config import ModelConfig

HEADS = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of a number of the table that the vocabulary product reads."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of a step for one row.

    Attributes:
        linear: the linear layers, scales included.
        head: the vocabulary product.
        cache: keys and values of the tokens before, read, on average over a generation.
    """

    linear: int
    head: int
    cache: int

    @property
    def total(self) -> int:
        return self.linear + self.head + self.cache


def traffic(config: ModelConfig, storage: costs.Storage, head: str, prompt: int, generate: int) -> Traffic:
    """Bytes of an average step of a generation of `generate` tokens behind a prompt of `prompt`.

    Token g of G is made from a cache of P + g tokens, so the average over g = 1 … G - 1 is P + G / 2. An int8 table has a float32 scale
    and a float32 bound for each of its V rows.

    Args:
        config: the model's configuration.
        storage: of the linear layers.
        head: type of the table, one of `HEADS`.
        prompt: tokens of the prompt (P).
        generate: new tokens (G).
    """
    rows = config.vocab_size
    return Traffic(
        linear=costs.bytes_by_part(config, storage).linear,
        head=rows * config.hidden_size * HEADS[head] + (8 * rows if head == "int8" else 0),
        cache=costs.kv_cache_bytes(config, 1, prompt + generate // 2),
    )
