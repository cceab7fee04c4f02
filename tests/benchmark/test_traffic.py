"""Bytes of a step are those of the arrays that it reads."""

import jax
import pytest

from bitnet_jax import costs
from bitnet_jax.benchmark.traffic import traffic
from bitnet_jax.config import DType
from bitnet_jax.formats import random_model
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.transformer import KVCache
from kernels_pallas import Encoding, PackedTernary
from tests.shapes import tiny


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_of_the_arrays(encoding, dtype, tied):
    config = tiny(dtype=dtype, tie_embeddings=tied)
    packed = leafwise.packed(random_model.random_packed(config), encoding)
    leaves = jax.tree.leaves(leafwise.load(packed), is_leaf=lambda leaf: isinstance(leaf, PackedTernary))
    linear = sum(leaf.codes.nbytes + leaf.scale.nbytes for leaf in leaves if isinstance(leaf, PackedTernary))
    step = traffic(config, costs.Storage(encoding.value), dtype.value, prompt=10, generate=8)
    assert step.linear == linear
    assert step.head == config.vocab_size * config.hidden_size * (4 if dtype is DType.FLOAT32 else 2)
    assert step.cache == sum(leaf.nbytes for leaf in jax.tree.leaves(KVCache.empty(config, 1, 14)) if leaf.ndim > 2)
    assert step.total == step.linear + step.head + step.cache


def test_an_int8_table_has_two_numbers_a_row_beside_it():
    config = tiny()
    assert traffic(config, costs.Storage.TWO_BIT, "int8", 8, 2).head == 61 * 32 + 2 * 4 * 61
