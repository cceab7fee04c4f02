"""The transformer: embedding, a stack of blocks, head. The KV cache goes in and comes out."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from bitnet_jax import cpu, dot, partition
from bitnet_jax.array_types import Array, Float, Float32, Hidden, Int32, Lengths, Positions, Tokens
from bitnet_jax.config import Gather, Layers, ModelConfig, NormPlacement, Remat
from bitnet_jax.errors import UserError
from bitnet_jax.layers import Attention, Embedding, FeedForward, Head, Norm
from kernels_pallas import PackedLayer, PackedTernary

_FEW_ROWS = 16
"""Up to so many rows the vocabulary product waits for memory, and the native library's reads the table once."""


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "length"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    Row b of the batch holds `length[b]` valid positions, from 0 on; what lies behind them is never looked at and will be overwritten.
    A right-padded prompt is undone by `dataclasses.replace(cache, length=prompt_lengths)`.

    Attributes:
        k: keys [L, B, S, K, H].
        v: values [L, B, S, K, H].
        length: valid positions of each row [B], int32.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    length: Lengths

    @property
    def capacity(self) -> int:
        """Positions S that a row can hold. Inside `jit` the lengths are not known, and writing past it is the caller's error: XLA would
        clamp the index silently."""
        return self.k.shape[2]

    @staticmethod
    def empty(config: ModelConfig, batch: int, capacity: int) -> "KVCache":
        """A cache without tokens, in the model's compute type."""
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.dtype.value)
        return KVCache(zeros, jnp.zeros_like(zeros), jnp.zeros((batch,), jnp.int32))


@partial(jax.tree_util.register_dataclass, data_fields=["logits", "cache", "hidden"], meta_fields=[])
@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    Attributes:
        logits: [B, T, V], or [B, n, V] where `last` was given (n = 1 for one of each row), in `config.logits_dtype`.
        cache: the cache with the new tokens in it; None where none was given.
        hidden: output of the final norm [B, T, D], or [B, n, D] where `last` was given.
    """

    logits: Float[Array, "B T V"]
    cache: KVCache | None
    hidden: Hidden


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the block norms are absent where the norm is inside every linear layer."""

    config: ModelConfig
    implementation: str | None = None
    native: bool = False
    gather: Gather = Gather.LATENT

    @nn.compact
    def __call__(self, carry, layer: Int32[Array, ""], positions: Positions, strength: Float32[Array, ""] | None = None):
        config = self.config
        x, cache = carry

        def norm(name: str, x: Hidden) -> Hidden | dot.Activations:
            return x if config.norm is NormPlacement.INSIDE else Norm(config, self.native, name=name)(x)

        how = self.implementation, self.native, self.gather
        out, cache = Attention(config, *how, name="attn")(norm("attn_norm", x), positions, cache, layer, strength)
        x = partition.hidden(x + out)
        x = partition.hidden(x + FeedForward(config, *how, name="ffn")(norm("ffn_norm", x), strength))
        return (x, cache), None


class Transformer(nn.Module):
    """Decoder-only language model; `Transformer(config).apply({"params": params}, tokens).logits` is a forward pass.

    Parameters are a nested dict, latent (`init`, training) or packed (`params.pack`); both are applied in the same way.

    Attributes:
        config: shape and arithmetic.
        implementation: name of the `ternary_matmul` implementation for packed weights; None chooses. On a CPU, where it is None or
            "native", attention over a cache and the vocabulary product of a few rows are the native library's too, if it is there.
            What JAX traces on a CPU for another platform, as `jax.export` does, must name "xla".
        gather: what of latent weights travels where they are cut up over devices, inside a mesh as in `partition`.
    """

    config: ModelConfig
    implementation: str | None = field(default=None, kw_only=True)
    gather: Gather = field(default=Gather.LATENT, kw_only=True)

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        cache: KVCache | None = None,
        last: Lengths | Positions | None = None,
        strength: Float32[Array, ""] | None = None,
    ) -> Output:
        """Logits of the next token at every position.

        Args:
            tokens: [B, T] int32, appended behind the `cache.length` tokens of each row.
            cache: keys and values of earlier tokens, with room for T more; None starts at position 0 and keeps nothing.
            last: [B] or [B, n] indices into T; logits are computed at that position, or those, of each row alone.
            strength: lambda from 0 to 1; latent weights and activations are quantised in part, as in training before
                `quant_warmup_steps`. None is in full.
        """
        config = self.config
        batch, time = tokens.shape
        _check_room(cache, time)
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
        positions = start[:, None] + jnp.arange(time, dtype=jnp.int32)[None, :]

        embedding = Embedding(config, name="embed")()
        x = partition.hidden(partition.gathered_table(embedding)[tokens].astype(config.dtype.value))
        kept = None if cache is None else (cache.k, cache.v)
        native = cache is not None and strength is None and cpu.runs(self.implementation)
        x, kept = self._blocks((x, kept), (positions,) if strength is None else (positions, strength), native)
        if last is not None:
            x = jnp.take_along_axis(x, last.reshape(batch, -1, 1), 1)
        hidden = cast(Hidden, Norm(config, name="final_norm")(x))
        head = embedding if config.tie_embeddings else Head(config, name="head")()
        if native and hidden.shape[0] * hidden.shape[1] <= _FEW_ROWS:
            product = cpu.logits if config.tie_embeddings else cpu.logits_of_columns
            logits = product(hidden.reshape(-1, hidden.shape[-1]), head.astype(hidden.dtype))
            logits = logits.reshape(*hidden.shape[:2], -1).astype(config.logits_dtype.value)
        else:
            product, path = (dot.tied, "embed/embedding") if config.tie_embeddings else (dot.full, "head/kernel")
            logits = partition.logits(product(hidden, head, config.logits_dtype.value, partition.placement(path)))
        if cache is not None and kept is not None:
            cache = KVCache(kept[0], kept[1], start + jnp.int32(time))
        return Output(logits, cache, hidden)

    def _blocks(self, carry, same: tuple[Any, ...], native: bool):
        """The stack of blocks over `carry` = (x, cache), scanned over stacked parameters or written out; `same` is what each is given."""
        config = self.config
        block = Block
        if config.remat is not Remat.NONE:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat is Remat.DOTS else None
            block = nn.remat(Block, prevent_cse=config.layers is Layers.LOOP, policy=policy)
        if config.layers is Layers.LOOP:
            for i in range(config.num_layers):
                carry, _ = block(config, self.implementation, native, self.gather, name=f"block_{i}")(carry, jnp.int32(i), *same)
            return carry
        if self.has_variable("params", "blocks"):
            stacked = self.get_variable("params", "blocks")
            if any(isinstance(leaf, PackedTernary) for leaf in jax.tree.leaves(stacked, is_leaf=_is_packed)):
                return _packed_blocks(Block(config, self.implementation, native, self.gather, parent=None), stacked, carry, same)
        axes: Any = (0, *[nn.broadcast] * len(same))  # declared as one int
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=config.num_layers, in_axes=axes)
        carry, _ = scanned(config, self.implementation, native, self.gather, name="blocks")(
            carry, jnp.arange(config.num_layers, dtype=jnp.int32), *same
        )
        return carry


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedTernary)


def _packed_blocks(block: Block, stacked: Any, carry: Any, same: tuple[Any, ...]) -> Any:
    """The scanned stack of blocks for packed weights, which stay whole: `nn.scan` would copy the bytes of each layer at every step."""

    def one(leaf: Any, layer: Int32[Array, ""]) -> Any:
        return PackedLayer(leaf, layer) if _is_packed(leaf) else jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)

    def step(carry: Any, layer: Int32[Array, ""]) -> Any:
        params = jax.tree.map(lambda leaf: one(leaf, layer), stacked, is_leaf=_is_packed)
        return block.apply({"params": params}, carry, layer, *same)

    return jax.lax.scan(step, carry, jnp.arange(block.config.num_layers, dtype=jnp.int32))[0]


def _check_room(cache: KVCache | None, time: int) -> None:
    """Raises UserError where the tokens do not fit behind those that the cache holds, as far as that is known while tracing."""
    if cache is None:
        return
    used = 0 if isinstance(cache.length, Tracer) else int(np.max(cache.length))
    if used + time > cache.capacity:
        raise UserError(f"{time} tokens behind {used} must fit into the cache's capacity={cache.capacity}")


def parameter_shapes(config: ModelConfig) -> Any:
    """The parameter tree of `config` as shapes and types; nothing is allocated, whatever the size."""
    return jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
