"""Generation: what a plain loop over the full forward pass gives, streamed or not, alone or in a batch, latent or packed."""

import functools
from collections import defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cpu
from bitnet_jax import params as trees
from bitnet_jax.config import DType, FeedForward
from bitnet_jax.data import byte_tokenizer, train_bpe
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.inference import Finish, Sampling, Stream, first_pass, generate, prompts, stream
from bitnet_jax.inference.decoding import Plan, programs
from bitnet_jax.inference.sampling import GREEDY, Controls
from bitnet_jax.transformer import KVCache, Transformer
from tests.shapes import tiny

CONFIG = tiny(vocab_size=300, init_std=0.3)  # 43 ids more than the tokenizer has
BYTES = byte_tokenizer()
NEW = 12  # prompts of 5 to 16 tokens share their compiled programs, for they need a cache of 32
PROMPTS = [[72, 101, 108, 108, 111], list(range(65, 78)), [32, 7, 45, 46, 200, 201, 202], [84, 111, 32, 98, 101, 32]]
DRAWN = Sampling(temperature=1.5, top_k=40, top_p=0.95, repetition_penalty=1.3)
SAMPLING = [GREEDY, GREEDY, DRAWN, DRAWN]
SEEDS = [1, 2, 33, 44]


@functools.cache
def params():
    return jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(4), jnp.zeros((1, 2), jnp.int32))["params"])()


def run(given=PROMPTS, function=generate, tree=None, **changes):
    options = {"max_new_tokens": NEW, "tokenizer": BYTES, "sampling": SAMPLING, "seed": SEEDS} | changes
    return function(params() if tree is None else tree, CONFIG, given, **options)


@functools.cache
def whole():
    """Two greedy rows and two drawn ones: what the tests below arrive at in other ways."""
    return run().rows


def tokens(rows):
    return [row.tokens.tolist() for row in rows]


def joined(pieces):
    """Tokens, text and finish of each row of a stream."""
    ids, texts, finish = defaultdict(list), defaultdict(str), {}
    for piece in pieces:
        assert piece.row not in finish
        ids[piece.row] += [] if piece.token is None else [piece.token]
        texts[piece.row] += piece.text
        if piece.finish is not None:
            finish[piece.row] = piece.finish
    return [(ids[row], texts[row], finish[row]) for row in sorted(ids)]


def summary(rows):
    return [(row.tokens.tolist(), row.text, row.finish) for row in rows]


def test_greedy_tokens_are_those_of_the_full_forward_pass():
    tree = params()
    forward = jax.jit(lambda ids: jnp.argmax(Transformer(CONFIG).apply({"params": tree}, ids).logits[0, :, : BYTES.vocab_size], -1))
    for row, prompt in zip(whole()[:2], PROMPTS, strict=False):
        ids = list(prompt)
        for _ in range(NEW):
            ids.append(int(forward(jnp.array([ids + [0] * (32 - len(ids))], jnp.int32))[len(ids) - 1]))
        assert row.tokens.tolist() == ids[len(prompt) :]
        assert row.prompt.tolist() == prompt
        assert row.finish is Finish.LENGTH
    assert len({token for row in tokens(whole()[:2]) for token in row}) >= 8  # else the model says nothing


def test_a_row_of_a_batch_gets_what_it_gets_alone():
    for number in range(4):
        alone = run([PROMPTS[number]], sampling=SAMPLING[number], seed=SEEDS[number])
        assert summary(alone.rows) == [summary(whole())[number]]


def test_packed_parameters_generate_the_same_tokens():
    assert summary(run(tree=trees.pack(params(), CONFIG)).rows) == summary(whole())


def test_a_stream_gives_the_tokens_and_the_text_of_a_whole_generation():
    pieces = run(function=stream)
    assert joined(pieces) == summary(whole())
    assert summary(pieces.result().rows) == summary(whole())


def test_the_seed_decides():
    assert tokens(run().rows) == tokens(whole())
    other = tokens(run(seed=[5, 6, 33, 45]).rows)
    assert other[:3] == tokens(whole())[:3]  # greedy rows, and one with its seed
    assert other[3] != tokens(whole())[3]


def test_each_token_has_a_draw_of_its_own():
    level = {**params(), "final_norm": {"scale": params()["final_norm"]["scale"] * 0}}  # all tokens equally probable
    for row in tokens(run(tree=level).rows)[2:]:
        assert len(set(row)) >= NEW - 3


def test_rows_of_one_seed_differ_from_one_another():
    rows = tokens(run([PROMPTS[2]] * 4, sampling=[DRAWN] * 3 + [GREEDY], seed=33).rows)
    assert rows[0] == tokens(whole())[2]  # row 0 of its seed, wherever it stands
    assert len({tuple(row) for row in rows}) == 4


def test_text_is_the_decoded_tokens_and_ids_the_tokenizer_lacks_are_never_chosen():
    for row in whole():
        assert row.text == BYTES.decode(row.tokens)
        assert row.tokens.max() < BYTES.vocab_size
    plain = run(tokenizer=None).rows
    assert [row.text for row in plain] == [None] * 4
    assert max(row.tokens.max() for row in plain) >= BYTES.vocab_size


def test_a_stop_token_ends_its_row_alone_and_is_left_out():
    stop = tokens(whole())[0][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in tokens(whole())]
    result = run(stop_tokens=[stop])
    assert tokens(result.rows) == expected
    assert [row.finish for row in result.rows] == [Finish.STOP if stop in row else Finish.LENGTH for row in tokens(whole())]
    assert joined(run(function=stream, stop_tokens=[stop])) == summary(result.rows)
    assert any(row.finish is Finish.LENGTH for row in result.rows)


def test_the_loop_on_the_device_ends_when_every_row_has_stopped():
    ends = [row[4] for row in tokens(whole())]
    expected = max(next(i for i, token in enumerate(row) if token in ends) for row in tokens(whole())) + 1
    assert 1 < expected < NEW
    padded, lengths = prompts.pad([np.array(prompt) for prompt in PROMPTS])
    plan = Plan(
        seeds=jnp.array(SEEDS, jnp.uint32),
        draws=jnp.zeros(4, jnp.uint32),
        controls=Controls.of(SAMPLING),
        stops=jnp.array(ends, jnp.int32),
        vocabulary=jnp.int32(BYTES.vocab_size),
    )
    prefill, decode = programs(CONFIG, None)
    inputs = (params(), None, KVCache.empty(CONFIG, 4, 32), jnp.zeros((4, 16), jnp.int32), padded, lengths, plan)
    state, progress = prefill.prepare(*inputs)[0](*inputs)
    assert int(progress.count) == 1
    for limit, count in ((2, 2), (NEW, expected)):
        inputs = (params(), None, state, plan, np.int32(limit))
        state, progress = decode.prepare(*inputs)[0](*inputs)
        assert int(progress.count) == count
    assert state.seen is not None
    for row, prompt in enumerate(PROMPTS):  # neither padding of the prompt nor what follows a stop token
        made = progress.tokens[row, :expected].tolist()
        assert set(np.flatnonzero(state.seen[row])) - {0} == {*prompt, *made} - {0}
        assert (0 in np.flatnonzero(state.seen[row])) == (0 in made)
    assert state.cache.length.tolist() == [len(prompt) + expected - 1 for prompt in PROMPTS]  # the newest token is not in it yet


@pytest.mark.skipif(cpu.build.unavailable() is not None, reason=f"{cpu.build.unavailable()}")
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01),
        [GREEDY, Sampling(temperature=0.7, top_k=63), Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_k=2)],
        Sampling(temperature=1.5, top_k=64),  # more than the first pass finds: all logits
        Sampling(temperature=1.5, top_p=0.9),
        DRAWN,
    ],
)
def test_a_first_pass_changes_no_token(sampling, dtype):
    config = replace(CONFIG, dtype=dtype)
    rough = first_pass(params(), config)
    assert rough is not None
    options = {"max_new_tokens": NEW, "tokenizer": BYTES, "sampling": sampling, "seed": SEEDS}
    expected = generate(params(), config, PROMPTS, **options).rows
    assert tokens(generate(params(), config, PROMPTS, first_pass=rough, **options).rows) == tokens(expected)


@pytest.mark.skipif(cpu.build.unavailable() is not None, reason=f"{cpu.build.unavailable()}")
def test_equal_logits_are_equal_for_a_first_pass_too():
    level = {**params(), "final_norm": {"scale": params()["final_norm"]["scale"] * 0}}
    for sampling in (GREEDY, Sampling(temperature=1.0, top_k=3)):
        options = {"max_new_tokens": 4, "stop_tokens": [], "sampling": sampling, "seed": SEEDS}
        expected = run(tree=level, **options).rows
        assert tokens(run(tree=level, first_pass=first_pass(level, CONFIG), **options).rows) == tokens(expected)
    broken = {**params(), "final_norm": {"scale": params()["final_norm"]["scale"] * jnp.nan}}
    with pytest.raises(RunError, match="logits of new token 0 are not finite"):
        run(tree=broken, first_pass=first_pass(broken, CONFIG), sampling=GREEDY)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_a_damaged_scale_ends_the_run_whatever_computes_it(implementation):
    config = replace(CONFIG, ffn=FeedForward.RELU2)
    packed = trees.pack(jax.jit(lambda: Transformer(config).init(jax.random.key(4), jnp.zeros((1, 2), jnp.int32))["params"])(), config)
    for matrix in ("gate", "up"):
        for value in (np.nan, np.inf, 1e30):
            kernel = packed["blocks"]["ffn"][matrix]["kernel"]
            scale = np.array(kernel.scale)
            scale[0] = value
            ffn = {**packed["blocks"]["ffn"], matrix: {"kernel": replace(kernel, scale=scale)}}
            broken = {**packed, "blocks": {**packed["blocks"], "ffn": ffn}}
            if matrix == "up" and value == 1e30:
                continue  # large, and no more: the norm takes it back
            with pytest.raises(RunError, match="are not finite"):
                generate(broken, config, PROMPTS[:1], max_new_tokens=4, implementation=implementation)


def test_a_first_pass_is_made_only_where_it_has_a_use():
    for changes in ({"tie_embeddings": False}, {"vocab_size": 63}, {"logits_dtype": DType.BFLOAT16}):
        assert first_pass(params(), replace(CONFIG, **changes)) is None


def test_the_end_of_text_is_a_stop_token_unless_others_are_given():
    level = {**params(), "final_norm": {"scale": params()["final_norm"]["scale"] * 0}}  # all logits equal: greedy rows choose 0
    tokenizer = train_bpe(["ab"], 257)
    assert tokenizer.eos_id == 0
    assert summary(run(tree=level, tokenizer=tokenizer).rows)[:2] == [([], "", Finish.STOP)] * 2
    assert summary(run(tree=level, tokenizer=tokenizer, stop_tokens=()).rows)[:2] == [([0] * NEW, "", Finish.LENGTH)] * 2


@pytest.mark.parametrize("cut", [3, 7])
def test_text_ends_before_a_stop_string_streamed_or_not(cut):
    before = whole()[2]
    stop = before.text[cut : cut + 2]
    result = run(stop_strings=[stop, "never said"]).rows
    assert result[2].text == before.text[: before.text.index(stop)]
    assert result[2].finish is Finish.STOP
    assert result[2].tokens.tolist() == before.tokens[: len(result[2].tokens)].tolist()
    assert len(result[2].tokens) < NEW
    assert joined(run(function=stream, stop_strings=[stop, "never said"])) == summary(result)


def test_times_and_counts_are_reported():
    run()
    timing = run().timing
    made = [len(row.tokens) + (row.finish is Finish.STOP) for row in whole()]
    assert timing.prompt_tokens == sum(len(prompt) for prompt in PROMPTS)
    assert timing.new_tokens == sum(made)
    assert timing.decoded_tokens == sum(made) - 4
    assert timing.decode_tokens_per_second == timing.decoded_tokens / timing.decode_seconds
    assert timing.prefill_tokens_per_second == timing.prompt_tokens / timing.prefill_seconds


def test_other_settings_of_the_same_sizes_compile_nothing():
    run()
    prefill, decode = programs(CONFIG, None)
    before = prefill.compiled, decode.compiled
    for changes in (
        {"stop_tokens": [3, 4]},
        {"max_new_tokens": 15, "given": [[1], [2], [3, 4], [5] * 4]},
        {"seed": 3},
        {"function": stream},
    ):
        result = run(**changes)
        assert list(result if isinstance(result, Stream) else result.rows)
        assert (prefill.compiled, decode.compiled) == before


def test_logits_that_are_not_finite_end_the_run():
    broken = {**params(), "final_norm": {"scale": params()["final_norm"]["scale"] * jnp.nan}}
    with pytest.raises(RunError, match="logits of new token 0 are not finite"):
        run(tree=broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 52}, "prompt 1 has 13 tokens, with max_new_tokens=52 65: must be at most max_seq_len=64"),
        ({"stop_strings": ["x"], "tokenizer": None}, r"stop_strings=\['x'\] need a tokenizer"),
        ({"stop_tokens": [300]}, "stop token 300 must be from 0 to 299"),
        ({"seed": -1}, "seed=-1 must be from 0"),
        ({"seed": [1, 2]}, "seed has 2 values: must have one, or one for each of the 4 prompts"),
        ({"sampling": [DRAWN]}, "sampling has 1 values"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(changes, message):
    for function in (generate, stream):  # a stream, too, before its first piece is taken
        with pytest.raises(UserError, match=message):
            run(function=function, **changes)


def test_a_tokenizer_larger_than_the_model_is_named():
    with pytest.raises(UserError, match="the tokenizer has 257 ids"):
        generate(params(), replace(CONFIG, vocab_size=256), PROMPTS, max_new_tokens=1, tokenizer=BYTES)
