"""The recipe for people who live in Flax NNX: a Linen BitLinear as an NNX module. NNX is imported here and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bitnet_jax.bitlinear import BitLinear
from tests.shapes import tiny


def test_a_bitlinear_becomes_an_nnx_module():
    x = jax.random.normal(jax.random.key(0), (3, 32))
    layer = nnx.bridge.ToNNX(BitLinear(16, tiny()), rngs=nnx.Rngs(0)).lazy_init(x)
    kernel = nnx.to_pure_dict(nnx.state(layer, nnx.Param))["kernel"]
    assert kernel.shape == (32, 16)
    expected = BitLinear(16, tiny()).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6)
    gradient = nnx.to_pure_dict(nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer))["kernel"]
    assert np.abs(np.asarray(gradient)).max() > 0
