"""The proof holds for what `pack` makes, and fails, naming the place, for anything else."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import params as trees
from bitnet_jax.config import ActivationQuantizer, DType, Linear, NormPlacement, QuantConfig, WeightQuantizer
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.inference import check_parity
from bitnet_jax.transformer import Transformer
from kernels_pallas import Encoding
from tests.shapes import tiny

CONFIG = tiny(init_std=0.3)
PROMPTS = [[5, 6, 7], [8]]
WEIGHTS = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 2 + 48 * 32)
COLUMNS = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)


@functools.cache
def latent(config=CONFIG):
    return jax.jit(lambda: Transformer(config).init(jax.random.key(4), jnp.zeros((1, 2), jnp.int32))["params"])()


def check(packed, config=CONFIG, max_new_tokens=0, implementation=None):
    return check_parity(latent(config), packed, config, PROMPTS, max_new_tokens=max_new_tokens, implementation=implementation)


def changed(packed, layer, **changes):
    """The packed tree with changes to the scanned `down` kernel in the given layer."""
    kernel = packed["blocks"]["ffn"]["down"]["kernel"]
    fields = {}
    for name, change in changes.items():
        value = np.array(getattr(kernel, name))
        value[layer] = change(value[layer])
        fields[name] = value
    ffn = {**packed["blocks"]["ffn"], "down": {"kernel": replace(kernel, **fields)}}
    return {**packed, "blocks": {**packed["blocks"], "ffn": ffn}}


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_a_packed_model_is_the_latent_one(implementation):
    found = check(trees.pack(latent(), CONFIG), max_new_tokens=5, implementation=implementation)
    found.require()
    assert found.proven
    assert (found.layers, found.weights, found.scales) == (14, WEIGHTS, 14)
    assert found.accumulators == COLUMNS * 4  # four prompt tokens; padding is not counted
    assert found.tokens == 10
    assert found.largest_difference < 1e-5  # XLA may contract what follows a product of its own; the native one is rounded
    assert found.largest_difference == 0 or implementation is None
    assert found.where is None


@pytest.mark.parametrize(
    "config",
    [
        tiny(norm=NormPlacement.INSIDE, dtype=DType.BFLOAT16, num_layers=1),
        tiny(quant=QuantConfig(weight_group=16), num_layers=1),
        tiny(quant=QuantConfig(weight_shards=2), num_layers=1),
        tiny(quant=QuantConfig(weight=WeightQuantizer.ZERO_ONE), num_layers=1),
        tiny(quant=QuantConfig(activation=ActivationQuantizer.NONE), norm=NormPlacement.NONE, num_layers=1),
    ],
    ids=["inside_bfloat16", "grouped", "shards", "zero_one", "weight_only"],
)
def test_the_proof_covers_every_kind_of_model(config):
    found = check(trees.pack(latent(config), config, Encoding.BASE3), config)
    assert (found.weights_differ, found.scales_differ, found.accumulators_differ) == (0, 0, 0)
    assert found.weights == WEIGHTS // 2
    assert (found.accumulators > 0) == (config.quant.activation is not ActivationQuantizer.NONE)


def test_packed_shards_make_the_tokens_of_the_latent_ones():
    config = replace(CONFIG, quant=QuantConfig(weight_shards=2))
    found = check(trees.pack(latent(config), config), config, max_new_tokens=5)
    found.require()
    assert found.tokens == 10
    assert found.accumulators == COLUMNS * 4
    assert found.scales == COLUMNS + 2 * (32 + 32)  # one a column, and one more where the inputs are cut


def test_one_wrong_weight_is_found():
    def flip(codes):
        code = codes[0, 0] >> 6  # of column 0, input 0
        codes[0, 0] ^= (code ^ (0 if code else 2)) << 6
        return codes

    found = check(changed(trees.pack(latent(), CONFIG), 1, codes=flip))
    assert not found.proven
    assert (found.weights_differ, found.scales_differ) == (1, 0)
    assert 0 < found.accumulators_differ <= 4
    assert found.where == "block_1/ffn/down"
    with pytest.raises(RunError, match=rf"1 of {WEIGHTS} weights, \d+ of .* integer sums.* differ, first in block_1/ffn/down"):
        found.require()


def test_one_wrong_scale_is_found():
    found = check(changed(trees.pack(latent(), CONFIG), 0, scale=lambda scale: np.nextafter(scale, np.float32(9))))
    assert (found.weights_differ, found.scales_differ, found.accumulators_differ) == (0, 1, 0)
    assert found.where == "block_0/ffn/down"
    assert found.largest_difference > 0
    assert not found.proven


def test_trees_that_do_not_belong_together_are_named():
    packed = trees.pack(latent(), CONFIG)
    other = {**packed, "final_norm": {"scale": packed["final_norm"]["scale"] * 2}}
    for wrong, message in (
        (latent(), "block_0/attn/k/kernel of the packed parameters must be packed"),
        (other, "final_norm/scale differs in the packed parameters"),
        ({name: packed[name] for name in ("embed", "blocks")}, "final_norm/scale is missing in the packed parameters"),
        ({**packed, "head": {"kernel": np.zeros((32, 61))}}, "head/kernel is missing in the latent parameters"),
    ):
        with pytest.raises(UserError, match=message):
            check(wrong)
    with pytest.raises(UserError, match="of the latent parameters is packed"):
        check_parity(packed, packed, CONFIG, PROMPTS, max_new_tokens=5)
    with pytest.raises(UserError, match="linear=full with weight quantiser absmean has no ternary weights"):
        check_parity(packed, packed, replace(CONFIG, linear=Linear.FULL), PROMPTS, max_new_tokens=5)
