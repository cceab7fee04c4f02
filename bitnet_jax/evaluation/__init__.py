"""How well a model predicts text, and what goes on inside it meanwhile.

perplexity              over all tokens of a text, with a stated window and stride; Perplexity
evaluator               the same as a function of the parameters, for the training loop
likelihoods             log-probabilities of continuations behind contexts; Likelihood
activation_statistics   ranges, outliers and zeros of what the linear layers multiply; ActivationStatistics

`evaluation.harness` and `evaluation.tasks` are for the tasks of lm-evaluation-harness. They are not imported here: they need an extra.
"""

from bitnet_jax.evaluation.activations import ActivationStatistics, activation_statistics
from bitnet_jax.evaluation.likelihood import Likelihood, likelihoods
from bitnet_jax.evaluation.perplexity import Perplexity, evaluator, perplexity

__all__ = ["ActivationStatistics", "Likelihood", "Perplexity", "activation_statistics", "evaluator", "likelihoods", "perplexity"]
