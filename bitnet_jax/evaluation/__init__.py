"""How well a model predicts text.

perplexity     over all tokens of a text, with a stated window and stride; Perplexity
evaluator      the same as a function of the parameters, for the training loop
likelihoods    log-probabilities of continuations behind contexts; Likelihood

`evaluation.harness` and `evaluation.tasks` are for the tasks of lm-evaluation-harness. They are not imported here: they need an extra.
"""

from bitnet_jax.evaluation.likelihood import Likelihood, likelihoods
from bitnet_jax.evaluation.perplexity import Perplexity, evaluator, perplexity

__all__ = ["Likelihood", "Perplexity", "evaluator", "likelihoods", "perplexity"]
