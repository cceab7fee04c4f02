"""The products of a linear layer: full precision, quantised (training) and packed (inference), as pure functions.

Integer codes up to 128 are exact in bfloat16, and their sums below 2^24 are exact in float32, so `quantized` on codes and `packed` on
bytes compute the same integers; both then multiply by the same scale, once. That is what makes a packed model the trained one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bitnet_jax import cpu, partition, quant
from bitnet_jax.array_types import Array, Float, Float32, Int8, Shaped
from bitnet_jax.config import ActivationQuantizer, Arithmetic, Gather, QuantConfig, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.partition import Placement
from kernels_pallas import IMPLEMENTATIONS, PackedLayer, PackedTernary, ternary_matmuls


def full(
    x: Float[Array, "... K"], kernel: Float[Array, "K N"], out_dtype: Any = None, placement: Placement | None = None
) -> Float[Array, "... N"]:
    """x @ kernel on operands in the type of `x`, summed in float32, in `out_dtype` (None: the type of `x`).

    `placement` says how the kernel is cut up over devices.
    """
    return _two_rows(lambda x, w: _product(x, w, placement), x, kernel).astype(out_dtype or x.dtype)


def tied(
    x: Float[Array, "... D"], table: Float[Array, "V D"], out_dtype: Any = None, placement: Placement | None = None
) -> Float[Array, "... V"]:
    """x @ table^T, as `full`: the head where it is the embedding."""
    return _two_rows(lambda x, w: _transposed_product(x, w, placement), x, table).astype(out_dtype or x.dtype)


def quantized(
    x: Float[Array, "... K"],
    kernel: Float[Array, "K N"],
    config: QuantConfig,
    placement: Placement | None = None,
    strength: Float32[Array, ""] | None = None,
    axis: int | None = None,
) -> Float[Array, "... N"]:
    """The product of quantised activations and quantised weights, with straight-through gradients to both.

    `INTEGER` and `INT8`: y = (codes_x @ codes_w) * (scale_x * scale_w). `FAKE`: y = (codes_x / s_x) @ (codes_w * scale_w).
    Equal up to rounding; the first two are the same bits (sums below 2^24, K up to 131,072), and those of packed inference.

    `placement` says how the kernel is cut up over devices and what of it travels; it changes no code and no scale. With `strength` both
    operands are quantised in part, from 0 not at all to 1 in full, and multiplied as `FAKE` multiplies them: what lies between two codes
    is no integer. `axis` is what `config.weight_shards` cut (`quant.quantize_weights`).
    """
    if strength is None and config.arithmetic is not Arithmetic.FAKE and config.weight is not WeightQuantizer.NONE:
        return _integer(x, kernel, config, placement, axis)
    w = quant.fake_quantize_weights(partition.gathered(kernel, placement), config, strength, axis)
    return full(quant.fake_quantize_activations(x, config, strength), w)


class Activations(NamedTuple):
    """Activations that are quantised already: by the norm that stood before the product (`cpu.norm_quantize`)."""

    codes: Int8[Array, "... K"]
    scale: Float32[Array, "... 1"]
    dtype: Any
    """Type of what was quantised, and of the product."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of `codes`."""
        return self.codes.shape


def _quantize(x: Float[Array, "... K"] | Activations, config: QuantConfig) -> Activations:
    if isinstance(x, Activations):
        return x
    codes, scale = quant.quantize_activations(x, config.for_inference)
    return Activations(codes.astype(jnp.int8), scale, x.dtype)


def rounded(x: Float[Array, "... K"] | Activations, kernel: Float[Array, "K N"], config: QuantConfig) -> Float[Array, "... N"]:
    """`quantized` by `INTEGER` with one weight scale, without gradients and with every product rounded as the native library rounds it:
    the bits of `packed` by that library."""
    weights, activations = quant.quantize_weights(kernel, config), _quantize(x, config)
    sums = _matmul(activations.codes.astype(x.dtype), weights.codes.astype(x.dtype)).reshape(-1, kernel.shape[1])
    y = cpu.scale(sums, activations.scale.reshape(-1, 1), weights.scale.reshape(()), x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def packed(
    x: Float[Array, "... K"] | Activations,
    kernels: Sequence[PackedTernary | PackedLayer],
    config: QuantConfig,
    implementation: str | None = None,
) -> list[Float[Array, "... N"]]:
    """The products of quantised activations and packed ternary matrices, in the type of `x`.

    Args:
        x: activations [..., K].
        kernels: packed weights of one layer each; they share the quantised activations.
        config: quantiser of the activations; `NONE` multiplies the activations as they are (TriLM).
        implementation: name of a `ternary_matmul` implementation, which then runs or raises; None chooses.

    Raises:
        UserError: no implementation has that name.
        NotImplementedError: the named one cannot do this product, with the reason.
    """
    cpu.register()
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation {implementation!r} is unknown: must be one of {', '.join(IMPLEMENTATIONS)}")
    if config.activation is ActivationQuantizer.NONE:
        assert not isinstance(x, Activations)
        return ternary_matmuls(x, kernels, out_dtype=x.dtype, implementation=implementation)
    codes, scale, dtype = _quantize(x, config)
    return ternary_matmuls(codes, kernels, x_scale=scale, out_dtype=dtype, implementation=implementation)


# --- the plain product and its gradients -----------------------------------------------------------------------------


def _two_rows(product: Callable[[Array, Array], Array], x: Float[Array, "... K"], w: Float[Array, "..."]) -> Float[Array, "... N"]:
    """`product(x, w)`; on a CPU a single row of bfloat16 is multiplied twice, since XLA has a fast product there from two rows up: one row
    is widened to float32 with all of `w`, many times slower."""
    if x.dtype != jnp.bfloat16 or x.size != x.shape[-1]:
        return product(x, w)

    def twice(x: Array, w: Array) -> Array:
        pair = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
        return product(pair, w)[:1].reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, w, cpu=twice, default=product)


def _matmul(x: Shaped[Array, "... K"], w: Shaped[Array, "K N"], accumulator: Any = jnp.float32) -> Shaped[Array, "... N"]:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=accumulator)


def _input_gradient(gradient: Float[Array, "... N"], w: Float[Array, "K N"]) -> Float[Array, "... K"]:
    return jax.lax.dot_general(gradient, w, (((gradient.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _weight_gradient(x: Float[Array, "... K"], gradient: Float[Array, "... N"]) -> Float[Array, "K N"]:
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, w, placement):
    return _matmul(x, partition.gathered(w.astype(x.dtype), placement))


def _product_backward(placement, kept, gradient):
    # Written out because autodiff would make the weight gradient as [N, K] and transpose it, at half the speed on a CPU.
    x, w = kept
    gradient = gradient.astype(x.dtype)
    dx = _input_gradient(gradient, partition.gathered(w.astype(x.dtype), placement))
    return dx.astype(x.dtype), partition.stored(_weight_gradient(x, gradient), placement).astype(w.dtype)


_product.defvjp(lambda x, w, placement: (_product(x, w, placement), (x, w)), _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _transposed_product(x, table, placement):
    return _input_gradient(x, partition.gathered(table.astype(x.dtype), placement))


def _transposed_product_backward(placement, kept, gradient):
    # Not `_product` of a transposed table: its gradient would be transposed too, a product that XLA:CPU lacks in bfloat16.
    x, table = kept
    gradient = gradient.astype(x.dtype)
    dx = _matmul(gradient, partition.gathered(table.astype(x.dtype), placement))
    return dx.astype(x.dtype), partition.stored(_weight_gradient(gradient, x), placement).astype(table.dtype)


_transposed_product.defvjp(lambda x, table, placement: (_transposed_product(x, table, placement), (x, table)), _transposed_product_backward)


# --- the integer product with straight-through gradients -------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _integer(x, kernel, config, placement, axis):
    return _integer_forward(x, kernel, config, placement, axis)[0]


def _integer_forward(x, kernel, config, placement, axis):
    if placement is None or placement.gather is Gather.LATENT:
        weights = quant.quantize_weights(partition.gathered(kernel, placement), config, axis)
        whole = weights.codes
    else:
        weights = quant.quantize_weights(partition.stored(kernel, placement), config, axis)
        whole = partition.gathered_codes(weights.codes.astype(jnp.int8), placement)
    if config.activation is ActivationQuantizer.NONE:
        activations, operand = None, x
    else:
        activations = quant.quantize_activations(x, config)
        operand = activations.codes
    # Integers up to 128 are exact in bfloat16 too.
    kind, accumulator = (jnp.int8, jnp.int32) if config.arithmetic is Arithmetic.INT8 else (x.dtype, jnp.float32)
    operand, codes = operand.astype(kind), whole.astype(kind)
    if weights.scale.ndim == codes.ndim:
        y = _matmul(operand, codes, accumulator).astype(jnp.float32)
        scale = weights.scale.reshape(())
        y = y * scale if activations is None else y * (activations.scale * scale)
    else:
        groups, _, n = weights.scale.shape
        sums = _group_sums(operand.reshape(*operand.shape[:-1], groups, -1), codes.reshape(groups, -1, n), accumulator)
        y = jnp.sum(sums.astype(jnp.float32) * jnp.expand_dims(weights.scale[:, 0], range(sums.ndim - 2)), -2)
        y = y if activations is None else y * activations.scale
    # int8 residuals: a quarter of the bytes of what is multiplied. The weights' are cut up again, as the latent ones are.
    kept_x = x if activations is None else (activations.codes.astype(jnp.int8), activations.scale)
    return y.astype(x.dtype), (kept_x, partition.stored(weights.codes.astype(jnp.int8), placement), weights.scale)


def _group_sums(x: Shaped[Array, "... G L"], codes: Shaped[Array, "G L N"], accumulator: Any) -> Shaped[Array, "... G N"]:
    """The products of each group, not added up."""

    def product(x: Array, codes: Array) -> Array:
        return jnp.einsum("...gk,gkn->...gn", x, codes, preferred_element_type=accumulator)

    if x.dtype != jnp.bfloat16:
        return product(x, codes)
    # XLA has no products of several bfloat16 matrices at a time on a CPU; in float32 they are the same numbers.
    return jax.lax.platform_dependent(
        x, codes, cpu=lambda x, codes: product(x.astype(jnp.float32), codes.astype(jnp.float32)), default=product
    )


def _integer_backward(config, placement, axis, kept, gradient):
    kept_x, codes_w, scale_w = kept
    dtype = gradient.dtype
    codes_w = partition.gathered_codes(codes_w, placement)
    w = quant.dequantize_weights(quant.Quantized(codes_w.astype(jnp.float32), scale_w)).astype(dtype)
    x = kept_x if not isinstance(kept_x, tuple) else (kept_x[0].astype(jnp.float32) * kept_x[1]).astype(dtype)
    return _input_gradient(gradient, w).astype(dtype), partition.stored(_weight_gradient(x, gradient), placement)


_integer.defvjp(_integer_forward, _integer_backward)
