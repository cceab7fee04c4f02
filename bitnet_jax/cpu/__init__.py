"""Native kernels for CPUs, and their pure-JAX twins."""

from bitnet_jax.cpu.build import load as load
from bitnet_jax.cpu.native import CpuConfig as CpuConfig
from bitnet_jax.cpu.ternary import supported as supported
from bitnet_jax.cpu.ternary import ternary_matmul as ternary_matmul
from bitnet_jax.cpu.ternary import ternary_matmuls as ternary_matmuls
