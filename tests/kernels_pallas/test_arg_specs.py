"""The named shapes that tests, benchmarks and tuning share."""

import pytest

from kernels_pallas.arg_specs import DECODE_ROWS, MATRICES, PREFILL_ROWS, named


@pytest.mark.parametrize(
    ("model", "layers", "parameters"),
    [
        ("700m", 24, 679_477_248),  # linear parameters 4 h^2 L + 3 h f L, FAQ of b1.58
        ("1.3b", 24, 1_207_762_944),
        ("3b", 26, 3_221_504_000),
        ("2b4t", 30, 30 * (2 * 2560 * (2560 + 640) + 3 * 2560 * 6912)),
        ("7b", 32, 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
    ],
)
def test_the_matrices_of_a_model_hold_its_linear_parameters(model: str, layers: int, parameters: int) -> None:
    matrices = {name: k * n for name, (k, n) in MATRICES.items() if name.startswith(f"{model}/")}
    assert set(matrices) == {f"{model}/{matrix}" for matrix in ("qkv", "o", "gate_up", "down")}
    assert layers * sum(matrices.values()) == parameters


def test_every_matrix_comes_with_every_number_of_rows() -> None:
    specs = dict(named())
    assert len(specs) == len(MATRICES) * (len(DECODE_ROWS) + len(PREFILL_ROWS))
    spec = specs["2b4t/qkv/16"]
    assert (spec.m, spec.k, spec.n) == (16, 2560, 3840)
    assert {s.m for _, s in named(rows=(3,))} == {3}
