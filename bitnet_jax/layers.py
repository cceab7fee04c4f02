"""Norm, rotary embedding, attention and feed-forward: functions first, thin modules after."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from bitnet_jax import cpu
from bitnet_jax.array_types import Array, Float, Float32, Int32, Keys, Positions, Queries, Values
from bitnet_jax.bitlinear import BitLinear, normalized, products
from bitnet_jax.config import FeedForward as FeedForwardKind
from bitnet_jax.config import Gather, ModelConfig, NormPlacement
from bitnet_jax.dot import Activations

# --- functions -------------------------------------------------------------------------------------------------------


def rotary(x: Float[Array, "B T N H"], positions: Positions, theta: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding in the rotate-half layout: feature i turns with feature i + H/2 by positions * theta^(-2i/H).

    Angles are float32; sine and cosine are cast to the type of `x` (as transformers does, papers: 2B4T model graph).
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attention(q: Queries, k: Keys, v: Values, positions: Positions) -> Float[Array, "B T N H"]:
    """Causal softmax(q k^T / sqrt(H)) v, each query seeing the keys at index 0 to its position; softmax in float32.

    Args:
        q: queries [B, T, N, H].
        k: keys [B, S, K, H]; key j stands at position j. N / K queries share one key head.
        v: values [B, S, K, H].
        positions: position of each query [B, T].
    """
    batch, time, heads, size = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    q = q.reshape(batch, time, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * (1.0 / math.sqrt(size))
    visible = jnp.arange(keys, dtype=jnp.int32)[None, None, :] <= positions[:, :, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), -1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)
    return out.reshape(batch, time, heads, size)


def gate(kind: FeedForwardKind, x: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """The feed-forward's nonlinearity: silu (b1.58), relu squared (2B4T) or gelu (b1, whose papers do not say which)."""
    if kind is FeedForwardKind.SWIGLU:
        return jax.nn.silu(x)
    if kind is FeedForwardKind.RELU2:
        return jnp.square(jax.nn.relu(x))  # overflows float16, which is why DType has none
    return jax.nn.gelu(x)


# --- modules ---------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """The norm times a learned gain `scale` [D], float32, initially one. Before a linear layer it may quantise too: see `normalized`."""

    config: ModelConfig
    native: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], up: Float[Array, "... D"] | None = None) -> Float[Array, "... D"] | Activations:
        gain = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return normalized(x, gain, self.config, self.native, up)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. With a cache, the new keys and values are written into it first."""

    config: ModelConfig
    implementation: str | None = None
    native: bool = False
    gather: Gather = Gather.LATENT

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"] | Activations,
        positions: Positions,
        cache: tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]] | None,
        layer: Int32[Array, ""],
        strength: Float32[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]] | None]:
        config = self.config
        batch, time, _ = x.shape

        counts = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}

        def linear(name: str, features: int) -> BitLinear:
            return BitLinear(features, config, self.implementation, self.native, self.gather, name=name)

        linears = [linear(name, count * config.head_dim) for name, count in counts.items()]
        q, k, v = (y.reshape(batch, time, -1, config.head_dim) for y in products(x, linears, strength))
        q, k = rotary(q, positions, config.rope_theta), rotary(k, positions, config.rope_theta)
        if cache is None:
            out = attention(q, k, v, positions)
        else:
            cache = (_write(cache[0], k, layer, positions[:, 0]), _write(cache[1], v, layer, positions[:, 0]))
            out = _cached_attention(q, cache, layer, positions, self.native)
        out = out.reshape(batch, time, -1)
        if config.norm is NormPlacement.SUB:
            out = Norm(config, self.native, name="sub_norm")(out)
        return linear("o", config.hidden_size)(out, strength), cache


def _cached_attention(
    q: Queries,
    cache: tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]],
    layer: Int32[Array, ""],
    positions: Positions,
    native: bool,
) -> Float[Array, "B T N H"]:
    if native:
        return cpu.attention(q, *cache, layer, positions)
    k, v = (jax.lax.dynamic_index_in_dim(part, layer, 0, keepdims=False).astype(q.dtype) for part in cache)
    return attention(q, k, v, positions)


def _write(
    cache: Float[Array, "L B S K H"], new: Float[Array, "B T K H"], layer: Int32[Array, ""], start: Int32[Array, "B"]
) -> Float[Array, "L B S K H"]:
    """`new` written over positions start, start + 1, … of each row of one layer: in place where the cache is donated or carried."""

    def row(cache, new, start):  # [L, S, K, H], [T, K, H], []
        return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), (layer, start, 0, 0))

    return jax.vmap(row, (1, 0, 0), 1)(cache, new, start)


class FeedForward(nn.Module):
    """down(gate(x) * up(x)), or down(gelu(up(x))) where the kind is not gated."""

    config: ModelConfig
    implementation: str | None = None
    native: bool = False
    gather: Gather = Gather.LATENT

    @nn.compact
    def __call__(self, x: Float[Array, "... D"] | Activations, strength: Float32[Array, ""] | None = None) -> Float[Array, "... D"]:
        config = self.config

        def linear(name: str, features: int) -> BitLinear:
            return BitLinear(features, config, self.implementation, self.native, self.gather, name=name)

        gated = config.ffn is not FeedForwardKind.GELU
        ups = products(x, [linear(name, config.ffn_size) for name in (("up", "gate") if gated else ("up",))], strength)
        if config.norm is NormPlacement.SUB and config.ffn is FeedForwardKind.RELU2:
            inner = Norm(config, self.native, name="sub_norm")(ups[1], ups[0])
        else:
            inner = gate(config.ffn, ups[-1]) * ups[0] if gated else gate(config.ffn, ups[0])
            if config.norm is NormPlacement.SUB:
                inner = Norm(config, self.native, name="sub_norm")(inner)
        return linear("down", config.hidden_size)(inner, strength)


class Embedding(nn.Module):
    """The table of token embeddings `embedding` [V, D], float32; the head as well where embeddings are tied."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self.param("embedding", nn.initializers.normal(self.config.init_std or 0.02), shape, jnp.float32)


class Head(nn.Module):
    """The matrix `kernel` [D, V] of an untied output head, float32, never quantised."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        shape = (self.config.hidden_size, self.config.vocab_size)
        return self.param("kernel", nn.initializers.normal(self.config.init_std or 1.0 / math.sqrt(shape[0])), shape, jnp.float32)
