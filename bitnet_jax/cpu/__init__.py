"""Native kernels for CPUs, and their pure-JAX twins."""

# The library
from bitnet_jax.cpu.build import load as load
from bitnet_jax.cpu.native import CpuConfig as CpuConfig
from bitnet_jax.cpu.native import runs as runs

# Products of packed weights
from bitnet_jax.cpu.ternary import register as register
from bitnet_jax.cpu.ternary import scale as scale
from bitnet_jax.cpu.ternary import supported as supported
from bitnet_jax.cpu.ternary import ternary_matmul as ternary_matmul
from bitnet_jax.cpu.ternary import ternary_matmuls as ternary_matmuls

# The vocabulary product
from bitnet_jax.cpu.head import RoughTable as RoughTable  # isort: skip
from bitnet_jax.cpu.head import logits as logits
from bitnet_jax.cpu.head import logits_of_columns as logits_of_columns
from bitnet_jax.cpu.head import logits_twin as logits_twin
from bitnet_jax.cpu.head import quantize_table as quantize_table
from bitnet_jax.cpu.head import rough_logits as rough_logits
from bitnet_jax.cpu.head import top_logits as top_logits
from bitnet_jax.cpu.head import top_logits_twin as top_logits_twin

# Attention and activations
from bitnet_jax.cpu.attention import Int8Vectors as Int8Vectors  # isort: skip
from bitnet_jax.cpu.attention import attention as attention
from bitnet_jax.cpu.attention import quantize_vectors as quantize_vectors

from bitnet_jax.cpu.activations import norm_quantize as norm_quantize  # isort: skip
from bitnet_jax.cpu.activations import norm_quantize_twin as norm_quantize_twin
from bitnet_jax.cpu.activations import relu2_norm_quantize as relu2_norm_quantize
from bitnet_jax.cpu.activations import relu2_norm_quantize_twin as relu2_norm_quantize_twin

# The machine
from bitnet_jax.cpu.bandwidth import read_bandwidth as read_bandwidth  # isort: skip
