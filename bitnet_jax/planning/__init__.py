"""What a run would need and take on a machine that is not at hand: compiled ahead of time for TPUs, by formula for others."""

from bitnet_jax.planning.compiled import devices as devices
from bitnet_jax.planning.hardware import Rates as Rates
from bitnet_jax.planning.hardware import Topology as Topology
from bitnet_jax.planning.hardware import rates as rates
from bitnet_jax.planning.hardware import topology as topology
from bitnet_jax.planning.plan import Serving as Serving
from bitnet_jax.planning.plan import Times as Times
from bitnet_jax.planning.plan import Training as Training
from bitnet_jax.planning.plan import serving as serving
from bitnet_jax.planning.plan import to_json as to_json
from bitnet_jax.planning.plan import training as training
