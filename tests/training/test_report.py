import io
import logging
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.training.report import Bar, Plain, Quiet, Reporter, RunStart, reporter_for
from bitnet_jax.training.step import StepMemory
from tests.training.runs import small_config

LINE: dict[str, Any] = {
    "kind": "train", "step": 4, "loss": 2.5, "learning_rate": 1e-3,
    "tokens_per_second": 1234.5, "model_flop_utilisation": 0.42, "non_finite": 0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tell(reporter: Reporter, *lines: dict[str, Any]) -> None:
    reporter.started(RunStart(small_config(), Path("runs/a"), 2, 12_345, "TPU v5e"))
    reporter.compiled(1.25, StepMemory(3_000_000, 2_500_000_000, 8_000_000_000))
    reporter.advanced(3)
    for line in lines:
        reporter.logged(line)
    reporter.saving(4)
    reporter.warned("checkpoint [bold] is damaged")
    reporter.closed()


def test_plain_lines_say_what_happens() -> None:
    stream = io.StringIO()
    tell(Plain(stream), LINE, {"kind": "evaluation", "step": 4, "validation_loss": 3.25})
    assert stream.getvalue().splitlines() == [
        "runs/a: resuming at step 2 of 8 of 4 x 8 tokens, 12,345 parameters (bit), TPU v5e",
        "compiled the training step in 1.2 s; each device holds 3.0 MB of state and batch, and 2.50 GB within a step, of 8.00 GB",
        "step 4/8  loss 2.5000  lr 1.00e-03  1,234 tok/s  MFU 42.0%",
        "step 4/8  validation_loss 3.25",
        "step 4: writing a checkpoint",
        "warning: checkpoint [bold] is damaged",
    ]


def test_plain_lines_do_without_what_is_unknown_and_say_what_is_not_finite() -> None:
    stream = io.StringIO()
    tell(Plain(stream), LINE | {"loss": None, "tokens_per_second": None, "model_flop_utilisation": None, "non_finite": 2})
    assert "step 4/8  loss not finite  lr 1.00e-03  2 not finite" in stream.getvalue().splitlines()


def test_bar_shows_progress_numbers_and_time_left_with_warnings_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    tell(Bar(stream), LINE)
    shown = stream.getvalue()
    assert "3/8" in shown
    assert "loss 2.5000" in shown
    assert "left" in shown
    assert "warning: checkpoint [bold] is damaged" in shown


def test_terminal_gets_a_bar_and_everything_else_plain_lines() -> None:
    assert isinstance(reporter_for(Terminal()), Bar)
    assert isinstance(reporter_for(io.StringIO()), Plain)


def test_warnings_reach_logging_where_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bitnet_jax"):
        tell(Quiet(), LINE)
    assert [record.message for record in caplog.records] == ["checkpoint [bold] is damaged"]
