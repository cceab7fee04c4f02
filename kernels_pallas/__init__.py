"""Packed ternary weights, and their product with activations. Imports nothing but JAX and NumPy."""

# The format
from kernels_pallas.packing import (
    FORMAT_VERSION,
    Encoding,
    PackedLayer,
    PackedTernary,
    bytes_per_row,
    check,
    check_shapes,
    pack,
    transcode,
    unpack,
)

# The product
from kernels_pallas.api import IMPLEMENTATIONS, Implementation, ternary_matmul, ternary_matmuls  # isort: skip
from kernels_pallas.arg_specs import ArgSpec  # isort: skip

__all__ = [
    "FORMAT_VERSION",
    "IMPLEMENTATIONS",
    "ArgSpec",
    "Encoding",
    "Implementation",
    "PackedLayer",
    "PackedTernary",
    "bytes_per_row",
    "check",
    "check_shapes",
    "pack",
    "ternary_matmul",
    "ternary_matmuls",
    "transcode",
    "unpack",
]
