"""What a call of `ternary_matmul` looks like, and the named shapes that tests, benchmarks and tuning share."""

import dataclasses
from collections.abc import Iterator

from kernels_pallas.packing import Encoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One call, x [M, K] times w [K, N], as far as an implementation needs to know it to say whether it can run."""

    m: int
    """Rows of activations (M), leading axes flattened."""
    k: int
    """Input features (K)."""
    n: int
    """Outputs (N)."""
    x_dtype: str = "int8"
    """Type of the activations: int8, or float32, bfloat16 or float16 where only the weights are quantised."""
    out_dtype: str = "bfloat16"
    """Type of the result."""
    encoding: Encoding = Encoding.TWO_BIT
    """How the weights are packed."""
    group: int | None = None
    """Input features that share a weight scale; None is one scale per matrix."""
    platform: str = "cpu"
    """JAX's default backend where the call is traced: cpu, gpu or tpu."""


MATRICES: dict[str, tuple[int, int]] = {
    f"{model}/{matrix}": shape
    for model, hidden, ffn, kv in (  # hidden size, feed-forward size, key (and value) features
        ("700m", 1536, 4096, 1536),  # FAQ of b1.58, table of model shapes
        ("1.3b", 2048, 5460, 2048),
        ("3b", 3200, 8640, 3200),
        ("2b4t", 2560, 6912, 640),  # 2B4T, released configuration
        ("7b", 4096, 11008, 4096),  # a4.8, table of model shapes
    )
    for matrix, shape in (
        ("qkv", (hidden, hidden + 2 * kv)),
        ("o", (hidden, hidden)),
        ("gate_up", (hidden, 2 * ffn)),
        ("down", (ffn, hidden)),
    )
}
"""(K, N) of the linear layers of published models, 'model/matrix'; q, k, v are one product, and so are gate and up."""

DECODE_ROWS = (1, 2, 4, 8, 16, 32)
"""Values of M when every sequence of a batch adds one token."""

PREFILL_ROWS = (128, 512, 4096)
"""Values of M when prompts are read."""


def named(rows: tuple[int, ...] = DECODE_ROWS + PREFILL_ROWS) -> Iterator[tuple[str, ArgSpec]]:
    """Every matrix with every M in `rows`, as ('model/matrix/M', spec)."""
    for name, (k, n) in MATRICES.items():
        for m in rows:
            yield f"{name}/{m}", ArgSpec(m=m, k=k, n=n)
