"""The letter legend of every shape in this project, and jaxtyping names for the arrays that cross a function's edge.

    B  batch                      D  width of the residual stream       M  rows of a product (tokens)
    T  time (query positions)     F  width of the feed-forward          K  inputs of a product, and its sum's length
    S  cache positions            N  query heads                        N  outputs of a product
    L  layers                     K  key and value heads                G  groups of inputs that share a weight scale
    V  vocabulary                 H  features of one head

`N` and `K` mean heads in attention and the sides of a matrix in products; a docstring says which where both could be meant.
Weight matrices are [K, N]: inputs first, as in Flax.
"""

from jaxtyping import Array, Float, Float32, Int, Int8, Int32, Shaped, UInt8

Tokens = Int32[Array, "B T"]
Positions = Int32[Array, "B T"]
Lengths = Int32[Array, "B"]
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]
Values = Float[Array, "B S K H"]
Kernel = Float32[Array, "*layers K N"]

__all__ = [
    "Array",
    "Float",
    "Float32",
    "Hidden",
    "Int",
    "Int8",
    "Int32",
    "Kernel",
    "Keys",
    "Lengths",
    "Logits",
    "Positions",
    "Queries",
    "Shaped",
    "Tokens",
    "UInt8",
    "Values",
]
