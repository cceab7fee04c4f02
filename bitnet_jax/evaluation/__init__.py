"""How well a model predicts text.

perplexity     over all tokens of a text, with a stated window and stride; Perplexity
evaluator      the same as a function of the parameters, for the training loop
"""

from bitnet_jax.evaluation.perplexity import Perplexity, evaluator, perplexity

__all__ = ["Perplexity", "evaluator", "perplexity"]
