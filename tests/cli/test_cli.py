"""The command line: a wrong input is one line on standard error with the value and the rule, and an exit code."""

import json

import pytest

from bitnet_jax import cli
from bitnet_jax.cli import arguments
from bitnet_jax.config import Linear, TrainConfig, WeightQuantizer, to_json
from bitnet_jax.errors import RunError, UserError


def fails(capsys, *args):
    """The one line that the command ends with."""
    assert cli.main(list(args)) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0].removeprefix("bitnet-jax: error: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("fly",), "command 'fly' is unknown: must be one of quickstart, train, eval, generate, chat, pack, convert, info"),
        (("train", "gpt-5", "--out", "x"), "preset 'gpt-5' is unknown"),
        (("train", "ladder-1m"), "--out is missing"),
        (("train", "ladder-1m", "--out", "x", "--stepz", "5"), "Unrecognized options: --stepz, 5; perhaps --steps was meant"),
        (("train", "ladder-1m", "--out", "x", "--steps", "many"), "many"),
        (("train", "ladder-1m", "--out", "x", "--model.linear", "maybe"), "invalid choice 'maybe' for argument '--model.linear'"),
        (
            ("train", "ladder-1m", "--out", "x", "--batch-size", "6", "--accumulation", "4"),
            "batch_size=6 must be a multiple of accumulation=4",
        ),
        (("train", "ladder-1m", "--out", "x", "--config", "y.py"), "both given"),
        (("train", "--out", "x", "--config"), "--config needs a file"),
        (("train", "--out", "x", "--config", "no-such-file.py"), "does not exist"),
        (("train", "--out", "x", "--config", "config.yaml"), "must be a .json or a .py file"),
        (("train", "ladder-1m", "--out", "x", "--data.source", "no-such-file.txt"), "no-such-file.txt"),
        (("info", "no-such-run"), "no-such-run does not exist"),
        (("pack", "no-such-run", "x.safetensors"), "no-such-run does not exist"),
        (("generate", "no-such-run", "hello"), "no-such-run does not exist"),
        (("generate", "no-such-run", "hello", "--top-p", "2"), "top_p=2.0 must lie above 0 and be at most 1"),
        (("eval", "no-such-run"), "no-such-run does not exist"),
    ],
)
def test_a_wrong_input_is_one_line(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *args)
    assert not (tmp_path / "x").exists()


def test_help_lists_every_command_and_flag(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--model.quant.weight" in text
    assert "Peak learning rate" in text


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bitnet-jax 0.")


def test_flags_change_the_preset_and_the_result_is_printed(capsys):
    flags = [
        "ladder-0.2m",
        "--out",
        "x",
        "--show-config",
        "--model.linear",
        "full",
        "--model.quant.weight",
        "sign",
        "--steps",
        "77",
        "--optimizer.clip-norm",
        "None",
    ]
    assert cli.main(["train", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"]["linear"] == "full"
    assert printed["model"]["quant"]["weight"] == "sign"
    assert printed["steps"] == 77
    assert printed["optimizer"]["clip_norm"] is None


def test_a_configuration_file_is_a_starting_point(tmp_path):
    base = arguments.from_preset("ladder-0.2m")
    (tmp_path / "config.json").write_text(to_json(base))
    assert arguments.from_file(tmp_path / "config.json") == base
    (tmp_path / "config.py").write_text(
        "from dataclasses import replace\nfrom bitnet_jax.cli.arguments import from_preset\n"
        "base = from_preset('ladder-0.2m')\nconfig = replace(base, steps=123, model=base.model.twin)\n"
    )
    found, rest = arguments.starting_point(["--seed", "3", f"--config={tmp_path / 'config.py'}", "--steps", "9"], "train")
    assert (found.steps, found.model.linear, rest) == (123, Linear.FULL, ["--seed", "3", "--steps", "9"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 3", "must define `config`, a bitnet_jax.TrainConfig, not int"),
        ("x = 1", "not NoneType"),
        ("1/0", "fails with ZeroDivisionError"),
    ],
)
def test_a_configuration_file_without_one_is_named(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        arguments.from_file(path)


def test_every_preset_is_a_starting_point():
    from bitnet_jax.presets import presets

    for name in presets():
        assert isinstance(arguments.from_preset(name), TrainConfig)
    assert arguments.from_preset("bitnet-b1-125m").model.quant.weight is WeightQuantizer.SIGN


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunError("the disk\nis full"), 1, "bitnet-jax: error: the disk is full"),
        (OSError(28, "No space left on device"), 1, "bitnet-jax: error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "bitnet-jax: interrupted"),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(capsys, monkeypatch, error, code, line):
    def broken(name):
        raise error

    monkeypatch.setattr(cli.importlib, "import_module", broken)
    assert cli.main(["info", "x"]) == code
    assert capsys.readouterr().err.strip() == line


def test_a_preset_can_be_asked_about(capsys):
    assert cli.main(["info", "bitnet-b1.58-2b4t", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == 2_412_820_480
    assert cli.main(["info", "bitnet-b1.58-2b4t"]) == 0
    assert "2,412,820,480" in capsys.readouterr().out
