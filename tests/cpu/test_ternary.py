"""The native ternary product equals the reference bit for bit, on every instruction set of this machine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_jax import cpu
from bitnet_jax.errors import UserError
from kernels_pallas import IMPLEMENTATIONS, ArgSpec, Encoding, PackedLayer, PackedTernary, pack, ternary_matmul

ISAS = cpu.load()
each_isa = pytest.mark.parametrize("isa", ISAS)


def matrix(ternary: np.ndarray, encoding: Encoding, scale: float = 0.37) -> PackedTernary:
    return jax.tree.map(jnp.asarray, pack(ternary, np.asarray(np.float32(scale)), encoding))


def case(m: int, k: int, n: int, encoding: Encoding, fill: tuple[int, int] | None = None) -> tuple[jax.Array, PackedTernary, jax.Array]:
    rng = np.random.default_rng(m + 31 * k + 7 * n)
    x = rng.integers(-128, 128, (m, k)) if fill is None else np.full((m, k), fill[0])
    ternary = rng.integers(-1, 2, (k, n)) if fill is None else np.full((k, n), fill[1])
    x_scale = rng.uniform(1e-3, 2, (m, 1)).astype(np.float32)
    return jnp.asarray(x.astype(np.int8)), matrix(ternary.astype(np.int8), encoding), jnp.asarray(x_scale)


def bits(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def check(x: jax.Array, w: PackedTernary, x_scale: jax.Array, isa: str, threads: int | None, out_dtype: Any = jnp.float32) -> None:
    expected = ternary_matmul(x, w, x_scale=x_scale, out_dtype=out_dtype, implementation="reference")
    out = cpu.ternary_matmul(x, w, x_scale, out_dtype, cpu.CpuConfig(threads, isa))
    assert np.array_equal(bits(out), bits(expected))


# --- integers --------------------------------------------------------------------------------------------------------


@each_isa
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    m=st.one_of(st.integers(1, 12), st.integers(13, 70)),
    k=st.one_of(st.integers(1, 700), st.integers(2500, 2700)),
    n=st.integers(1, 70),
    encoding=st.sampled_from(Encoding),
    threads=st.sampled_from([None, 1, 2, 64]),
    out_dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_every_shape_has_the_bits_of_the_reference(
    isa: str, m: int, k: int, n: int, encoding: Encoding, threads: int | None, out_dtype: Any
) -> None:
    check(*case(m, k, n, encoding), isa, threads, out_dtype)


@each_isa
@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("fill", [(127, 1), (-127, 1), (-128, 1), (-128, -1), (127, -1)])
@pytest.mark.parametrize(("m", "k"), [(1, 6912), (5, 6912), (18, 6912), (1, 45568), (4, 45568), (18, 45568), (2, 200_000)])
def test_sums_are_exact_at_the_extremes(m: int, k: int, fill: tuple[int, int], encoding: Encoding, isa: str) -> None:
    check(*case(m, k, 3, encoding, fill), isa, 2)


@each_isa
@pytest.mark.parametrize("encoding", Encoding)
def test_more_tokens_than_a_block_holds_are_exact(encoding: Encoding, isa: str) -> None:
    check(*case(515, 300, 5, encoding), isa, 2)


@pytest.mark.parametrize("m", [1, 3, 20])
@pytest.mark.parametrize("encoding", Encoding)
def test_several_matrices_in_one_call_give_what_each_gives(encoding: Encoding, m: int) -> None:
    x, first, x_scale = case(m, 1000, 300, encoding)
    others = [matrix(np.random.default_rng(n).integers(-1, 2, (1000, n)).astype(np.int8), encoding, n) for n in (1, 77)]
    outs = jax.jit(cpu.ternary_matmuls, static_argnums=3)(x, [first, *others], x_scale, jnp.float32)
    for w, out in zip([first, *others], outs, strict=True):
        expected = ternary_matmul(x, w, x_scale=x_scale, out_dtype=jnp.float32, implementation="reference")
        assert np.array_equal(bits(out), bits(expected))


@pytest.mark.parametrize("encoding", Encoding)
def test_a_layer_of_a_stack_is_that_matrix(encoding: Encoding) -> None:
    x, _, x_scale = case(3, 300, 20, encoding)
    rng = np.random.default_rng(0)
    ternary = rng.integers(-1, 2, (4, 300, 20)).astype(np.int8)
    stack = jax.tree.map(jnp.asarray, pack(ternary, rng.uniform(0.1, 1, 4).astype(np.float32), encoding))

    @jax.jit
    def every(x: jax.Array, x_scale: jax.Array, stack: PackedTernary) -> jax.Array:
        def one(layer: jax.Array) -> jax.Array:
            return cpu.ternary_matmul(x, PackedLayer(stack, layer), x_scale, jnp.float32)

        return jax.lax.map(one, jnp.arange(4, dtype=jnp.int32))

    for layer, out in enumerate(every(x, x_scale, stack)):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
        assert np.array_equal(bits(out), bits(cpu.ternary_matmul(x, w, x_scale, jnp.float32)))


def test_vmap_gives_the_rows_of_each_call() -> None:
    x, w, x_scale = case(6, 200, 9, Encoding.TWO_BIT)
    whole = cpu.ternary_matmul(x, w, x_scale, jnp.float32)
    mapped = jax.vmap(lambda a, s: cpu.ternary_matmul(a, w, s, jnp.float32))(x.reshape(3, 2, 200), x_scale.reshape(3, 2, 1))
    assert np.array_equal(bits(mapped).reshape(6, 9), bits(whole))


def test_it_is_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "native", IMPLEMENTATIONS["xla"])  # so that what follows is undone
    monkeypatch.delitem(IMPLEMENTATIONS, "native")
    cpu.register()
    x, w, x_scale = case(2, 200, 9, Encoding.BASE3)

    def program(x: jax.Array, x_scale: jax.Array | None) -> str:
        return jax.jit(lambda x, s: ternary_matmul(x, w, x_scale=s, out_dtype=jnp.float32)).lower(x, x_scale).as_text()

    assert "bitnet_ternary_matmul" in program(x, x_scale)
    assert "bitnet_ternary_matmul" not in program(x.astype(jnp.float32), None)
    with pytest.raises(NotImplementedError, match="native: activations are float32: must be int8"):
        ternary_matmul(x.astype(jnp.float32), w, out_dtype=jnp.float32, implementation="native")
    monkeypatch.setattr(cpu.build, "unavailable", lambda: "no native kernels: no C++ compiler found")
    assert "bitnet_ternary_matmul" not in program(x, x_scale)
    with pytest.raises(NotImplementedError, match=r"native: no native kernels: no C\+\+ compiler found"):
        ternary_matmul(x, w, x_scale=x_scale, out_dtype=jnp.float32, implementation="native")


# --- wrong input -----------------------------------------------------------------------------------------------------


def test_what_is_not_supported_is_said() -> None:
    assert cpu.supported(ArgSpec(m=1, k=128, n=1)) is None
    for field, value in (("platform", "gpu"), ("x_dtype", "bfloat16"), ("out_dtype", "float16"), ("group", 64)):
        reason = cpu.supported(ArgSpec(**{"m": 1, "k": 128, "n": 1, field: value}))
        assert reason is not None
        assert str(value) in reason


def test_an_unknown_instruction_set_is_named() -> None:
    x, w, x_scale = case(1, 5, 1, Encoding.TWO_BIT)
    with pytest.raises(UserError, match=r"isa='mmx' is not an instruction set of this machine: must be one of scalar"):
        cpu.ternary_matmul(x, w, x_scale, jnp.float32, cpu.CpuConfig(isa="mmx"))


@pytest.mark.parametrize("threads", [0, -1, 2**31])
def test_a_wrong_number_of_threads_is_named(threads: int) -> None:
    with pytest.raises(UserError, match=f"threads={threads} must be from 1"):
        cpu.CpuConfig(threads=threads)


def test_matrices_that_do_not_belong_together_are_refused() -> None:
    x, w, x_scale = case(1, 256, 4, Encoding.TWO_BIT)
    for other in (case(1, 255, 4, Encoding.TWO_BIT)[1], case(1, 256, 4, Encoding.BASE3)[1]):
        with pytest.raises(ValueError, match="must be"):
            cpu.ternary_matmuls(x, [w, other], x_scale, jnp.float32)


GOOD = {
    "x": jnp.zeros((2, 256), jnp.int8),
    "x_scale": jnp.ones((2, 1), jnp.float32),
    "layer": np.int32(1),
    "codes": jnp.zeros((2, 3, 64), jnp.uint8),
    "scale": jnp.ones((2,), jnp.float32),
    "out": jax.ShapeDtypeStruct((2, 3), jnp.float32),
    "encoding": "two_bit",
    "isa": "",
    "threads": np.int64(-1),
}
BAD = {
    "x of another type": {"x": jnp.zeros((2, 256), jnp.uint8)},
    "x of rank 1": {"x": jnp.zeros((256,), jnp.int8)},
    "no tokens": {"x": jnp.zeros((0, 256), jnp.int8)},
    "steps of other tokens": {"x_scale": jnp.ones((3, 1), jnp.float32)},
    "steps of another type": {"x_scale": jnp.ones((2, 1), jnp.int32)},
    "a layer that is not there": {"layer": np.int32(2)},
    "a layer below 0": {"layer": np.int32(-1)},
    "a layer of another type": {"layer": np.uint32(0)},
    "truncated rows": {"codes": jnp.zeros((2, 3, 63), jnp.uint8)},
    "signed codes": {"codes": jnp.zeros((2, 3, 64), jnp.int8)},
    "no layers": {"codes": jnp.zeros((3, 64), jnp.uint8)},
    "a scale for each row": {"scale": jnp.ones((2, 3), jnp.float32)},
    "a layer without a scale": {"scale": jnp.ones((1,), jnp.float32)},
    "a result too small": {"out": jax.ShapeDtypeStruct((2, 2), jnp.float32)},
    "a result of another type": {"out": jax.ShapeDtypeStruct((2, 3), jnp.float16)},
    "another encoding": {"encoding": "base4"},
    "another layout": {"encoding": "base3"},
    "a missing instruction set": {"isa": "mmx"},
    "no threads": {"threads": np.int64(0)},
    "threads of another type": {"threads": np.int32(1)},
}


@pytest.mark.parametrize("what", BAD)
def test_the_library_itself_refuses(what: str) -> None:
    given = GOOD | BAD[what]
    operands = [given[name] for name in ("x", "x_scale", "codes", "scale", "layer")]
    attributes = {name: given[name] for name in ("encoding", "isa", "threads")}
    run = jax.ffi.ffi_call("bitnet_ternary_matmul", [given["out"]])
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="INVALID_ARGUMENT"):
        jax.block_until_ready(run(*operands, **attributes))


def test_the_good_call_is_good() -> None:
    operands = [GOOD[name] for name in ("x", "x_scale", "codes", "scale", "layer")]
    attributes = {name: GOOD[name] for name in ("encoding", "isa", "threads")}
    out = jax.ffi.ffi_call("bitnet_ternary_matmul", [GOOD["out"]])(*operands, **attributes)[0]
    assert np.array_equal(np.asarray(out), np.zeros((2, 3)))


def test_a_missing_library_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.build, "unavailable", lambda: "no native kernels: no C++ compiler found")
    assert cpu.supported(ArgSpec(m=1, k=128, n=1)) == "no native kernels: no C++ compiler found"
