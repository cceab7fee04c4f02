# %% [markdown]
# # 1. The idea
#
# BitNet b1.58 is a transformer whose linear layers multiply by -1, 0 and +1. It is trained like any other, on full-precision *latent*
# weights; each forward pass rounds them to three values, and the gradient goes to the latent ones as if nothing had been rounded. Once
# trained, the latent weights are thrown away. This notebook takes one matrix through all of it.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# %matplotlib inline

SMOKE = os.environ.get("SMOKE", "0") not in ("", "0")  # SMOKE=1: small examples, as the tests run this
ROOT = next((folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "experiments" / "results").is_dir()), None)
if importlib.util.find_spec("bitnet_jax") is None:  # as on Colab: from a clone of the repository where there is one
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", str(ROOT or "bitnet-jax")], check=True)

# %%
import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import dot, params, plotting, quant
from bitnet_jax.config import ActivationQuantizer, QuantConfig, WeightQuantizer
from kernels_pallas import Encoding

K, N = (128, 64) if SMOKE else (512, 384)  # inputs and outputs
rng = np.random.default_rng(0)
w = jnp.asarray(rng.normal(0, K**-0.5, (K, N)).astype(np.float32))  # a matrix as it is before training
B158 = QuantConfig()  # absmean weights of one scale a matrix, absmax activations of 8 bits a token

# %% [markdown]
# ## Weights
#
# The scale s of a matrix is the mean of |W|, and the code of a weight is round(W / s), clipped to -1, 0 and +1. So what is smaller than s
# / 2 becomes 0. Colours are codes, and dashed lines the values ±s that the layer multiplies by. The other quantisers take another scale,
# the median or the maximum, or give up zero as b1 did.

# %%
QUANTIZERS = {
    "absmean (b1.58)": B158,
    "absmedian": QuantConfig(weight=WeightQuantizer.ABSMEDIAN),
    "absmax": QuantConfig(weight=WeightQuantizer.ABSMAX),
    "sign (b1)": QuantConfig(weight=WeightQuantizer.SIGN),
}
plotting.weight_histogram({name: (w, config) for name, config in QUANTIZERS.items()})

# %% [markdown]
# What the scale does: a small one leaves few zeros and makes the rest too small, a large one leaves nothing but zeros. Absmean is not the
# scale of least error for weights like these, which lies about half as high again; the weights are learned *with* it, and go where their
# codes are of use. The maximum is out of the question.

# %%
plotting.scales(w, {name: config for name, config in QUANTIZERS.items() if config.weight is not WeightQuantizer.SIGN})

# %% [markdown]
# ## Activations
#
# Activations are rounded to integers as well, to 8 bits of their largest magnitude. Each token has a scale of its own, so that a loud
# token does not drown a quiet one: here the tokens differ in loudness by a factor of up to a hundred.

# %%
x = jnp.asarray((rng.normal(size=(64, K)) * 10 ** rng.uniform(-1, 1, (64, 1))).astype(np.float32))


def rounding_error(bits, over):
    """Error of each token relative to the token."""
    rounded = quant.fake_quantize_activations(x, QuantConfig(activation=over, activation_bits=bits))
    return (jnp.linalg.norm(rounded - x, axis=1) / jnp.linalg.norm(x, axis=1)).tolist()


over = {"a scale for each token": ActivationQuantizer.PER_TOKEN, "one scale for all": ActivationQuantizer.PER_TENSOR}
errors = {f"{bits} bits": {name: rounding_error(bits, choice) for name, choice in over.items()} for bits in (2, 4, 6, 8)}
plotting.bars(errors, "relative error, median and quartiles", "Rounding of activations", scale="log")

# %% [markdown]
# ## The gradient
#
# Rounding has slope 0 nearly everywhere, so nothing would be learned through it. The *straight-through estimator* leaves it out of the
# backward pass: a latent weight gets the gradient of the value that it was rounded to. It moves a little at each step, and now and then
# crosses a threshold.

# %%
plotting.straight_through(w, {"absmean (b1.58)": B158, "sign (b1)": QUANTIZERS["sign (b1)"]})

# %% [markdown]
# It is written `(w - sg(w)) + sg(q(w))`, where sg stops the gradient: the first bracket is exactly zero, so the forward value is exactly
# q(w). The usual `w + sg(q(w) - w)` rounds on the way, and a matrix of three values comes out with more.

# %%


def distinct(dtype):
    """Distinct values of a fake-quantised matrix of this type."""
    latent = w.astype(dtype)
    values = quant.dequantize_weights(quant.quantize_weights(latent, B158)).astype(dtype)
    usual = latent + jax.lax.stop_gradient(values - latent)
    ours = quant.straight_through(latent, values)
    assert jnp.array_equal(ours, values)
    return {
        name: len(np.unique(np.asarray(found, np.float32))) for name, found in (("(w - sg(w)) + sg(q)", ours), ("w + sg(q - w)", usual))
    }


plotting.bars({jnp.dtype(dtype).name: distinct(dtype) for dtype in (jnp.float32, jnp.bfloat16)}, "distinct values in the matrix")

# %% [markdown]
# ## The product
#
# Both operands are now integers times a scale, so the layer is a product of integers and one multiplication at the end: y = (codes of x)
# (codes of W) · scale of x · scale of W. Training computes it on the codes as floating-point numbers, which hold such integers exactly;
# inference on the packed bytes. Both give the same bits. Full precision is something else: the model has to learn with three values from
# the start.

# %%
trained = dot.quantized(x, w, B158)
forms = {"packed,\n2 bits": Encoding.TWO_BIT, "packed,\n1.6 bits": Encoding.BASE3}
packed = {name: params.pack_kernel(w, B158, encoding, name) for name, encoding in forms.items()}
found = {name: dot.packed(x, [weights], B158, "xla")[0] for name, weights in packed.items()}
assert all(jnp.array_equal(result, trained) for result in found.values())
plotting.against(trained, {**found, "full precision": dot.full(x, w)}, "Outputs of the layer, against those in training")

# %% [markdown]
# ## Bytes
#
# Three values carry log2(3) = 1.58 bits, hence the name. Four codes in a byte take 2 bits each, and are quick to unpack; five in a byte
# take 1.6.

# %%
bits = {
    "float32": 32,
    "bfloat16": 16,
    **{name: 8 * weights.codes.nbytes / w.size for name, weights in packed.items()},
    "log2(3)": np.log2(3),
}
plotting.bars({name: {"bits": value} for name, value in bits.items()}, "bits a weight")
