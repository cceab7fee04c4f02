"""Pictures of bytes, files and memory agree with the format, the file's header and the costs."""

from pathlib import Path

import numpy as np
import pytest

from bitnet_jax import costs, plotting
from bitnet_jax.config import DType, ModelConfig
from bitnet_jax.errors import UserError
from bitnet_jax.formats import model_file, safetensors
from bitnet_jax.formats.random_model import random_packed
from kernels_pallas import Encoding, pack
from tests.plotting.drawing import drawn, labels
from tests.shapes import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"


@pytest.mark.parametrize(("encoding", "planes", "size"), [(Encoding.TWO_BIT, 4, 32), (Encoding.BASE3, 5, 40)])
def test_a_byte_stands_below_its_weights(encoding: Encoding, planes: int, size: int) -> None:
    matrix = np.random.default_rng(0).integers(-1, 2, (200, 3)).astype(np.int8)
    packed = pack(matrix, np.float32(1).reshape(()), encoding)
    block = 1 if encoding is Encoding.TWO_BIT else 0
    (axes,) = drawn(plotting.packed_block(packed, output=2, block=block)).axes
    texts = [text.get_text() for text in axes.texts]
    drawn_weights = np.array(texts[::2], int).reshape(planes, 32)
    k = np.array(texts[1::2], int).reshape(planes, 32)
    column = np.pad(matrix[:, 2], (0, 256 - 200))
    np.testing.assert_array_equal(drawn_weights, column[k])
    np.testing.assert_array_equal(k, block * 128 + np.arange(planes)[:, None] * size + np.arange(32))
    shown = [tick.get_text() for tick in axes.get_xticklabels()]
    assert [int(text, 16) for text in shown] == np.asarray(packed.codes)[2, block * 32 : block * 32 + 32].tolist()
    hatched = np.array([patch.get_hatch() is not None for patch in axes.patches]).reshape(planes, 32)
    np.testing.assert_array_equal(hatched, k >= 200)
    powers = 4 ** np.arange(3, -1, -1) if encoding is Encoding.TWO_BIT else 3 ** np.arange(4, -1, -1)
    assert int(shown[7], 16) == ((drawn_weights[:, 7] + 1) * powers).sum()


@pytest.mark.parametrize(("output", "block"), [(3, 0), (-1, 0), (0, 2)])
def test_a_block_that_is_not_there_is_named(output: int, block: int) -> None:
    packed = pack(np.zeros((200, 3), np.int8), np.float32(1).reshape(()))
    with pytest.raises(UserError, match=rf"output={output}, block={block}: must be below 3 and 2"):
        plotting.packed_block(packed, output, block)


def test_a_stack_has_no_block() -> None:
    with pytest.raises(UserError, match=r"packed has shape \(2, 200, 3\): must be one matrix"):
        plotting.packed_block(pack(np.zeros((2, 200, 3), np.int8), np.ones(2, np.float32)))


def spans(axes) -> dict[str, list[tuple[float, float]]]:
    return {
        bars.get_label().split(":")[0]: [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in bars.get_paths()]
        for bars in axes.collections
    }


@pytest.mark.parametrize("name", ["ours", "bitnet_packed", "bitnet_master"])
def test_a_file_is_drawn_from_its_first_byte_to_its_last(name: str, tmp_path: Path) -> None:
    path = GOLDEN / name / "model.safetensors"
    if name == "ours":
        path = tmp_path / "model.safetensors"
        model_file.write(path, random_packed(tiny()))
    figure = drawn(plotting.file_layout(path))
    found = spans(figure.axes[0])
    kinds = {"header", "embedding", "norms"} | ({"weights"} if name == "bitnet_master" else {"packed weights", "scales"})
    assert kinds <= set(found) <= kinds | {"head"}
    places = sorted(span for kind in found.values() for span in kind)
    assert places[0][0] == 0
    assert places[-1][1] == pytest.approx(path.stat().st_size / 1e3)
    np.testing.assert_allclose([stop for _, stop in places[:-1]], [start for start, _ in places[1:]])
    tensors = safetensors.File(path).tensors
    packed = sum(info.stop - info.start for info in tensors.values() if info.dtype == "U8") / 1e3
    assert sum(stop - start for start, stop in found.get("packed weights", [])) == pytest.approx(packed)
    norms = sum(info.stop - info.start for name, info in tensors.items() if "norm" in name) / 1e3
    assert sum(stop - start for start, stop in found["norms"]) == pytest.approx(norms)


def test_memory_is_what_the_costs_say() -> None:
    config = ModelConfig.preset("bitnet-b1.58-2b4t")
    (axes,) = drawn(plotting.memory(config)).axes
    assert labels(axes) == ["embedding", "attention", "ffn", "norms"]  # the head is the embedding
    for bars, part in zip(axes.containers, labels(axes), strict=True):
        expected = [getattr(costs.bytes_by_part(config, form, DType.BFLOAT16), part) / 1e9 for form in costs.Storage]
        np.testing.assert_allclose([bar.get_width() for bar in bars], expected)
    assert [text.get_text().strip() for text in axes.texts] == ["9.65 GB", "4.83 GB", "1.18 GB", "1.07 GB"]


def test_a_twin_has_no_packed_memory() -> None:
    (axes,) = drawn(plotting.memory(tiny(tie_embeddings=False).twin)).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["float32", "bfloat16"]
    assert "head" in labels(axes)
