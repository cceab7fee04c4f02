"""Invariants of the model: causality, scan == loop, remat == none, cache == full pass, packed == latent, twins differ in one field."""

from dataclasses import replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cpu
from bitnet_jax import params as trees
from bitnet_jax.config import (
    ActivationQuantizer,
    Arithmetic,
    DType,
    FeedForward,
    Layers,
    Linear,
    NormKind,
    NormPlacement,
    QuantConfig,
    Remat,
    WeightQuantizer,
)
from bitnet_jax.errors import UserError
from bitnet_jax.transformer import KVCache, Output, Transformer
from kernels_pallas import Encoding
from tests.shapes import tiny

VARIANTS = {
    "bitnet": tiny(),
    "twin": tiny(linear=Linear.FULL),
    "inside": tiny(norm=NormPlacement.INSIDE),
    "no_norm": tiny(norm=NormPlacement.NONE, quant=QuantConfig(activation=ActivationQuantizer.NONE)),
    "2b4t": tiny(ffn=FeedForward.RELU2, rope_theta=500_000.0, dtype=DType.BFLOAT16),
    "b1": tiny(
        ffn=FeedForward.GELU,
        norm=NormPlacement.INSIDE,
        norm_kind=NormKind.LAYER,
        quant=QuantConfig(weight=WeightQuantizer.SIGN),
        tie_embeddings=False,
    ),
    "shards": tiny(quant=QuantConfig(weight_shards=2), ffn=FeedForward.RELU2),
    "grouped_fake": tiny(quant=QuantConfig(weight_group=16, arithmetic=Arithmetic.FAKE), num_kv_heads=4),
}
TOLERANCE = {DType.FLOAT32: {"rtol": 1e-4, "atol": 1e-4}, DType.BFLOAT16: {"rtol": 0.1, "atol": 0.1}}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def tokens(batch=2, time=12, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, time), 0, 61, jnp.int32)


def forward(config, params, *args):
    return Transformer(config, implementation="xla").apply({"params": params}, *args)


# Every operation rounds to its type, so that a comparison in bfloat16 does not depend on what the compiler fuses.
apply = jax.jit(forward, static_argnums=0, compiler_options={"xla_allow_excess_precision": False})


@partial(jax.jit, static_argnums=0)
def init(config):
    return Transformer(config).init(jax.random.key(1), tokens())["params"]


def logits(config, params, *args):
    return apply(config, params, *args).logits


@pytest.mark.parametrize("changes", [{}, {"layers": Layers.LOOP, "remat": Remat.FULL}], ids=str)
def test_quantised_in_part_is_the_twin_at_nothing_and_the_fake_product_in_full(changes):
    config = tiny(quant=QuantConfig(arithmetic=Arithmetic.FAKE), **changes)
    params = init(config)

    @partial(jax.jit, static_argnums=0, compiler_options={"xla_allow_excess_precision": False})
    def part(config, strength):
        return Transformer(config).apply({"params": params}, tokens(), strength=strength).logits

    none, full, twin = part(config, jnp.float32(0.0)), part(config, jnp.float32(1.0)), logits(config.twin, params, tokens())
    np.testing.assert_allclose(none, twin, **TOLERANCE[DType.FLOAT32])
    np.testing.assert_allclose(full, logits(config, params, tokens()), **TOLERANCE[DType.FLOAT32])
    np.testing.assert_allclose(part(config.twin, jnp.float32(0.5)), twin, **TOLERANCE[DType.FLOAT32])
    assert np.abs(full - none).max() > 0.01


def test_packed_weights_cannot_be_quantised_in_part():
    config = tiny()
    with pytest.raises(UserError, match="only latent weights can be quantised in part"):
        Transformer(config).apply({"params": trees.pack(init(config), config)}, tokens(), strength=jnp.float32(0.5))


@variants
def test_later_tokens_have_no_gradient(config):
    """Causality: the logits at position t feel the embeddings of tokens 0 to t, and not those after."""
    params = init(config)
    distinct = jnp.arange(12, dtype=jnp.int32)[None]  # so that a row of the embedding is one position
    config = replace(config, tie_embeddings=False, dtype=DType.FLOAT32)
    params = {**params, "head": {"kernel": jax.random.normal(jax.random.key(2), (32, 61))}}

    @jax.jit
    @jax.grad
    def sensitivity(embedding, t):
        return forward(config, {**params, "embed": {"embedding": embedding}}, distinct).logits[0, t].sum()

    for t in (0, 5, 11):
        felt = np.abs(sensitivity(params["embed"]["embedding"], t)).sum(-1)[:12]
        assert (felt[: t + 1] > 0).all()
        assert (felt[t + 1 :] == 0).all()


@variants
def test_scan_equals_loop(config):
    params = init(config)
    loop = replace(config, layers=Layers.LOOP)
    assert jax.tree.structure(trees.unstack(params)) == jax.tree.structure(init(loop))
    np.testing.assert_allclose(
        logits(config, params, tokens()).astype(jnp.float32),
        logits(loop, trees.unstack(params), tokens()).astype(jnp.float32),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("remat", [Remat.FULL, Remat.DOTS])
def test_remat_changes_memory_and_nothing_else(remat):
    config = tiny()
    params = init(config)

    def gradients(config):
        return jax.jit(jax.grad(lambda p: forward(config, p, tokens()).logits.sum()))

    for plain, again in zip(
        jax.tree.leaves(gradients(config)(params)), jax.tree.leaves(gradients(replace(config, remat=remat))(params)), strict=True
    ):
        np.testing.assert_allclose(plain, again, rtol=1e-4, atol=1e-5)
    names = [str(jax.make_jaxpr(gradients(c))(params)).count("remat") for c in (config, replace(config, remat=remat))]
    assert names[0] == 0
    assert names[1] > 0


@variants
def test_prefill_and_decode_equal_the_full_pass(config):
    config = replace(config, dtype=DType.FLOAT32)
    params, ids = init(config), tokens()
    full = logits(config, params, ids)
    output = apply(config, params, ids[:, :7], KVCache.empty(config, 2, 16))
    np.testing.assert_allclose(output.logits, full[:, :7], rtol=1e-4, atol=1e-4)
    for t in range(7, 12):
        output = apply(config, params, ids[:, t : t + 1], output.cache)
        np.testing.assert_allclose(output.logits[:, 0], full[:, t], rtol=1e-4, atol=1e-4)
    assert output.cache.length.tolist() == [12, 12]


def test_a_padded_prompt_continues_as_if_alone():
    config = tiny()
    params, ids = init(config), tokens()
    lengths = jnp.array([4, 7], jnp.int32)
    output = apply(config, params, ids[:, :7], KVCache.empty(config, 2, 16), lengths - 1)
    assert output.logits.shape == (2, 1, 61)
    cache = replace(output.cache, length=lengths)
    step = apply(config, params, ids[:, 7:8], cache)
    for row, length in enumerate((4, 7)):
        alone = jnp.concatenate([ids[row, :length], ids[row, 7:8]])[None]
        expected = logits(config, params, alone)[0]
        np.testing.assert_allclose(output.logits[row, 0], expected[length - 1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(step.logits[row, 0], expected[length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("name", ["bitnet", "inside", "2b4t", "b1"])
def test_packed_weights_give_the_latent_model(name, encoding):
    """Same integers, hence the same logits bit for bit; weight-only and grouped models sum in another order and are close instead."""
    config = VARIANTS[name]
    params = init(config)
    packed = trees.pack(params, config, encoding)
    optimized = jax.jit(
        forward, static_argnums=0, compiler_options={"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    )
    for run in (apply, optimized):
        assert np.array_equal(run(config, params, tokens()).logits, run(config, packed, tokens()).logits)


@pytest.mark.skipif(cpu.build.unavailable() is not None, reason=f"{cpu.build.unavailable()}")
@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("name", ["bitnet", "inside", "2b4t", "b1"])
def test_packed_weights_give_the_latent_model_over_a_cache_beside_the_native_library(name, encoding):
    """As the test above, with the compiler free to keep excess precision: it has none to keep where the library rounds."""
    config = VARIANTS[name]
    params = init(config)
    cache = KVCache.empty(config, 2, 12)
    run = jax.jit(lambda params, cache: Transformer(config).apply({"params": params}, tokens(), cache))
    latent, packed = run(params, cache), run(trees.pack(params, config, encoding), cache)
    assert "bitnet_attention" in run.lower(params, cache).as_text()
    assert np.array_equal(latent.logits, packed.logits)
    np.testing.assert_allclose(latent.logits, logits(config, params, tokens()), **TOLERANCE[config.dtype])


@pytest.mark.parametrize("name", ["no_norm", "grouped_fake"])
def test_packed_weights_are_close_where_sums_are_ordered_otherwise(name):
    config = VARIANTS[name]
    params = init(config)
    np.testing.assert_allclose(logits(config, params, tokens()), logits(config, trees.pack(params, config), tokens()), rtol=1e-4, atol=1e-4)


def test_the_named_implementation_is_used():
    config = tiny()
    packed = trees.pack(init(config), config)
    outputs = [Transformer(config, implementation=name).apply({"params": packed}, tokens()).logits for name in ("reference", "xla")]
    np.testing.assert_allclose(*outputs, rtol=1e-6)
    with pytest.raises(ValueError, match="no_such_kernel"):
        Transformer(config, implementation="no_such_kernel").apply({"params": packed}, tokens())


def test_twins_start_equal_and_differ_in_one_field():
    config = tiny()
    assert replace(config.twin, linear=Linear.BIT) == config
    assert jax.tree.all(jax.tree.map(np.array_equal, init(config), init(config.twin)))
    assert not np.allclose(logits(config, init(config), tokens()), logits(config.twin, init(config), tokens()))


@pytest.mark.parametrize("name", ["bitnet", "2b4t", "b1"])
def test_gradients_reach_every_parameter(name):
    config = VARIANTS[name]
    gradients = jax.jit(jax.grad(lambda p: jnp.square(forward(config, p, tokens()).logits).astype(jnp.float32).mean()))(init(config))
    for path, leaf in trees.leaves(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_tokens_that_do_not_fit_into_the_cache_are_named():
    config = tiny()
    params, cache = init(config), KVCache.empty(config, 2, 8)
    with pytest.raises(UserError, match="12 tokens behind 0 must fit into the cache's capacity=8"):
        apply(config, params, tokens(), cache)
    with pytest.raises(UserError, match="3 tokens behind 6 must fit into the cache's capacity=8"):
        forward(config, params, tokens()[:, :3], replace(cache, length=jnp.array([6, 2], jnp.int32)))


def test_an_implementation_for_latent_weights_is_refused():
    config = tiny()
    with pytest.raises(UserError, match=r"implementation='reference' is for packed weights: not all of .*attn/q/kernel.* are packed"):
        Transformer(config, implementation="reference").apply({"params": init(config)}, tokens())
    named = cast(Output, Transformer(config, implementation="xla").apply({"params": init(config)}, tokens()))
    np.testing.assert_allclose(named.logits, logits(config, init(config), tokens()), rtol=1e-4, atol=1e-4)  # they are XLA's anyway


def test_logits_type_is_as_configured():
    config = tiny(dtype=DType.BFLOAT16)
    assert logits(config, init(config), tokens()).dtype == jnp.float32
    half = replace(config, logits_dtype=DType.BFLOAT16)
    assert logits(half, init(half), tokens()).dtype == jnp.bfloat16


def test_a_wrong_shape_is_named():
    config = tiny()
    wide = replace(config, ffn_size=64)
    with pytest.raises(UserError, match=r"blocks/ffn/up/kernel has shape \(32, 48\): must be \(32, 64\)"):
        logits(wide, init(config), tokens())


def test_a_packed_model_cannot_run_as_its_twin():
    config = tiny()
    with pytest.raises(UserError, match="linear=full has no ternary weights"):
        logits(config.twin, trees.pack(init(config), config), tokens())


def test_parameter_paths_are_the_public_contract():
    config = tiny(tie_embeddings=False)
    shapes = {"/".join(path): leaf.shape for path, leaf in trees.leaves(jax.eval_shape(lambda: init(config)))}
    assert shapes == {
        "embed/embedding": (61, 32),
        "final_norm/scale": (32,),
        "head/kernel": (32, 61),
        "blocks/attn_norm/scale": (2, 32),
        "blocks/attn/q/kernel": (2, 32, 32),
        "blocks/attn/k/kernel": (2, 32, 16),
        "blocks/attn/v/kernel": (2, 32, 16),
        "blocks/attn/sub_norm/scale": (2, 32),
        "blocks/attn/o/kernel": (2, 32, 32),
        "blocks/ffn_norm/scale": (2, 32),
        "blocks/ffn/gate/kernel": (2, 32, 48),
        "blocks/ffn/up/kernel": (2, 32, 48),
        "blocks/ffn/sub_norm/scale": (2, 48),
        "blocks/ffn/down/kernel": (2, 48, 32),
    }
