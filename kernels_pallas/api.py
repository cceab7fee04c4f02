"""`ternary_matmul`: check a call, choose who computes it, and say what its gradient is. `ternary_matmuls`: one input, several matrices."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import mosaic_gpu, mosaic_tpu, reference, xla
from kernels_pallas.arg_specs import CHIPS, ArgSpec, chip_name, default_device
from kernels_pallas.packing import PackedLayer, PackedTernary, check_shapes


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A way to compute `ternary_matmul`."""

    function: Callable[..., jax.Array]
    """(x [M, K], w, x_scale float32 [M, 1] or None, out_dtype, config) → [M, N]; called only with what `supported` supports."""
    supported: Callable[[ArgSpec], str | None]
    """The reason why a call is not supported, or None: a function of the spec alone."""
    together: Callable[..., list[jax.Array]] | None = None
    """(x [M, K], matrices, x_scale, out_dtype, config) → a result [M, N] for each of `matrices`, which share K and encoding, and may be
    layers of stacks. None where it has no such form: then `function` is called for each, and a layer is sliced out of its stack."""


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference.ternary_matmul, reference.supported),
    "xla": Implementation(xla.ternary_matmul, xla.supported),
    "mosaic_tpu": Implementation(mosaic_tpu.ternary_matmul, mosaic_tpu.supported, mosaic_tpu.ternary_matmuls),
    "mosaic_gpu": Implementation(mosaic_gpu.ternary_matmul, mosaic_gpu.supported, mosaic_gpu.ternary_matmuls),
}
"""By name, from the plainest to the fastest; `implementation=None` takes the last one that supports the call.

A package that brings another one adds a row, `IMPLEMENTATIONS["native"] = Implementation(function, supported)`, before the functions
that are to use it are traced: a choice is made while tracing, and stays in what was compiled.
"""


def ternary_matmul(
    x: jax.Array,
    w: PackedTernary | PackedLayer,
    *,
    x_scale: jax.Array | None = None,
    out_dtype: Any,
    implementation: str | None = None,
    config: Any = None,
) -> jax.Array:
    """Activations times packed ternary weights (b1.58, section 2; the weights as in `packing`).

    For x int8 [..., K] with x_scale float32 [..., 1], the multiplicative step of each row:

        out[..., n] = float32(sum_k x[..., k] * W[k, n]) * (x_scale * w.scale)

    with the sum in int32, exact for every input. Where w.scale is [G, N], each group g has its sum,
    out[..., n] = x_scale * sum_g float32(sum_{k in g} x[..., k] * W[k, n]) * w.scale[g, n].
    For x float32, bfloat16 or float16 [..., K] (only the weights quantised) x_scale is 1 and must be None, and sums are float32.
    The result is [..., N], rounded once to the floating-point type `out_dtype`.

    Works under jit, vmap, shard_map and grad. The gradient is that of floating-point x alone; asking for another one is an error.
    The compiler cannot cut a Pallas kernel up: where it is to spread a program over several devices by itself, the call stands in a
    shard_map, or names "xla".
    `implementation` names a row of `IMPLEMENTATIONS`, which then runs or raises; None chooses the fastest that supports the call.
    `config` (of `block_config`) is passed to a named implementation that has block sizes to choose; "reference" and "xla" have none.

    Raises:
        ValueError: a type, shape or name is wrong.
        NotImplementedError: the named implementation does not support this call, or the gradient is not defined.
    """
    return ternary_matmuls(x, [w], x_scale=x_scale, out_dtype=out_dtype, implementation=implementation, config=config)[0]


def ternary_matmuls(
    x: jax.Array,
    matrices: Sequence[PackedTernary | PackedLayer],
    *,
    x_scale: jax.Array | None = None,
    out_dtype: Any,
    implementation: str | None = None,
    config: Any = None,
) -> list[jax.Array]:
    """`ternary_matmul` of one input with each of `matrices`: query, key and value, or gate and up. In one call where there is such a form.

    Raises:
        ValueError, NotImplementedError: as `ternary_matmul`.
    """
    x, out_dtype = jnp.asarray(x), jnp.dtype(out_dtype)
    for w in matrices:
        _check(x, w, out_dtype)
    lead = x.shape[:-1]
    if x.dtype == jnp.int8:
        if x_scale is None:
            raise ValueError("x_scale=None must be the step of each row of x, which is int8")
        x_scale = jnp.asarray(x_scale)
        if x_scale.dtype != jnp.float32 or x_scale.shape != (*lead, 1):
            raise ValueError(f"x_scale is {x_scale.dtype}{list(x_scale.shape)}: must be float32{[*lead, 1]} for x of shape {x.shape}")
        x_scale = x_scale.reshape(-1, 1)
    elif x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"x has dtype {x.dtype}: must be int8, float32, bfloat16 or float16")
    elif x_scale is not None:
        raise ValueError(f"x_scale must be None for x of dtype {x.dtype}")

    m = int(np.prod(lead))
    if m == 0:
        return [jnp.zeros((*lead, w.n), out_dtype) for w in matrices]
    chip = getattr(config, "chip", None)
    device = default_device()
    names = [
        choose(
            ArgSpec(
                m=m,
                k=w.k,
                n=w.n,
                x_dtype=str(x.dtype),
                out_dtype=str(out_dtype),
                encoding=w.encoding,
                group=w.group,
                platform=CHIPS[chip].platform if chip else device.platform,
                chip=chip or chip_name(device.device_kind),
            ),
            implementation,
            config,
        )
        for w in matrices
    ]
    alike = len({(name, w.encoding) for name, w in zip(names, matrices, strict=True)}) == 1
    if alike and IMPLEMENTATIONS[names[0]].together is not None:
        groups = [(names[0], IMPLEMENTATIONS[names[0]].together, list(matrices))]
    else:
        groups = [(name, _alone(IMPLEMENTATIONS[name].function), [w]) for name, w in zip(names, matrices, strict=True)]
    outs: list[jax.Array] = []
    for name, function, group in groups:
        with jax.named_scope(f"ternary_matmul_{name}"):
            outs += _matmuls(function, out_dtype, config, x.reshape(m, -1), group, x_scale)
    return [out.reshape(*lead, out.shape[-1]) for out in outs]


def _check(x: jax.Array, w: PackedTernary | PackedLayer, out_dtype: Any) -> None:
    if not isinstance(w, PackedTernary | PackedLayer):
        raise ValueError(f"w is a {type(w).__name__}: must be a PackedTernary")
    check_shapes(w if isinstance(w, PackedTernary) else w.stack)
    if len(w.shape) != 2:
        raise ValueError(f"w has shape {w.shape}: must be [K, N] (index, scan or vmap its leading axes)")
    if x.ndim < 1 or x.shape[-1] != w.k:
        raise ValueError(f"x has shape {x.shape}: its last axis must be K={w.k} of w")
    if not jnp.issubdtype(out_dtype, jnp.floating):
        raise ValueError(f"out_dtype={out_dtype} must be a floating-point type")


@functools.cache
def _alone(function: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """`Implementation.together` of one matrix by `Implementation.function`."""

    def together(x: jax.Array, matrices: list[Any], x_scale: jax.Array | None, out_dtype: Any, config: Any) -> list[jax.Array]:
        return [function(x, _sliced(w), x_scale, out_dtype, config) for w in matrices]

    return together


def _sliced(w: PackedTernary | PackedLayer) -> PackedTernary:
    return w if isinstance(w, PackedTernary) else w.sliced()


def choose(spec: ArgSpec, implementation: str | None = None, config: Any = None) -> str:
    """The name of the implementation that runs a call. Raises as `ternary_matmul`."""
    if implementation is None:
        if config is not None:
            raise ValueError(f"config={config!r} must come with the name of its implementation")
        return next(name for name in reversed(IMPLEMENTATIONS) if IMPLEMENTATIONS[name].supported(spec) is None)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}, or None")
    if config is not None and implementation in ("reference", "xla"):
        raise ValueError(f"config={config!r} must be None: {implementation} has no block sizes")
    reason = IMPLEMENTATIONS[implementation].supported(spec)
    if reason is not None:
        raise NotImplementedError(f"{implementation}: {reason}")
    return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmuls(function: Any, out_dtype: Any, config: Any, x: jax.Array, matrices: list[Any], x_scale: jax.Array | None) -> list[jax.Array]:
    return function(x, matrices, x_scale, out_dtype, config)


def _forward(function: Any, out_dtype: Any, config: Any, x: Any, matrices: Any, x_scale: Any) -> Any:
    # A zero gradient would be a wrong answer that nobody sees: scales and int8 activations stand behind a rounding.
    leaves, structure = jax.tree.flatten(matrices)
    if any(leaf.perturbed for leaf in leaves):
        raise NotImplementedError("ternary_matmul has no gradient with respect to w.scale: packed weights are constants")
    if x_scale is not None:
        raise NotImplementedError("ternary_matmul has no gradient through int8 activations: differentiate the unpacked model instead")
    values = jax.tree.unflatten(structure, [leaf.value for leaf in leaves])
    return function(x.value, values, None, out_dtype, config), (values, jnp.zeros((0,), x.value.dtype))


def _backward(function: Any, out_dtype: Any, config: Any, residuals: Any, gradients: Any) -> Any:
    matrices, like = residuals
    pairs = [(g, w) for g, w in zip(gradients, matrices, strict=True) if not isinstance(g, jax.custom_derivatives.SymbolicZero)]
    if not pairs:
        return None, None, None
    return functools.reduce(jnp.add, [xla.input_gradient(g, _sliced(w), like.dtype) for g, w in pairs]), None, None


_matmuls.defvjp(_forward, _backward, symbolic_zeros=True)
