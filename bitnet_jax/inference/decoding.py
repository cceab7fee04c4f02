"""Prefill and decode: the two programs of a generation, with the KV cache handed from one to the next.

    prefill   prompts into an empty cache, and the first new token
    decode    a `lax.while_loop` that makes tokens until `limit`, or until every row has met a stop token

`limit` is an argument of the compiled program: a whole generation is one call of `decode`, a streamed one is a call for every token.
Both run the same machine code, which is why they make the same tokens.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt32

from bitnet_jax import cpu
from bitnet_jax.array_types import Array, Float32, Int32, Lengths, Tokens
from bitnet_jax.config import DType, ModelConfig
from bitnet_jax.cpu import RoughTable
from bitnet_jax.inference.sampling import Controls, sample
from bitnet_jax.programs import Program
from bitnet_jax.transformer import KVCache, Output, Transformer

MOST = 64
"""Candidates that the exact first pass finds for sampling: more than `top_k` needs in practice."""

WORTHWHILE_TOKENS, WORTHWHILE_VOCABULARY = 64, 16384
"""From so many new tokens and so large a vocabulary on, a first pass saves more than it costs to make."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["seeds", "draws", "controls", "stops", "vocabulary"], meta_fields=[])
@dataclass(frozen=True)
class Plan:
    """What is asked for, as arrays: another seed or temperature runs the same program.

    Attributes:
        seeds: seed of each row [B].
        draws: which sequence of draws of its seed each row has [B], so that rows of one seed differ.
        controls: `Sampling` of each row.
        stops: ids that end a row [n]; -1 is none.
        vocabulary: ids from here on are never chosen.
    """

    seeds: UInt32[Array, "B"]
    draws: UInt32[Array, "B"]
    controls: Controls
    stops: Int32[Array, "n"]
    vocabulary: Int32[Array, ""]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cache", "tokens", "count", "done", "finite", "seen"], meta_fields=[])
@dataclass(frozen=True)
class State:
    """A generation under way; donated by every call that takes it.

    Attributes:
        cache: keys and values of all tokens but the newest.
        tokens: new tokens [B, limit of the generation], 0 where there is none yet and behind a stop token.
        count: new tokens made, the same for every row.
        done: rows that have met a stop token [B].
        finite: whether the logits of all rows under way were finite so far; decode stops where they were not.
        seen: tokens of prompt and text [B, V], where a repetition penalty needs them.
    """

    cache: KVCache
    tokens: Int32[Array, "B limit"]
    count: Int32[Array, ""]
    done: Bool[Array, "B"]
    finite: Bool[Array, ""]
    seen: Bool[Array, "B V"] | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "count", "finite"], meta_fields=[])
@dataclass(frozen=True)
class Progress:
    """What the host looks at: `State`'s fields in buffers of their own, which no later call takes over."""

    tokens: Int32[Array, "B limit"]
    count: Int32[Array, ""]
    finite: Bool[Array, ""]


def prefill(
    model: Transformer,
    params: Any,
    rough: RoughTable | None,
    cache: KVCache,
    tokens: Int32[Array, "B limit"],
    prompts: Tokens,
    lengths: Lengths,
    plan: Plan,
) -> tuple[State, Progress]:
    """Runs the prompts and chooses the first new token of each row.

    Args:
        model: the transformer.
        params: latent or packed.
        rough: first pass of the vocabulary product, see `first_pass`; None computes all logits.
        cache: empty, with room for prompts and new tokens; donated.
        tokens: zeros [B, limit], where new tokens will stand; donated.
        prompts: [B, T], padded on the right.
        lengths: tokens of each prompt [B], at least one.
        plan: what is asked for.
    """
    output = _forward(model, params, prompts, cache, lengths - 1)
    cache = replace(_cache(output), length=lengths)
    batch = prompts.shape[0]
    seen = None
    if plan.controls.repetition_penalty is not None:
        size = model.config.vocab_size
        within = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        row = jnp.arange(batch, dtype=jnp.int32)[:, None]
        seen = jnp.zeros((batch, size), bool).at[row, jnp.where(within, prompts, size)].set(True, mode="drop")
    state = State(cache, tokens, jnp.int32(0), jnp.zeros((batch,), bool), jnp.bool_(True), seen)
    return _report(_append(output, state, plan, params, rough))


def decode(
    model: Transformer, params: Any, rough: RoughTable | None, state: State, plan: Plan, limit: Int32[Array, ""]
) -> tuple[State, Progress]:
    """Makes tokens until there are `limit`, or every row is done. The state is donated."""

    def under_way(state: State) -> jax.Array:
        return (state.count < limit) & ~jnp.all(state.done) & state.finite

    def step(state: State) -> State:
        newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, 1)
        output = _forward(model, params, newest, state.cache)
        return _append(output, replace(state, cache=_cache(output)), plan, params, rough)

    return _report(jax.lax.while_loop(under_way, step, state))


def _forward(model: Transformer, params: Any, tokens: Tokens, cache: KVCache, last: Lengths | None = None) -> Output:
    return cast(Output, model.apply({"params": params}, tokens, cache, last))


def _cache(output: Output) -> KVCache:
    assert output.cache is not None
    return output.cache


def _append(output: Output, state: State, plan: Plan, params: Any, rough: RoughTable | None) -> State:
    """The state with the token that follows from the logits of each row. What of `output` is not used is not computed."""
    keys = jax.vmap(_key, (0, 0, None))(plan.seeds, plan.draws, state.count)

    def from_all() -> tuple[Int32[Array, "B"], Bool[Array, "B"]]:
        scores = output.logits[:, 0].astype(jnp.float32)
        known = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None] < plan.vocabulary
        return sample(jnp.where(known, scores, -jnp.inf), keys, state.seen, plan.controls), jnp.all(jnp.isfinite(scores), -1)

    def from_best(rough: RoughTable, count: int) -> tuple[Int32[Array, "B count"], Float32[Array, "B count"]]:
        x = output.hidden[:, 0]
        return cpu.top_logits(x, params["embed"]["embedding"].astype(x.dtype), rough, count, plan.vocabulary)[:2]

    controls = plan.controls
    if rough is not None and controls.greedy:
        ids, best = from_best(rough, 1)
        chosen, finite = ids[:, 0], jnp.isfinite(best[:, 0])
    elif rough is not None and controls.top_k is not None and controls.repetition_penalty is None:
        ids, best = from_best(rough, MOST)

        def from_these() -> tuple[Int32[Array, "B"], Bool[Array, "B"]]:
            column = sample(best, keys, None, controls, (ids, rough.codes.shape[0]))
            return jnp.take_along_axis(ids, column[:, None], 1)[:, 0], jnp.isfinite(best[:, 0])

        # Tokens as probable as the last one stay in too: they are all here if the last that is here is less probable.
        wanted = jnp.take_along_axis(best, jnp.clip(controls.top_k[:, None] - 1, 0, MOST - 1), 1)[:, 0]
        enough = (controls.top_k < MOST) & (wanted > best[:, -1])
        enough = enough if controls.temperature is None else enough | (controls.temperature == 0)
        chosen, finite = jax.lax.cond(jnp.all(enough), from_these, from_all)
    else:
        chosen, finite = from_all()
    chosen = jnp.where(state.done, 0, chosen)
    return State(
        cache=state.cache,
        tokens=jax.lax.dynamic_update_slice(state.tokens, chosen[:, None], (jnp.int32(0), state.count)),
        count=state.count + 1,
        done=state.done | jnp.any(chosen[:, None] == plan.stops[None], -1),
        finite=state.finite & jnp.all(finite | state.done),
        seen=None if state.seen is None else state.seen.at[jnp.arange(len(chosen), dtype=jnp.int32), chosen].set(True),
    )


def _key(seed: UInt32[Array, ""], draw: UInt32[Array, ""], count: Int32[Array, ""]) -> jax.Array:
    """The random key of new token `count`: of its row alone, whatever else is in the batch."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), draw), count)


def _report(state: State) -> tuple[State, Progress]:
    return state, Progress(state.tokens, state.count, state.finite)


def first_pass(
    params: Any, config: ModelConfig, release: Callable[[], None] = lambda: None, implementation: str | None = None
) -> RoughTable | None:
    """The int8 table that finds the greedy token, or the `top_k`, of a model in half the bytes, exactly (`cpu.top_logits`); made once.

    None where it has no use: where the head is not the table of embeddings, or a very small one, logits are rounded further, or no native
    library runs, which `implementation` may say. `release` is called now and then, to give back the memory that reading a mapped table
    takes.
    """
    if config.vocab_size < MOST or not config.tie_embeddings or config.logits_dtype is not DType.FLOAT32 or not cpu.runs(implementation):
        return None
    table = np.asarray(params["embed"]["embedding"])
    return jax.device_put(cpu.quantize_table(table, dtype=config.dtype.value, release=release))


@functools.cache
def programs(config: ModelConfig, implementation: str | None) -> tuple[Program, Program]:
    """`prefill` and `decode` of a model, compiled for the shapes that they are called with."""
    model = Transformer(config, implementation=implementation)
    return Program(functools.partial(prefill, model), donate=(2, 3)), Program(functools.partial(decode, model), donate=(2,))
