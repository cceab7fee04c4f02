"""Programs compiled for TPUs on a machine that has none, by libtpu (extra `tpu-aot`). Nothing is run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from bitnet_jax.planning.compiled import described
from kernels_pallas import ArgSpec, PackedTernary, bytes_per_row, mosaic_tpu, ternary_matmul
from kernels_pallas.block_config import TpuConfig

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "7x": "tpu7x:2x2x1"}
"""The smallest slice that libtpu has a name for, by the chip's name in `kernels_pallas.arg_specs.CHIPS`."""


def compile_for(chip: str, spec: ArgSpec, form: str) -> Any:
    """A call as a `jax.stages.Compiled` for a TPU, in one of six forms.

    The kernel with activations in int8 ("int8"), quantised in it ("fused") or in bfloat16 ("bf16 activations"), on weights that lie as
    `mosaic_tpu.place` puts them; and XLA's products of unpacked weights: "xla bf16", "xla int8", "xla int4".
    """
    device = described(TOPOLOGIES[chip])[0]
    here = jax.sharding.SingleDeviceSharding(device)

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any = here) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    m, k, n = spec.m, spec.k, spec.n
    step, scale = array((m, 1), jnp.float32), array((), jnp.float32)
    if form.startswith("xla"):
        kind = {"xla bf16": jnp.bfloat16, "xla int8": jnp.int8, "xla int4": jnp.int4}[form]
        x = array((m, k), jnp.bfloat16 if form == "xla bf16" else jnp.int8)
        arguments = (x, array((k, n), kind)) if form == "xla bf16" else (x, array((k, n), kind), step, scale)
        return _compiled(_plain_bf16 if form == "xla bf16" else _plain_integer, *arguments)
    codes = array((n, bytes_per_row(k, spec.encoding)), jnp.uint8, Format(Layout(major_to_minor=mosaic_tpu.placed(2)), here))
    w = PackedTernary(codes, scale, k=k, encoding=spec.encoding)  # pyright: ignore[reportArgumentType]
    x = array((m, k), jnp.int8 if form == "int8" else jnp.bfloat16)
    config = TpuConfig(chip=chip)
    if form == "fused":
        return _compiled(lambda x, w: mosaic_tpu.quantize_and_multiply(x, w, jnp.bfloat16, config), x, w)
    return _compiled(
        lambda x, w, s: ternary_matmul(x, w, x_scale=s, out_dtype=jnp.bfloat16, implementation="mosaic_tpu", config=config),
        x,
        w,
        step if form == "int8" else None,
    )


def spec_of(spec: ArgSpec, chip: str, form: str) -> ArgSpec:
    """What the kernel is asked in that form."""
    return dataclasses.replace(spec, platform="tpu", chip=chip, x_dtype="int8" if form == "int8" else "bfloat16")


def _compiled(function: Any, *arguments: Any) -> Any:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def _plain_bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(jnp.bfloat16)


def _plain_integer(x: jax.Array, w: jax.Array, step: jax.Array, scale: jax.Array) -> jax.Array:
    sums = jnp.matmul(x, w.astype(jnp.int8), preferred_element_type=jnp.int32)
    return (sums.astype(jnp.float32) * (step * scale)).astype(jnp.bfloat16)
