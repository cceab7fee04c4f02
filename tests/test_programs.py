"""A program compiles once for each set of shapes, and says how long that took."""

import jax.numpy as jnp
import numpy as np

from bitnet_jax.programs import Program


def test_each_set_of_shapes_and_types_is_compiled_once():
    traced = []

    def double(x):
        traced.append(x.shape)
        return x + x

    program = Program(double)
    for x in (jnp.ones(2), jnp.zeros(2), np.ones(2, np.float32), jnp.ones(3), jnp.ones(2, jnp.int32), jnp.full(2, 7.0, jnp.float32)):
        compiled, seconds = program.prepare(x)
        assert np.array_equal(compiled(x), 2 * x)
        assert seconds >= 0
        assert program.prepare(x)[0] is compiled
    assert traced == [(2,), (3,), (2,)]  # one size, another, another type


def test_donated_arguments_are_given_up():
    program = Program(lambda x, y: x + y, donate=(0,))
    x, y = jnp.ones(4), jnp.ones(4)
    compiled, _ = program.prepare(x, y)
    assert compiled(x, y).tolist() == [2.0] * 4
    assert x.is_deleted()
    assert not y.is_deleted()
