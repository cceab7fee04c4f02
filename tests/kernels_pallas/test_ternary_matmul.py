"""One suite for every implementation of `ternary_matmul`: integers equal the reference's bit for bit, floats within rounding."""

import functools
import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import IMPLEMENTATIONS, Encoding, Implementation, PackedTernary, pack, ternary_matmul, xla

SHAPES = {(1, 1): (1, 17), (129, 130): (1, 17), (300, 7): (1, 2, 3, 17), (2561, 3): (1, 17)}  # (K, N): values of M
run = jax.jit(ternary_matmul, static_argnames=("out_dtype", "implementation"))  # one compilation a shape, shared by the tests
PORTABLE = [name for name in IMPLEMENTATIONS if not name.startswith("mosaic")]  # the others have suites of their own, simulated
each_implementation = pytest.mark.parametrize("implementation", PORTABLE)
each_encoding = pytest.mark.parametrize("encoding", Encoding)


def matrix(k: int, n: int, encoding: Encoding = Encoding.TWO_BIT, group: int | None = None, fill: int | None = None) -> PackedTernary:
    rng = np.random.default_rng(k * n)
    ternary = rng.integers(-1, 2, (k, n)).astype(np.int8) if fill is None else np.full((k, n), fill, np.int8)
    shape = () if group is None else (k // group, n)
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)
    return jax.tree.map(jnp.asarray, pack(ternary, np.asarray(scale), encoding))


def activations(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(-128, 128, shape).astype(np.int8))


def steps(*lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(lead)).uniform(0.01, 1, (*lead, 1)).astype(np.float32))


def truth(x: Any, w: PackedTernary) -> np.ndarray:
    """Exact int64 sums by NumPy, from the packed bytes read one at a time."""
    p, weights = w.encoding.planes, np.zeros((w.k, w.n), np.int64)
    size = 32 if p == 4 else -(-w.k // 5)
    base = 4 if w.encoding is Encoding.TWO_BIT else 3
    codes = np.asarray(w.codes).astype(np.int64)
    for k in range(w.k):
        block, inside = divmod(k, size * p)
        weights[k] = codes[:, size * block + inside % size] // base ** (p - 1 - inside // size) % base - 1
    return np.asarray(x).astype(np.int64) @ weights


def with_unit_scale(w: PackedTernary) -> PackedTernary:
    return PackedTernary(w.codes, jnp.ones((), jnp.float32), k=w.k, encoding=w.encoding)


def sums(x: jax.Array, w: PackedTernary, implementation: str) -> np.ndarray:
    """The int32 sums: with unit scales the result is their float32 value, exact below 2^24."""
    ones = jnp.ones((*x.shape[:-1], 1), jnp.float32)
    out = run(x, with_unit_scale(w), x_scale=ones, out_dtype=jnp.float32, implementation=implementation)
    return np.asarray(out).astype(np.int64)


# --- integers --------------------------------------------------------------------------------------------------------


@each_implementation
@each_encoding
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_exact(shape: tuple[int, int], encoding: Encoding, implementation: str) -> None:
    w = matrix(*shape, encoding)
    for m in SHAPES[shape]:
        x = activations(m, shape[0])
        assert np.array_equal(sums(x, w, implementation), truth(x, w)), f"M={m}"


@each_implementation
@each_encoding
@pytest.mark.parametrize("fill", [-1, 1])
@pytest.mark.parametrize("value", [-128, 127])
def test_sums_are_exact_at_the_extremes(value: int, fill: int, encoding: Encoding, implementation: str) -> None:
    k, n = 2561, 3
    w = matrix(k, n, encoding, fill=fill)
    for m in SHAPES[k, n]:
        x = jnp.full((m, k), value, jnp.int8)
        assert np.array_equal(sums(x, w, implementation), np.full((m, n), k * value * fill)), f"M={m}"


@each_implementation
def test_sums_beyond_sixteen_million_are_rounded_once(implementation: str) -> None:
    k = 131_072 + 257
    w = matrix(k, 2, fill=1)
    x = jnp.full((2, k), 127, jnp.int8)
    assert np.array_equal(sums(x, w, implementation), np.full((2, 2), np.float32(127 * k), np.float64).astype(np.int64))


@pytest.mark.parametrize("n", [65, 128, 191])
def test_blocks_of_rows_give_what_whole_matrices_give(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of 64 rows. No other test has these shapes, so that nothing compiled is reused on either side.
    monkeypatch.setattr(xla, "_BLOCK_CODES", 1)
    w, x = matrix(100, n), activations(5, 100)
    assert np.array_equal(sums(x, w, "xla"), truth(x, w))
    grouped = matrix(100, n, group=50)
    x, x_scale = activations(3, 100), steps(3)
    expected = run(x, grouped, x_scale=x_scale, out_dtype=jnp.float32, implementation="reference")
    out = run(x, grouped, x_scale=x_scale, out_dtype=jnp.float32, implementation="xla")
    np.testing.assert_allclose(np.asarray(out), np.asarray(expected), rtol=1e-6, atol=1e-4)


@each_encoding
def test_the_product_for_other_platforms_is_exact_too(encoding: Encoding) -> None:
    # Only its CPU twin runs here through the public function.
    w, x = matrix(300, 7, encoding), activations(3, 300)
    out = jax.jit(lambda a, b: xla._product(b)(xla._planes_of_rows(a, b), b.codes))(x, w)
    assert np.array_equal(np.asarray(out), truth(x, w))


@pytest.mark.parametrize("group", [None, 50])
def test_other_platforms_get_a_program(group: int | None) -> None:
    w = matrix(300, 7, group=group)

    def call(x: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        packed = PackedTernary(codes, scale, k=w.k, encoding=w.encoding)
        return ternary_matmul(x, packed, x_scale=x_scale, out_dtype=jnp.bfloat16, implementation="xla")

    exported = jax.export.export(jax.jit(call), platforms=["cuda", "tpu"])(activations(1, 300), steps(1), w.codes, w.scale)
    assert exported.platforms == ("cuda", "tpu")


# --- scales ----------------------------------------------------------------------------------------------------------


@each_implementation
@each_encoding
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_the_scaled_result_equals_the_equation_bit_for_bit(out_dtype: Any, encoding: Encoding, implementation: str) -> None:
    w = matrix(300, 7, encoding)
    for m in (1, 17):
        x, x_scale = activations(m, 300), steps(m)
        out = run(x, w, x_scale=x_scale, out_dtype=out_dtype, implementation=implementation)
        expected = truth(x, w).astype(np.float32) * (np.asarray(x_scale) * np.asarray(w.scale))
        assert out.dtype == out_dtype
        assert np.array_equal(np.asarray(out), np.asarray(jnp.asarray(expected).astype(out_dtype))), f"M={m}"


@each_implementation
@each_encoding
@pytest.mark.parametrize(("k", "group"), [(300, 50), (300, 1), (130, 130)])
def test_groups_are_summed_exactly_and_then_scaled(k: int, group: int, encoding: Encoding, implementation: str) -> None:
    w = matrix(k, 5, encoding, group)
    scale = np.asarray(w.scale).astype(np.float64)
    x, x_scale = activations(3, k), steps(3)
    out = run(x, w, x_scale=x_scale, out_dtype=jnp.float32, implementation=implementation)
    expected, size = np.zeros((3, 5)), np.zeros((3, 5))
    for g in range(k // group):
        inside = (np.arange(k) // group == g).astype(np.int64)
        part = truth(np.asarray(x).astype(np.int64) * inside, w)
        expected, size = expected + part * scale[g], size + np.abs(part) * scale[g]
    expected, size = expected * np.asarray(x_scale), size * np.asarray(x_scale)
    # Each of k / group float32 additions rounds by at most 2^-24 of the sum of magnitudes; one product and one scale more.
    assert np.all(np.abs(np.asarray(out) - expected) <= (k // group + 3) * 2.0**-24 * size)


# --- floating-point activations --------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("group", [None, 50])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_weight_only_products_are_right_within_rounding(dtype: Any, group: int | None, implementation: str) -> None:
    w = matrix(300, 7, group=group)
    step = np.broadcast_to(np.asarray(w.scale), (1, 7)) if group is None else np.asarray(w.scale)
    weights = truth(np.eye(300), w) * np.repeat(step, 300 // step.shape[0], axis=0).astype(np.float64)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 300)).astype(np.float32)).astype(dtype)
    exact = np.asarray(x).astype(np.float64)
    out = run(x, w, out_dtype=jnp.float32, implementation=implementation)
    # float32 sums of K terms: K roundings of 2^-24 of the sum of magnitudes bound the error in any order.
    assert np.all(np.abs(np.asarray(out) - exact @ weights) <= 302 * 2.0**-24 * (np.abs(exact) @ np.abs(weights)))


@each_implementation
@pytest.mark.parametrize("group", [None, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2.0**-7)])
def test_gradient_of_x_is_that_of_the_reference(dtype: Any, tolerance: float, group: int | None, implementation: str) -> None:
    w = matrix(300, 7, group=group)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 300)).astype(np.float32)).astype(dtype)
    g = jnp.asarray(rng.standard_normal((2, 3, 7)).astype(np.float32))
    out, vjp = jax.vjp(lambda a: run(a, w, out_dtype=jnp.float32, implementation=implementation), x)
    # The plain function of the reference, differentiated by JAX itself.
    plain = jax.jit(lambda a: IMPLEMENTATIONS["reference"].function(a.reshape(6, 300), w, None, jnp.float32).reshape(2, 3, 7))
    expected_out, expected_vjp = jax.vjp(plain, x)
    (dx,), (expected,) = vjp(g), expected_vjp(g)
    assert dx.dtype == dtype
    assert dx.shape == x.shape
    np.testing.assert_allclose(np.asarray(out), np.asarray(expected_out), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.asarray(dx).astype(np.float32), np.asarray(expected).astype(np.float32), rtol=tolerance, atol=tolerance)


def test_gradient_passes_jit_scan_remat_and_vmap() -> None:
    layers, k = 2, 40
    ternary = np.random.default_rng(0).integers(-1, 2, (layers, k, k)).astype(np.int8)
    packed = jax.tree.map(jnp.asarray, pack(ternary, np.full((layers,), 0.25, np.float32)))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, k)).astype(np.float32))

    def scanned(row: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda carry, w: (jnp.tanh(ternary_matmul(carry, w, out_dtype=jnp.float32)), None))
        return jax.lax.scan(body, row, packed)[0].sum()

    def plain(row: jax.Array) -> jax.Array:
        for weights in ternary.astype(np.float32) * np.float32(0.25):
            row = jnp.tanh(row @ weights)
        return row.sum()

    gradient = jax.jit(jax.vmap(jax.grad(scanned)))(x)
    np.testing.assert_allclose(np.asarray(gradient), np.asarray(jax.vmap(jax.grad(plain))(x)), rtol=1e-4, atol=1e-5)


@each_implementation
def test_gradients_that_do_not_exist_are_refused(implementation: str) -> None:
    w, x, x_scale = matrix(40, 3), activations(2, 40), steps(2)
    call = functools.partial(ternary_matmul, out_dtype=jnp.float32, implementation=implementation)
    with pytest.raises(NotImplementedError, match="no gradient through int8 activations"):
        jax.grad(lambda s: call(x, w, x_scale=s).sum())(x_scale)
    with pytest.raises(NotImplementedError, match=r"no gradient with respect to w\.scale"):
        jax.grad(lambda s: call(x.astype(jnp.float32), PackedTernary(w.codes, s, k=w.k, encoding=w.encoding)).sum())(w.scale)


# --- transformations and shapes --------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("m", [1, 17])
def test_jit_gives_what_a_plain_call_gives(m: int, implementation: str) -> None:
    w, x, x_scale = matrix(300, 7), activations(m, 300), steps(m)
    arguments: dict[str, Any] = {"x_scale": x_scale, "out_dtype": jnp.bfloat16, "implementation": implementation}
    assert np.array_equal(np.asarray(run(x, w, **arguments)), np.asarray(ternary_matmul(x, w, **arguments)))


@each_implementation
@pytest.mark.parametrize("group", [None, 50])
def test_vmap_over_rows_and_over_matrices(group: int | None, implementation: str) -> None:
    x, x_scale = activations(3, 2, 300), steps(3, 2)
    w = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[matrix(300, 7, group=group, fill=fill) for fill in (-1, 0, 1)])

    def call(a: jax.Array, s: jax.Array, b: PackedTernary) -> jax.Array:
        return run(a, b, x_scale=s, out_dtype=jnp.float32, implementation=implementation)

    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], w) for i in range(3)]
    both = np.asarray(jax.jit(jax.vmap(call))(x, x_scale, w))
    rows = np.asarray(jax.jit(jax.vmap(call, in_axes=(0, 0, None)))(x, x_scale, layers[2]))
    for i in range(3):
        np.testing.assert_allclose(both[i], np.asarray(call(x[i], x_scale[i], layers[i])), rtol=1e-6)
        np.testing.assert_allclose(rows[i], np.asarray(call(x[i], x_scale[i], layers[2])), rtol=1e-6)


@each_implementation
def test_shard_map_over_outputs(implementation: str) -> None:
    w, x, x_scale = matrix(300, 8), activations(2, 300), steps(2)
    spec = jax.sharding.PartitionSpec
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((len(devices),), ("n",), (jax.sharding.AxisType.Auto,), devices=devices)

    def call(a: jax.Array, s: jax.Array, b: PackedTernary) -> jax.Array:
        return ternary_matmul(a, b, x_scale=s, out_dtype=jnp.float32, implementation=implementation)

    specs = PackedTernary(spec("n"), spec(), k=w.k, encoding=w.encoding)  # pyright: ignore[reportArgumentType]
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(spec(), spec(), specs), out_specs=spec(None, "n"))
    assert np.array_equal(np.asarray(jax.jit(mapped)(x, x_scale, w)), np.asarray(run(x, w, x_scale=x_scale, out_dtype=jnp.float32)))


@each_implementation
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 3)])
def test_leading_axes_are_kept(lead: tuple[int, ...], implementation: str) -> None:
    w, x, x_scale = matrix(40, 3), activations(*lead, 40), steps(*lead)
    out = run(x, w, x_scale=x_scale, out_dtype=jnp.float32, implementation=implementation)
    assert out.shape == (*lead, 3)
    assert np.array_equal(np.asarray(out), truth(x, w).astype(np.float32) * (np.asarray(x_scale) * np.asarray(w.scale)))


# --- who computes ----------------------------------------------------------------------------------------------------


def compiled(implementation: str | None) -> str:
    call = functools.partial(ternary_matmul, out_dtype=jnp.float32, implementation=implementation)
    return jax.jit(lambda *a: call(a[0], a[1], x_scale=a[2])).lower(activations(2, 40), matrix(40, 3), steps(2)).compile().as_text() or ""


@each_implementation
def test_the_named_implementation_is_what_runs(implementation: str) -> None:
    assert set(re.findall(r"ternary_matmul_(\w+)", compiled(implementation))) == {implementation}


def test_without_a_name_the_last_one_that_supports_the_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(re.findall(r"ternary_matmul_(\w+)", compiled(None))) == {"xla"}
    native = Implementation(lambda x, w, x_scale, out_dtype, config: jnp.full((x.shape[0], w.n), 7, out_dtype), lambda spec: None)
    picky = Implementation(native.function, lambda spec: f"K={spec.k} must be a multiple of 64")
    monkeypatch.setitem(IMPLEMENTATIONS, "native", native)
    monkeypatch.setitem(IMPLEMENTATIONS, "picky", picky)
    out = ternary_matmul(activations(2, 40), matrix(40, 3), x_scale=steps(2), out_dtype=jnp.float32)
    assert np.array_equal(np.asarray(out), np.full((2, 3), 7))
    with pytest.raises(NotImplementedError, match="picky: K=40 must be a multiple of 64"):
        ternary_matmul(activations(2, 40), matrix(40, 3), x_scale=steps(2), out_dtype=jnp.float32, implementation="picky")


def test_wrong_calls_are_named() -> None:
    w, x, s = matrix(40, 3), activations(2, 40), steps(2)
    call = functools.partial(ternary_matmul, out_dtype=jnp.float32)
    layers = jax.tree.map(lambda leaf: leaf[None], w)
    for message, wrong in {
        r"w is a ndarray: must be a PackedTernary": lambda: call(x, np.zeros((40, 3)), x_scale=s),  # pyright: ignore[reportArgumentType]
        r"w has shape \(1, 40, 3\): must be \[K, N\]": lambda: call(x, layers, x_scale=s),
        r"x has shape \(2, 41\): its last axis must be K=40": lambda: call(activations(2, 41), w, x_scale=s),
        r"x has dtype int32": lambda: call(x.astype(jnp.int32), w, x_scale=s),
        r"x_scale=None must be the step of each row": lambda: call(x, w),
        r"x_scale is float32\[2\]: must be float32\[2, 1\]": lambda: call(x, w, x_scale=s[:, 0]),
        r"x_scale is bfloat16\[2, 1\]": lambda: call(x, w, x_scale=s.astype(jnp.bfloat16)),
        r"x_scale must be None for x of dtype float32": lambda: call(x.astype(jnp.float32), w, x_scale=s),
        r"out_dtype=int32 must be a floating-point type": lambda: ternary_matmul(x, w, x_scale=s, out_dtype=jnp.int32),
        r"implementation='cuda' must be one of reference, xla": lambda: call(x, w, x_scale=s, implementation="cuda"),
        r"config=3 must be None: xla has no block sizes": lambda: call(x, w, x_scale=s, implementation="xla", config=3),
        r"config=3 must come with the name": lambda: call(x, w, x_scale=s, config=3),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()
