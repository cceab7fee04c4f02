"""Pictures of runs, numbers and kernels, one call each. Every function returns a matplotlib Figure, which Jupyter shows.

runs      of what runs logged
numbers   of any numbers
kernels   of calls on chips
"""

from bitnet_jax.plotting.kernels import blocks, floors, roofline
from bitnet_jax.plotting.numbers import against, bars
from bitnet_jax.plotting.runs import loss_curves

__all__ = ["against", "bars", "blocks", "floors", "loss_curves", "roofline"]
