"""Whatever is wrong with a call of a native function, an exception names it; and buffers may lie anywhere."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cpu
from bitnet_jax.errors import UserError
from kernels_pallas import ArgSpec, Encoding, PackedTernary, pack, ternary_matmul

cpu.load()


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


def result(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


I8, I32, U8, BF16 = jnp.int8, jnp.int32, jnp.uint8, jnp.bfloat16
# Of every native function: operands, results and attributes of its own in a call that is right.
CALLS: dict[str, tuple[dict[str, jax.Array], dict[str, jax.ShapeDtypeStruct], dict[str, Any]]] = {
    "bitnet_ternary_matmul": (
        {
            "x": zeros(2, 256, dtype=I8),
            "x_scale": zeros(2, 1),
            "codes": zeros(2, 3, 64, dtype=U8),
            "scale": zeros(2),
            "layer": jnp.int32(1),
        },
        {"out": result(2, 3)},
        {"encoding": "two_bit"},
    ),
    "bitnet_scale": ({"sums": zeros(2, 3), "x_scale": zeros(2, 1), "scale": zeros()}, {"out": result(2, 3)}, {}),
    "bitnet_quantize_table": (
        {"table": zeros(5, 40)},
        {"codes": result(5, 40, dtype=I8), "scale": result(5), "error": result(5)},
        {},
    ),
    "bitnet_logits": ({"x": zeros(2, 40), "table": zeros(5, 40, dtype=I8), "scale": zeros(5)}, {"out": result(2, 5)}, {"columns": False}),
    "bitnet_top_logits": (
        {
            "x": zeros(2, 40),
            "table": zeros(5, 40, dtype=BF16),
            "rough": zeros(5, 40, dtype=I8),
            "scale": zeros(5),
            "error": zeros(5),
            "limit": jnp.int32(5),
        },
        {"ids": result(2, 1, dtype=I32), "logits": result(2, 1), "read": result(2, dtype=I32)},
        {},
    ),
    "bitnet_attention": (
        {
            "q": zeros(1, 2, 4, 8),
            "keys": zeros(3, 1, 9, 2, 8, dtype=I8),
            "values": zeros(3, 1, 9, 2, 8, dtype=I8),
            "k_scale": zeros(3, 1, 9, 2),
            "v_scale": zeros(3, 1, 9, 2),
            "layer": jnp.int32(0),
            "positions": zeros(1, 2, dtype=I32),
        },
        {"out": result(1, 2, 4, 8)},
        {},
    ),
    "bitnet_norm_quantize": (
        {"x": zeros(2, 33), "up": zeros(2, 33), "gain": zeros(33)},
        {"codes": result(2, 33, dtype=I8), "step": result(2, 1)},
        {"eps": np.float32(1e-5)},
    ),
}
# An operand is wrong in type, in rank, in being empty, and in each of its sizes.
OPERANDS = [(target, name) for target, (operands, _, _) in CALLS.items() for name in operands]
RESULTS = [(target, name) for target, (_, results, _) in CALLS.items() for name in results]


def run(target: str, changed: dict[str, Any]) -> list[Any]:
    operands, results, attributes = CALLS[target]
    operands, results = ({name: changed.get(name, part) for name, part in parts.items()} for parts in (operands, results))
    attributes = {"isa": "", "threads": np.int64(-1)} | attributes
    attributes = {name: changed.get(name, value) for name, value in attributes.items()}
    return jax.block_until_ready(jax.ffi.ffi_call(target, list(results.values()))(*operands.values(), **attributes))


def wrong_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    shapes = [(*shape, 1), shape[1:], (0, *shape[1:])] if shape else [(1,), (0,)]
    shorter = [(*shape[:i], shape[i] - 1, *shape[i + 1 :]) for i in range(len(shape))]
    return shapes + shorter + ([(*shape[:-1], shape[-1] + 1)] if shape else [])


# Operands that may have another of those shapes as well.
FREE = {("bitnet_ternary_matmul", "x"), ("bitnet_norm_quantize", "up")}


@pytest.mark.parametrize("target", CALLS)
def test_the_call_that_is_right_runs(target: str) -> None:
    run(target, {})


@pytest.mark.parametrize(("target", "name"), OPERANDS)
def test_an_operand_of_another_shape_is_refused(target: str, name: str) -> None:
    operand = CALLS[target][0][name]
    for shape in wrong_shapes(operand.shape):
        if (target, name) in FREE and (shape == (0,) or (name == "x" and shape == (2, 255))):
            continue  # 255 features have the rows of 256; no second operand is written [0]
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="INVALID_ARGUMENT: bitnet-jax: "):
            run(target, {name: jnp.zeros(shape, operand.dtype)})


@pytest.mark.parametrize(("target", "name"), OPERANDS)
def test_an_operand_of_another_type_is_refused(target: str, name: str) -> None:
    operand = CALLS[target][0][name]
    for dtype in (jnp.float16, jnp.uint16, jnp.bool_):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="INVALID_ARGUMENT: bitnet-jax: "):
            run(target, {name: jnp.zeros(operand.shape, dtype)})


@pytest.mark.parametrize(("target", "name"), RESULTS)
def test_a_result_of_another_shape_or_type_is_refused(target: str, name: str) -> None:
    right = CALLS[target][1][name]
    # XLA leaves a call out whose only result is empty.
    wrong = [result(*shape, dtype=right.dtype) for shape in wrong_shapes(right.shape) if 0 not in shape]
    for changed in [*wrong, result(*right.shape, dtype=jnp.float16)]:
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="INVALID_ARGUMENT: bitnet-jax: "):
            run(target, {name: changed})


@pytest.mark.parametrize("target", CALLS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("threads", np.int64(0), "threads=0 must be at least 1"),
        ("threads", np.int64(-2), "threads=-2 must be at least 1"),
        ("isa", "mmx", "isa=mmx is not an instruction set of this machine"),
    ],
)
def test_a_wrong_attribute_is_named(target: str, name: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        run(target, {name: value})


# --- through Python ---------------------------------------------------------------------------------------------------


def test_more_outputs_than_int32_counts_are_not_supported() -> None:
    for spec in (ArgSpec(m=2**31, k=128, n=1), ArgSpec(m=1, k=128, n=2**31)):
        reason = cpu.supported(spec)
        assert reason is not None
        assert "must be at most 2147483647" in reason


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("change", [-1, 1])
def test_rows_of_another_length_are_refused(change: int, encoding: Encoding) -> None:
    whole = pack(np.ones((300, 5), np.int8), np.asarray(np.float32(1)), encoding)
    w = dataclasses.replace(jax.tree.map(jnp.asarray, whole), codes=zeros(5, whole.codes.shape[1] + change, dtype=U8))
    for product in (cpu.ternary_matmul, lambda x, w, s, out: ternary_matmul(x, w, x_scale=s, out_dtype=out)):
        with pytest.raises(ValueError, match=r"codes have shape .*: must be \[\.\.\., N, \d+\] for K=300"):
            product(zeros(1, 300, dtype=I8), w, zeros(1, 1), jnp.float32)


def test_sums_that_int32_could_not_hold_are_refused() -> None:
    x, codes = jax.ShapeDtypeStruct((1, 1 << 24), I8), jax.ShapeDtypeStruct((1, 1 << 22), U8)
    w = PackedTernary(codes, result(), k=1 << 24, encoding=Encoding.TWO_BIT)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="K=16777216 must be from 1 to 16777215"):
        jax.eval_shape(lambda x, w, s: cpu.ternary_matmul(x, w, s, jnp.float32), x, w, result(1, 1))


def test_a_wrong_configuration_is_named() -> None:
    with pytest.raises(UserError, match="threads=0 must be from 1"):
        cpu.CpuConfig(threads=0)
    with pytest.raises(UserError, match="isa='mmx' is not an instruction set of this machine: must be one of scalar"):
        cpu.logits(zeros(1, 4), zeros(3, 4), cpu.CpuConfig(isa="mmx"))


# --- where buffers lie ------------------------------------------------------------------------------------------------


def shifted(x: np.ndarray, by: int) -> np.ndarray:
    """A copy of x that begins `by` bytes behind an address that XLA would use as it is."""
    room = np.empty(x.nbytes + 128, np.uint8)
    begin = -room.ctypes.data % 64 + by
    view = room[begin : begin + x.nbytes].view(np.uint8).reshape(-1)
    view[:] = np.frombuffer(x.tobytes(), np.uint8)
    return np.ndarray(x.shape, x.dtype, buffer=view)


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("by", [1, 3, 16, 63])
def test_memory_that_is_not_aligned_gives_the_same(by: int, encoding: Encoding) -> None:
    rng = np.random.default_rng(by)
    x, ternary = rng.integers(-128, 128, (3, 301)).astype(np.int8), rng.integers(-1, 2, (301, 7)).astype(np.int8)
    w, x_scale = pack(ternary, np.asarray(np.float32(0.5)), encoding), rng.uniform(1, 2, (3, 1)).astype(np.float32)
    moved = jax.tree.map(lambda part: shifted(np.asarray(part), by), w)
    out = jax.jit(cpu.ternary_matmul, static_argnums=3)(shifted(x, by), moved, shifted(x_scale, by), jnp.float32)
    exact = (x.astype(np.int64) @ ternary.astype(np.int64)).astype(np.float32) * (x_scale * np.float32(0.5))
    assert np.array_equal(out, exact)
