"""Pictures of runs, weights, numbers and kernels, one call each. Every function returns a matplotlib Figure, which Jupyter shows.

runs      what runs logged, and the schedules that they follow
weights   latent weights and their codes
numbers   any numbers
kernels   calls on chips
"""

from bitnet_jax.plotting.kernels import blocks, floors, roofline
from bitnet_jax.plotting.numbers import against, bars
from bitnet_jax.plotting.runs import codes_over_time, logged, loss_curves, over_seeds, schedule
from bitnet_jax.plotting.weights import latent_histograms, scales, straight_through, weight_histogram

__all__ = [
    "against",
    "bars",
    "blocks",
    "codes_over_time",
    "floors",
    "latent_histograms",
    "logged",
    "loss_curves",
    "over_seeds",
    "roofline",
    "scales",
    "schedule",
    "straight_through",
    "weight_histogram",
]
