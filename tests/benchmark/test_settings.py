"""What is measured: wrong values are found before anything runs, and what other programs print is read or refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_jax.benchmark import processes, settings
from bitnet_jax.benchmark.settings import Peer, Settings, read_peer, read_speeds
from bitnet_jax.errors import UserError
from tests.shapes import tiny

PACES = st.floats(1e-3, 1e6)


def llama_bench(prefill, decode):
    tests = [{"n_prompt": 128, "n_gen": 0, "avg_ts": prefill}, {"n_prompt": 0, "n_gen": 64, "avg_ts": decode}]
    return json.dumps([{"model_type": "bitnet 2B", "samples_ns": [1]} | test for test in tests], indent=2)


@given(PACES, PACES, st.sampled_from(["", "warning: asserts enabled\nload: [ok]\n", "{}\n[]\n", "[\n"]))
def test_both_kinds_of_output_are_read_whatever_stands_before(prefill, decode, noise):
    expected = {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}
    assert read_speeds(noise + llama_bench(prefill, decode)) == expected
    assert read_speeds(noise + json.dumps(expected)) == expected


def test_a_speed_that_was_not_measured_is_left_out():
    assert read_speeds('{"prefill_tokens_per_second": 5, "decode_tokens_per_second": null}') == {"prefill_tokens_per_second": 5.0}


@pytest.mark.parametrize(
    "output",
    [
        "",
        "no JSON",
        "[]",
        "[1, 2]",
        "[[[[",
        '{"speed": 3}',
        '{"decode_tokens_per_second": "fast"}',
        '{"decode_tokens_per_second": 0}',
        '{"decode_tokens_per_second": NaN}',
        '{"decode_tokens_per_second": Infinity}',
        '[{"n_gen": 64, "avg_ts": null}]',
    ],
)
def test_anything_else_is_refused(output):
    with pytest.raises(ValueError, match="it printed no speeds"):
        read_speeds(output)


def test_a_command_takes_the_cell_and_keeps_other_braces():
    peer = read_peer("llama.cpp='my bench' -p {prompt} -n {generate} -t {threads} -x '{\"a\": {b}}'")
    assert peer.name == "llama.cpp"
    assert peer.words(128, 64, 2) == ["my bench", "-p", "128", "-n", "64", "-t", "2", "-x", '{"a": {b}}']


@pytest.mark.parametrize("text", ["", "name", "=command", "name=", "name=  ", "name='open"])
def test_a_peer_of_another_form_is_refused(text):
    with pytest.raises(UserError, match="peer '"):
        read_peer(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": (1, 0)}, "threads=0 must be from 1 to 2, the cores that this process may use"),
        ({"threads": (3,)}, "threads=3 must be from 1 to 2"),
        ({"threads": ()}, "threads is empty"),
        ({"prompt": (0,)}, "prompt=0 must be at least 1"),
        ({"generate": (64, 1)}, "generate=1 must be at least 2"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be from 0"),
        ({"peers": (Peer(name="a", command="no-such-program -x"),)}, "peer 'a': no-such-program is no program that can be run"),
        ({"peers": (Peer(name="a", command="ls"), Peer(name="a", command="ls"))}, "peer 'a' has a name that is taken"),
        ({"peers": (Peer(name="bitnet-jax", command="ls"),)}, "peer 'bitnet-jax' has a name that is taken"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(monkeypatch, changes, message):
    monkeypatch.setattr(processes, "cores", lambda: [4, 7])
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Settings(**{"threads": (1, 2), **changes})


def test_prompt_and_new_tokens_must_fit_the_context(monkeypatch):
    Settings(threads=(1,), prompt=(8, 32), generate=(2, 32)).check_lengths(tiny())
    with pytest.raises(UserError, match="prompt=33 with generate=32 is 65 tokens: must be at most max_seq_len=64 of the model"):
        Settings(threads=(1,), prompt=(33, 8), generate=(2, 32)).check_lengths(tiny())


def test_a_shape_is_a_preset_or_a_short_name():
    assert [settings.preset_of(name) for name in ("2b4t", "ladder-1m")] == ["bitnet-b1.58-2b4t", "ladder-1m"]
    with pytest.raises(UserError, match="shape '2b' is unknown: must be 2b4t, 700m, or a preset"):
        settings.preset_of("2b")
