# %% [markdown]
# # 4. Loss against size
#
# Does ternary training cost less and less as models grow? The papers fit L(N) = a N^b + c to the losses of a BitNet and of its
# full-precision twin over sizes N (BitNet b1, section 4.1). This notebook draws this repository's results beside the papers' points, fits
# both, and shows what such a fit can say and what it cannot.
#
# It reads result files, which are in a clone of the repository: on Colab, clone it first and open the notebook there.

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
if ROOT is None:
    sys.exit("The result files and the programs of experiments/ are in a clone of the repository: open this notebook there.")
sys.path.insert(0, str(ROOT))  # experiments/ is no part of the installed package

import numpy as np

from bitnet_jax import plotting
from experiments import figures
from experiments.configs import scaling
from experiments.fit import Law

RESULTS = ROOT / "experiments" / "results" / "scaling"  # "scaling_gpu" or a folder of yours, with the same names of cells

# %% [markdown]
# ## What was run
#
# Each side of each size is trained at learning rates of its own, and then with more seeds at the best of them. The smallest size looks both
# ways; a larger one begins with the best rate of the size before and looks downwards alone, so that its best may be the highest that was
# tried. `experiments/configs/scaling.py` says how this differs from the papers: a million tokens a run in place of billions.

# %%
losses = figures.scaling_losses(RESULTS)
for side, sizes in losses.items():
    runs = ", ".join(f"{size:,} parameters: {len(seeds)}" for size, seeds in sizes.items())
    print(f"{side}: {len(sizes)} of {len(scaling.SIZES)} sizes have results; seeds of {runs or 'none'}")


def shown(figure):
    """A figure, or why there is none."""
    return figure or "Not run yet, or too little of it: python -m experiments.run scaling, a few hours on two CPU cores."


# %% [markdown]
# The sweep: loss against learning rate. A comparison at one rate for both sides measures the rate. The papers give the BitNet several
# times its twin's.

# %%
shown(figures.sweep_figure(RESULTS))

# %% [markdown]
# Loss against size, and the gap. Papers and results here differ in text, vocabulary and tokens, so heights do not compare across colours;
# slopes do, and the gap between two models of one colour. Lines and bands are fits to results here, from four sizes on.

# %%
shown(figures.scaling_figure(RESULTS))

# %% [markdown]
# ## An example of the fit
#
# The points of b1, read from its Figure 3, fitted by the same function: they are the paper's, not ours. The fit to models of up to 6.7
# billion parameters meets the two that it has not seen, and the paper's own curves. The band (95 %) is what the scatter of the points
# about the curve allows: at 100 billion parameters the printed gap of 0.09 bits (0.06 nats) lies inside, and the band's ends differ by a
# factor of two.

# %%
figures.b1_figure()

# %% [markdown]
# ## What the fit can say
#
# Three coefficients from a handful of sizes: a steeper curve with a higher floor fits nearly as well as a flatter one with a lower floor.
# So floors and exponents of two sides, each by itself, are known far worse than their gap at a size that was run. Each point is a fit to
# losses drawn anew (1000 draws); crosses are the fits.

# %%
fits = figures.scaling_fits(losses)
title = "Example: draws of the fit to b1's points" if fits is None else "Draws of the fits to results here"
figures.coefficients_figure(fits or figures.b1_fits(), title)

# %% [markdown]
# How far does it reach? The loss of b1's BitNet of 30 billion parameters as the fit to its smallest sizes predicts it, less the loss that
# it had: median and quartiles over the draws. Four sizes leave one degree of freedom for three coefficients: their fit misses by a tenth
# of a nat, and its draws do not say so.

# %%
found = figures.B1_LARGER[30e9] * np.log(2)


def misses(sizes):
    """Predicted less found, for each draw of the fit to so many sizes."""
    return [float(Law(*draw)(30e9)) - found for draw in figures.b1_fits(sizes)["bitnet"].draws]


plotting.bars(
    {f"{sizes} sizes,\nup to {largest}": {"at 30B": misses(sizes)} for sizes, largest in ((4, "1.3B"), (5, "2.7B"), (6, "6.7B"))},
    "nats, predicted less found",
    "Example: b1's points",
)
