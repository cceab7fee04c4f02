"""Tree surgery: packing is exact, layers stack and unstack, only linear layers of the blocks are touched."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import params as trees
from bitnet_jax import quant
from bitnet_jax.config import Layers, QuantConfig, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.transformer import Transformer
from kernels_pallas import Encoding, PackedTernary
from kernels_pallas import unpack as unpack_codes
from tests.shapes import tiny


def init(config):
    return Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("weight", [WeightQuantizer.ABSMEAN, WeightQuantizer.SIGN, WeightQuantizer.ZERO_ONE])
@pytest.mark.parametrize(("group", "shards"), [(None, 1), (16, 1), (None, 4)])
def test_packed_codes_and_scales_are_those_of_the_quantiser(weight, group, shards, encoding):
    config = tiny(quant=QuantConfig(weight=weight, weight_group=group, weight_shards=shards))
    params = init(config)
    packed = trees.pack(params, config, encoding)
    count = 0
    for (path, latent), (same, leaf) in zip(trees.leaves(params), trees.leaves(packed), strict=True):
        assert path == same
        if not trees.is_bitlinear(path):
            assert leaf is latent
            continue
        count += 1
        assert isinstance(leaf, PackedTernary)
        assert leaf.shape == latent.shape
        for layer in range(config.num_layers):
            codes, scale = quant.quantize_weights(latent[layer], config.quant, -2 if path[-2] in ("o", "down") else -1)
            assert np.array_equal(unpack_codes(leaf)[layer], codes)
            assert np.array_equal(leaf.scale[layer], np.squeeze(scale, (0, 1) if (group, shards) == (None, 1) else 1))
    assert count == 7


def test_unpack_gives_codes_times_scale_of_each_shard():
    config = tiny(quant=QuantConfig(weight_shards=2))
    params = init(config)
    values = trees.unpack(trees.pack(params, config))["blocks"]["attn"]
    for name, axis in (("q", -1), ("o", -2)):
        latent = params["blocks"]["attn"][name]["kernel"]
        assert np.array_equal(values[name]["kernel"], quant.dequantize_weights(quant.quantize_weights(latent, config.quant, axis)))


def test_unpack_gives_codes_times_scale_and_packs_to_the_same_codes():
    config = tiny()
    packed = trees.pack(init(config), config)
    again = trees.pack(trees.unpack(packed), config)
    kernel, same = packed["blocks"]["ffn"]["up"]["kernel"], again["blocks"]["ffn"]["up"]["kernel"]
    assert np.array_equal(kernel.codes, same.codes)
    values = trees.unpack(packed)["blocks"]["ffn"]["up"]["kernel"]
    assert np.array_equal(values, np.asarray(unpack_codes(kernel)) * np.asarray(kernel.scale)[:, None, None])


@pytest.mark.parametrize("shards", [1, 2])
def test_codes_are_those_that_pack_writes(shards):
    config = tiny(quant=QuantConfig(weight_shards=shards))
    params = jax.tree.map(lambda leaf: leaf * jnp.linspace(0.5, 2.0, leaf.shape[-1]).reshape([1] * (leaf.ndim - 1) + [-1]), init(config))
    for name in ("q", "o"):
        assert np.array_equal(
            trees.codes(params, config)["blocks"]["attn"][name]["kernel"],
            unpack_codes(trees.pack(params, config)["blocks"]["attn"][name]["kernel"]),
        )
    assert trees.codes(params, config.twin) == {}


def test_stack_is_the_inverse_of_unstack():
    config = tiny()
    for params in (init(config), trees.pack(init(config), config)):
        again = trees.stack(trees.unstack(params))
        assert jax.tree.structure(again) == jax.tree.structure(params)
        assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_a_loop_model_packs_layer_by_layer():
    config = tiny()
    params = init(config)
    loop = trees.pack(trees.unstack(params), replace(config, layers=Layers.LOOP))
    scan = trees.unstack(trees.pack(params, config))
    assert jax.tree.all(jax.tree.map(np.array_equal, loop, scan))


def test_what_cannot_be_packed_says_why():
    config = tiny()
    params = init(config)
    with pytest.raises(UserError, match="linear=full"):
        trees.pack(params, config.twin)
    with pytest.raises(UserError, match="blocks/attn/k/kernel is packed already"):
        trees.pack(trees.pack(params, config), config)
    params["blocks"]["attn"]["q"]["kernel"] = params["blocks"]["attn"]["q"]["kernel"].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(UserError, match="blocks/attn/q/kernel holds NaN"):
        trees.pack(params, config)


def test_stacking_what_is_not_a_stack_is_named():
    with pytest.raises(UserError, match="block_0"):
        trees.stack({"embed": {}})
    with pytest.raises(UserError, match="blocks"):
        trees.unstack({"embed": {}})
