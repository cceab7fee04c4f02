"""Pictures of runs, numbers, models and kernels, one call each. Every function returns a matplotlib Figure, which Jupyter shows.

runs         of what runs logged
numbers      of any numbers
checkpoint   of what is inside a model
storage      of bytes, files and memory
kernels      of calls on chips
"""

from bitnet_jax.plotting.checkpoint import activations, channels, ternary
from bitnet_jax.plotting.kernels import blocks, floors, roofline
from bitnet_jax.plotting.numbers import against, bars
from bitnet_jax.plotting.runs import loss_curves
from bitnet_jax.plotting.storage import file_layout, memory, packed_block

__all__ = [
    "activations",
    "against",
    "bars",
    "blocks",
    "channels",
    "file_layout",
    "floors",
    "loss_curves",
    "memory",
    "packed_block",
    "roofline",
    "ternary",
]
