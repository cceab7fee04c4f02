"""`bitnet-jax convert` as a user meets it: a proof on the last line, or one line of error and nothing left behind."""

from pathlib import Path

import pytest

from bitnet_jax import cli, conversion
from bitnet_jax.config import FeedForward
from bitnet_jax.data import byte_tokenizer
from bitnet_jax.formats import model_file
from bitnet_jax.formats.random_model import random_packed
from bitnet_jax.formats.weights import Assets
from tests.shapes import tiny

CONFIG = tiny(vocab_size=257, ffn=FeedForward.RELU2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    model_file.write(path, random_packed(CONFIG, Assets(tokenizer=byte_tokenizer().to_json())))
    return path


def test_a_conversion_ends_with_its_proof(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("hf")
    assert cli.main(["convert", str(source), str(target), "--to", "hf-packed"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{target}: ")
    assert "from a model file" in first
    assert last.startswith("proof: 15,360 ternary weights equal, ")
    assert last.endswith("8 of 8 greedy tokens equal")
    assert (target / "config.json").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing", "out", "--to", "packed"], "missing does not exist"),
        (["{source}", "{source}", "--to", "packed"], "exists: --force replaces it"),
        (["{source}", "{source}", "--to", "packed", "--force"], "is the source: must be another path"),
        (["{source}", "{folder}/full", "--to", "orbax"], "exists: --force replaces it"),
        (["{source}", "{folder}/out.bin", "--to", "packed"], "must end in .safetensors"),
        (["{source}", "{folder}/no/out", "--to", "hf-packed"], "cannot be written: No such folder"),
        (["{source}", "{folder}/out", "--to", "onnx"], "invalid choice"),
        (["{source}", "{folder}/out", "--to", "hf-master"], "packed"),
        (["{source}", "{folder}/out", "--to", "hf-packed", "--variant", "trilm"], "variant=trilm is for a Hugging Face folder"),
        (["{source}", "{folder}/out", "--to", "hf-packed", "--revision", "main"], "revision=main is for a model on the hub"),
    ],
)
def test_a_wrong_input_is_one_line(source: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (source.parent / "full").mkdir()
    (source.parent / "full" / "x").touch()
    before = sorted(path.name for path in source.parent.rglob("*"))
    assert cli.main(["convert", *(arg.format(source=source, folder=source.parent) for arg in args)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bitnet-jax: error: ")
    assert message in error
    assert sorted(path.name for path in source.parent.rglob("*")) == before


def test_an_interrupt_leaves_nothing_behind(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "prove", interrupted)
    assert cli.main(["convert", str(source), str(source.with_name("hf")), "--to", "hf-packed"]) == 130
    assert [path.name for path in source.parent.iterdir()] == ["model.safetensors"]


def test_force_replaces_a_model_and_nothing_else(source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source.parent
    target = folder / "orbax"
    convert = ["convert", str(source), str(target), "--to", "orbax", "--force"]
    assert cli.main(convert) == 0
    (target / "old").touch()
    assert cli.main(convert) == 0
    assert sorted(path.name for path in target.iterdir()) == ["model.json", "params", "tokenizer.json"]
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter").touch()
    (folder / "link").symlink_to(folder / "thesis")
    monkeypatch.chdir(folder / "thesis")
    for name, message in (
        ("thesis", "holds the source or the current folder"),
        (".", "holds the source or the current folder"),
        ("link", "holds the source or the current folder"),
    ):
        assert cli.main(["convert", str(source), str(folder / name), "--to", "hf-packed", "--force"]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.chdir(target)
    for name, message in (("thesis", "but no model's that is written here"), ("link", "exists and is no folder")):
        assert cli.main(["convert", str(source), str(folder / name), "--to", "hf-packed", "--force"]) == 2
        assert message in capsys.readouterr().err
    assert (folder / "thesis" / "chapter").exists()
    assert source.exists()


def test_choices_that_a_format_does_not_have_are_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(source), str(source.with_name("hf")), "--to", "hf-packed", "--type", "tq1_0"]) == 2
    assert "type is no choice of hf-packed: it has dtype" in capsys.readouterr().err
    assert cli.main(["convert", str(source), str(source.with_name("a.bin")), "--to", "gguf"]) == 2
    assert "a.bin must end in .gguf" in capsys.readouterr().err
