"""What `models.load` does to parameters beyond reading them; the formats have their own tests."""

from pathlib import Path

import jax
import numpy as np
import pytest

from bitnet_jax import models
from bitnet_jax.config import DType, Layers
from bitnet_jax.formats import model_file
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.random_model import random_packed
from kernels_pallas import Encoding, PackedTernary, mosaic_tpu
from tests.shapes import tiny


@pytest.mark.parametrize("layers", list(Layers))
def test_codes_are_laid_out_for_a_tpu_and_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: Layers) -> None:
    path = tmp_path / "tiny.safetensors"
    model_file.write(path, leafwise.packed(random_packed(tiny(dtype=DType.BFLOAT16, layers=layers)), Encoding.TWO_BIT))
    plain = models.load(path)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    placed = models.load(path)
    pairs = list(zip(*(jax.tree.leaves(m.params, is_leaf=models._is_packed) for m in (plain, placed)), strict=True))
    packed = [(before, after) for before, after in pairs if isinstance(before, PackedTernary)]
    assert packed
    for before, after in packed:
        assert np.array_equal(before.codes, after.codes)
        assert after.codes.format.layout.major_to_minor == mosaic_tpu.placed(before.codes.ndim)
        assert before.codes.format.layout.major_to_minor != mosaic_tpu.placed(before.codes.ndim)
