"""Pictures of runs, weights, numbers, models and kernels, one call each. Every function returns a matplotlib Figure, which Jupyter shows.

runs         what runs logged, and the schedules that they follow
weights      latent weights and their codes
numbers      any numbers
checkpoint   what is inside a model, layer by layer
storage      bytes, files and memory
kernels      calls on chips
"""

from bitnet_jax.plotting.checkpoint import activations, channels, ternary
from bitnet_jax.plotting.kernels import blocks, floors, roofline
from bitnet_jax.plotting.numbers import against, bars
from bitnet_jax.plotting.runs import codes_over_time, logged, loss_curves, over_seeds, schedule
from bitnet_jax.plotting.storage import file_layout, memory, packed_block
from bitnet_jax.plotting.weights import latent_histograms, scales, straight_through, weight_histogram

__all__ = [
    "activations",
    "against",
    "bars",
    "blocks",
    "channels",
    "codes_over_time",
    "file_layout",
    "floors",
    "latent_histograms",
    "logged",
    "loss_curves",
    "memory",
    "over_seeds",
    "packed_block",
    "roofline",
    "scales",
    "schedule",
    "straight_through",
    "ternary",
    "weight_histogram",
]
