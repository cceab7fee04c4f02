"""The commands one after the other on a small run: train, resume, eval, pack, generate, info."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import bitnet_jax as bj
from bitnet_jax import cli
from bitnet_jax.cli.train import rehearsed, steps_of
from bitnet_jax.errors import UserError

ROOT = Path(__file__).parents[2]

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.\n\n" * 60
SMALL = (
    *("--steps", "4", "--batch-size", "2", "--data.seq-len", "16", "--data.tokenizer", "bytes", "--optimizer.warmup-steps", "1"),
    *("--output.log-every", "2", "--output.checkpoint-every", "2", "--output.no-tensorboard", "--model.vocab-size", "257"),
    *("--model.hidden-size", "32", "--model.ffn-size", "48", "--model.num-layers", "2", "--model.head-dim", "16"),
)


@pytest.mark.slow
def test_a_run_is_trained_evaluated_packed_and_used(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text("It was the spring of hope, it was the winter of despair.")
    train = ("train", "ladder-0.2m", "--out", "run", "--data.source", "corpus.txt", *SMALL)

    def out(*args):
        assert cli.main(list(args)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "run: 4 steps done" in out(*train)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert {"perplexity", "learning_rate", "weight_decay", "grad_norm", "tokens_per_second"} <= lines[0].keys()
    assert "run: 4 steps done" in out(*train)  # again: nothing is left to do

    assert cli.main([*train, "--seed", "1"]) == 2
    assert "seed: 0 → 1" in capsys.readouterr().err

    facts = json.loads(out("eval", "run", "other.txt", "--json", "--window", "16", "--stride", "8"))
    assert facts["tokens"] == facts["bytes"] == 56  # all of the text, and the end of text after it; the first token is not predicted
    assert 1 < facts["perplexity"] < 1000
    assert "bits per byte" in out("eval", "run")

    for encoding in ("two_bit", "base3"):
        assert "greedy tokens equal" in out("pack", "run", f"{encoding}.safetensors", "--encoding", encoding)
        packed = json.loads(out("eval", f"{encoding}.safetensors", "other.txt", "--json", "--window", "16", "--stride", "8"))
        assert packed["perplexity"] == pytest.approx(facts["perplexity"], rel=1e-6)
    assert cli.main(["pack", "run", "two_bit.safetensors"]) == 2
    assert "two_bit.safetensors exists: --force replaces it" in capsys.readouterr().err

    greedy = ("--temperature", "0", "--max-new-tokens", "12")
    texts = {out("generate", model, "It was", *greedy) for model in ("run", "two_bit.safetensors", "base3.safetensors")}
    assert len(texts) == 1
    assert texts.pop().startswith("It was")
    assert out("generate", "run", "It was", *greedy, "--no-stream") == out("generate", "run", "It was", *greedy)
    assert cli.main(["generate", "two_bit.safetensors", "It was", "--implementation", "cuda"]) == 2
    assert "implementation 'cuda' is unknown: must be one of reference, xla, mosaic_tpu, mosaic_gpu, native" in capsys.readouterr().err
    assert "--- 2 ---" in out("generate", "run", "It was", "the", *greedy)

    assert "It was" in out("generate", "run", "It was", *greedy, "--implementation", "xla")  # a run is packed before it is used
    assert cli.main(["train", "ladder-0.2m", "--model.linear", "full", "--out", "twin", "--data.source", "corpus.txt", *SMALL]) == 0
    assert cli.main(["generate", "twin", "It was", "--implementation", "reference"]) == 2
    assert "is for packed weights" in capsys.readouterr().err

    facts = json.loads(out("info", "two_bit.safetensors", "--json"))
    assert facts["packed"]
    assert len(facts["layers"]) == 14
    assert all(sum(row["fractions"]) == pytest.approx(1) for row in facts["layers"])
    assert "ternary weights" in out("info", "run")

    (tmp_path / "corpus.txt").write_text(TEXT + "Something else.")
    assert cli.main(["eval", "run"]) == 2
    assert "source='corpus.txt' has changed since run was begun" in capsys.readouterr().err
    (tmp_path / "corpus.txt").write_text(TEXT)
    for damaged in ('{"starts": 5}', '{"starts": [{"data": {}}]}'):
        (tmp_path / "run" / "provenance.json").write_text(damaged)
        assert cli.main(["eval", "run"]) == 2
        assert "provenance.json is not the provenance of a run" in capsys.readouterr().err

    model = bj.load("run")
    tokens = model.need_tokenizer().encode("It was")[None]
    assert bj.Transformer(model.config).apply({"params": model.params}, tokens).logits.shape == (1, 6, 257)


@pytest.mark.slow
def test_a_bfloat16_model_is_packed_and_proved(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(TEXT)
    train = ["train", "ladder-0.2m", "--out", "run", "--data.source", "corpus.txt", *SMALL, "--model.dtype", "bfloat16"]
    assert cli.main(train) == 0, capsys.readouterr().err
    assert cli.main(["pack", "run", "packed.safetensors"]) == 0, capsys.readouterr().err
    assert "greedy tokens equal" in capsys.readouterr().out


def test_a_file_that_is_not_proved_is_not_kept(tmp_path, capsys, monkeypatch):
    import jax
    import jax.numpy as jnp

    from bitnet_jax.cli import pack
    from bitnet_jax.errors import RunError
    from bitnet_jax.formats import model_file
    from bitnet_jax.formats import weights as leafwise
    from bitnet_jax.transformer import Transformer
    from tests.shapes import tiny

    params = jax.jit(lambda: Transformer(tiny()).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()
    model_file.write(tmp_path / "latent.safetensors", leafwise.from_params(params, tiny()))
    (tmp_path / "packed.safetensors").write_bytes(b"an earlier one")

    def disproved(latent, packed):
        raise RunError("the packed model is not the latent one")

    monkeypatch.setattr(pack, "prove", disproved)
    assert cli.main(["pack", str(tmp_path / "latent.safetensors"), str(tmp_path / "packed.safetensors"), "--force"]) == 1
    assert "is not the latent one" in capsys.readouterr().err
    assert (tmp_path / "packed.safetensors").read_bytes() == b"an earlier one"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latent.safetensors", "packed.safetensors"]


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "bitnet_jax", "train", "ladder-0.2m", "--out", "run", "--data.source", "corpus.txt", *SMALL]
    together = [[*command, "--coordinator", coordinator, "--processes", "2", "--process", str(i)] for i in (0, 1)]
    started = [
        subprocess.Popen(
            words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for words in together
    ]
    (out, err), (quiet, other) = (process.communicate(timeout=300) for process in started)
    assert [process.returncode for process in started] == [0, 0], err + other
    assert "run: 4 steps done" in out
    assert "step 4/4" in err
    assert "done" not in quiet
    assert "step" not in other


def test_a_rehearsal_takes_as_few_steps_as_are_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(TEXT)
    words = ("train", "ladder-0.2m", "--out", "run", "--data.source", "corpus.txt", *SMALL, "--steps", "2", "--dry-run")
    assert cli.main(list(words)) == 0
    assert "2 steps, an evaluation, a checkpoint and a second start went well" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("run")]


@pytest.mark.parametrize("words", [["--steps", "2", "--dry-run"], ["--dry-run", "--steps=2"]])
def test_warm_ups_fit_into_a_rehearsal(words):
    optimizer = bj.OptimizerConfig(warmup_steps=20, quant_warmup_steps=9)
    base = bj.TrainConfig(model=bj.ModelConfig.preset("ladder-0.2m"), optimizer=optimizer)
    assert rehearsed(base, words).optimizer == replace(optimizer, warmup_steps=1, quant_warmup_steps=2)
    assert rehearsed(base, [word for word in words if word != "--dry-run"]) == base


@pytest.mark.parametrize(("signal", "code"), [("SIGINT", 130), ("SIGTERM", 1)])
def test_a_rehearsal_that_was_stopped_is_no_success(tmp_path, capsys, monkeypatch, signal, code):
    monkeypatch.setattr("bitnet_jax.cli.train.train", lambda *_, **__: SimpleNamespace(stopped_by=signal, step=1, seconds=1.0))
    assert cli.main(["train", "ladder-0.2m", "--out", str(tmp_path / "run"), "--dry-run"]) == code
    assert f"stopped by {signal} before the rehearsal was through" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["²:³", "5", "7:5", "0:3", "a:b", "3:3", "-1:4"])
def test_steps_to_trace_must_be_a_range(text):
    with pytest.raises(UserError, match=rf"--profile {text} must be START:STOP"):
        steps_of(text)
