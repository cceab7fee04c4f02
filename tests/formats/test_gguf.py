"""Models as GGUF: what is written is what is read, for each graph and type; what a program would compute otherwise is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import params as trees
from bitnet_jax.config import ActivationQuantizer, DType, FeedForward, Layers, NormKind, NormPlacement, QuantConfig
from bitnet_jax.config import WeightQuantizer as W
from bitnet_jax.data.tokenizers import byte_tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats import gguf, gguf_container
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.gguf_blocks import BlockType
from bitnet_jax.formats.proof import prove
from bitnet_jax.formats.weights import Assets
from bitnet_jax.transformer import Transformer, parameter_shapes
from kernels_pallas import Encoding, PackedTernary, unpack
from tests.shapes import tiny

SIZES = {"vocab_size": 257, "hidden_size": 256, "ffn_size": 512, "head_dim": 64, "num_layers": 2}
BITNET = tiny(**SIZES)
RELU2 = replace(BITNET, ffn=FeedForward.RELU2)
LLAMA = replace(BITNET, norm=NormPlacement.NONE, tie_embeddings=False)
TRILM = replace(LLAMA, quant=QuantConfig(activation=ActivationQuantizer.NONE))
PROGRAM = {"bitnet": "llama.cpp", "bitnet-b1.58": "bitnet.cpp", "llama": "llama.cpp"}
FLOATS = ("f32", "f16", "bf16", "q8_0")
Q = ("block_1", "attn", "q", "kernel")


def random_weights(config):
    rng = np.random.default_rng(0)

    def values(path, leaf):
        low, high = (0.5, 2) if path[-1] == "scale" else (-0.1, 0.1)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    params = trees.map_leaves(values, parameter_shapes(config))
    return leafwise.from_params(params, config, assets=Assets(tokenizer=byte_tokenizer().to_json()), where="the model")


def written(tmp_path, weights, type="tq2_0", target="llama.cpp", embedding="f32", name="model.gguf"):
    path = tmp_path / name
    assert gguf.write(path, weights, type=type, embedding=embedding, target=target) == path.stat().st_size
    return path


def logits(weights):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, weights.config.vocab_size, (2, 9)).astype(np.int32))
    return np.asarray(jax.jit(Transformer(weights.config).apply)({"params": leafwise.load(weights)}, tokens).logits)


def rewrite(path, metadata=None, tensors=None, drop=()):
    """The file with other metadata, and other (type, shape, bytes) of tensors."""
    file = gguf_container.File(path)
    found = {name: (info.kind, info.shape, np.array(file.raw(name))) for name, info in file.tensors.items() if name not in drop}
    found |= tensors or {}
    values = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}
    values = {key: value for key, value in (values | (metadata or {})).items() if value is not None}
    changed = path.with_name("changed.gguf")
    items = [gguf_container.Tensor(name, kind, shape, lambda raw=raw: [raw]) for name, (kind, shape, raw) in found.items()]
    gguf_container.write(changed, values, items)
    return changed


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("llama"), random_weights(LLAMA))


@pytest.mark.parametrize(
    ("config", "architecture", "type", "target"),
    [
        (replace(BITNET, layers=Layers.LOOP), "bitnet", "i2_s", "bitnet.cpp"),
        (BITNET, "bitnet", "tq2_0", "llama.cpp"),
        (RELU2, "bitnet-b1.58", "i2_s", "ik_llama.cpp"),
        (RELU2, "bitnet-b1.58", "tq1_0", "bitnet.cpp"),
        (LLAMA, "llama", "tq1_0", "llama.cpp"),
        (TRILM, "llama", "i2_s", "bitnet.cpp"),
        (replace(RELU2, dtype=DType.BFLOAT16), "bitnet-b1.58", "i2_s", "bitnet.cpp"),
    ],
)
def test_a_ternary_model_is_read_as_it_was_written(tmp_path, config, architecture, type, target):
    source = random_weights(config)
    found = gguf.read(written(tmp_path, source, type, target))
    assert found.config == replace(config, layers=found.config.layers)
    assert (found.provenance["architecture"], found.provenance["types"]) == (architecture, [type.upper()])
    packed = leafwise.packed(source, found.encoding)
    rounded = architecture != "bitnet" and type != "i2_s"  # elsewhere a scale is float32
    for path in leafwise.paths(config):
        mine, theirs = packed.read(path), found.read(path)
        if isinstance(theirs, PackedTernary):
            np.testing.assert_array_equal(theirs.codes, mine.codes)
            assert theirs.scale == (np.float16(mine.scale) if rounded else mine.scale)
        else:
            np.testing.assert_array_equal(theirs, np.asarray(mine))


@pytest.mark.parametrize("config", [BITNET, RELU2, LLAMA])
@pytest.mark.parametrize("type", FLOATS)
def test_a_full_precision_model_is_read_as_it_was_written(tmp_path, config, type):
    source = random_weights(config.twin)
    found = gguf.read(written(tmp_path, source, type, "bitnet.cpp"))
    assert found.config == replace(config.twin, layers=found.config.layers)
    assert found.encoding is None
    step = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[type]
    for path in leafwise.paths(config):
        mine, theirs = np.asarray(source.read(path)), np.asarray(found.read(path)).astype(np.float32)
        assert np.abs(mine - theirs).max() <= (step if trees.is_bitlinear(path) else 0) * np.abs(mine).max(), path


@pytest.mark.parametrize("embedding", gguf.EMBEDDINGS)
def test_embedding_and_head_have_the_type_that_was_asked_for(tmp_path, embedding):
    file = gguf_container.File(written(tmp_path, random_weights(LLAMA), embedding=embedding))
    assert {file.tensors[name].kind for name in ("token_embd.weight", "output.weight")} == {BlockType[embedding.upper()]}
    assert {info.kind for name, info in file.tensors.items() if "norm" in name} == {BlockType.F32}


@pytest.mark.parametrize("type", ["f32", "i2_s"])
def test_q_and_k_of_a_llama_file_are_permuted_to_pairs_of_neighbours_and_nothing_else_is(tmp_path, type):
    ternary = type == "i2_s"
    source = random_weights(LLAMA if ternary else LLAMA.twin)
    file = gguf_container.File(written(tmp_path, source, type, "bitnet.cpp"))
    source = leafwise.packed(source, Encoding.TWO_BIT) if ternary else source
    for name, stored in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
        leaf = source.read(("block_0", "attn", name, "kernel"))
        rows = leaf.codes if isinstance(leaf, PackedTernary) else leaf.T
        raw = file.raw(f"blk.0.attn_{stored}.weight")[: rows.nbytes].view(rows.dtype).reshape(rows.shape)
        for row in range(len(rows)):
            head, place = divmod(row, 64)
            of_ours = 64 * head + place // 2 + 32 * (place % 2) if name in "qk" else row
            np.testing.assert_array_equal(raw[row], rows[of_ours])


def test_another_rotary_layout_or_activation_is_another_model(tmp_path):
    """What a wrong architecture would do: the logits show it."""
    source = random_weights(RELU2.twin)
    path = written(tmp_path, source, "f32", "bitnet.cpp")
    right = logits(gguf.read(path))
    keys = {key: value for key, value in gguf_container.File(path).metadata.items() if key.startswith("bitnet-b1.58.")}
    as_silu = {key.replace("bitnet-b1.58", "bitnet"): value for key, value in keys.items()} | dict.fromkeys(keys)
    wrong = logits(gguf.read(rewrite(path, as_silu | {"general.architecture": "bitnet"})))
    assert np.abs(wrong - right).max() > 0.1 * np.abs(right).max()
    path = written(tmp_path, random_weights(LLAMA.twin), "f32", "llama.cpp")
    file = gguf_container.File(path)
    unpermuted = {name: (info.kind, info.shape, np.array(file.raw(name))) for name, info in file.tensors.items() if "attn_q" in name}
    for name, (kind, shape, raw) in unpermuted.items():
        turned = raw.reshape(shape[0], -1)[np.arange(shape[0]).reshape(4, 2, -1).swapaxes(1, 2).reshape(-1)]
        unpermuted[name] = (kind, shape, np.ascontiguousarray(turned).reshape(-1))
    right, wrong = logits(gguf.read(path)), logits(gguf.read(rewrite(path, tensors=unpermuted)))
    assert np.abs(wrong - right).max() > 0.01 * np.abs(right).max()


def test_the_metadata_are_what_the_programs_look_for(tmp_path):
    metadata = gguf_container.File(written(tmp_path, random_weights(RELU2), "i2_s", "bitnet.cpp")).metadata
    expected = {
        "general.architecture": "bitnet-b1.58",
        "general.file_type": 40,
        "bitnet-b1.58.vocab_size": 257,
        "bitnet-b1.58.context_length": 64,
        "bitnet-b1.58.embedding_length": 256,
        "bitnet-b1.58.block_count": 2,
        "bitnet-b1.58.feed_forward_length": 512,
        "bitnet-b1.58.rope.dimension_count": 64,
        "bitnet-b1.58.rope.freq_base": 10000.0,
        "bitnet-b1.58.attention.head_count": 4,
        "bitnet-b1.58.attention.head_count_kv": 2,
        "bitnet-b1.58.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 256,
    }
    assert {key: metadata[key] for key in expected} == expected


@pytest.mark.parametrize("target", gguf.TARGETS)
@pytest.mark.parametrize("group", [256, None])
def test_scales_by_group_are_kept_where_the_type_has_them(tmp_path, group, target):
    config = replace(LLAMA, quant=QuantConfig(weight_group=group))
    if target == "ik_llama.cpp":
        with pytest.raises(UserError, match=r"type=tq1_0 is not known to ik_llama\.cpp"):
            written(tmp_path, random_weights(config), "tq1_0", target)
        return
    source = random_weights(config)
    found = gguf.read(written(tmp_path, source, "tq1_0", target))
    assert found.config.quant.weight_group == group
    packed = leafwise.packed(source, found.encoding)
    np.testing.assert_array_equal(found.read(Q).scale, packed.read(Q).scale.astype(np.float16))


@pytest.mark.parametrize(
    ("base", "quant"), [(LLAMA, {"weight_shards": 2}), (BITNET, {"weight_shards": 2}), (BITNET, {"weight_group": 512})]
)
def test_scales_of_parts_are_kept_where_the_type_has_them(tmp_path, base, quant):
    source = random_weights(replace(base, hidden_size=512, ffn_size=1024, head_dim=128, quant=QuantConfig(**quant)))
    found = gguf.read(written(tmp_path, source, "tq1_0"))
    assert (found.config.quant.weight_group, found.config.quant.weight_shards) == (256, 1)
    packed = leafwise.packed(source, found.encoding)
    for path in (Q, ("block_1", "attn", "o", "kernel"), ("block_1", "ffn", "down", "kernel")):
        scale = packed.read(path).scale
        groups = found.read(path).scale
        np.testing.assert_array_equal(groups, np.repeat(scale, len(groups) // len(scale), 0).astype(np.float16))
        np.testing.assert_array_equal(unpack(found.read(path)), unpack(packed.read(path)))
    prove(packed, found, rounds=True)


@pytest.mark.parametrize(("base", "type", "target"), [(BITNET, "tq2_0", "llama.cpp"), (RELU2, "i2_s", "bitnet.cpp")])
def test_weights_in_zero_and_one_are_kept(tmp_path, base, type, target):
    source = random_weights(replace(base, quant=QuantConfig(weight=W.ZERO_ONE)))
    found = gguf.read(written(tmp_path, source, type, target)).read(Q)
    packed = leafwise.packed(source, found.encoding).read(Q)
    np.testing.assert_array_equal(unpack(found), unpack(packed))
    np.testing.assert_allclose(found.scale, packed.scale, rtol=1e-3)
    assert np.unique(unpack(found)).tolist() == [0, 1]


def test_blocks_of_zeros_without_a_scale_are_zeros(tmp_path, llama_file):
    """llama-quantize writes the scale 0 where all weights of a block are 0."""
    file = gguf_container.File(llama_file)
    raw = np.array(file.raw("blk.1.ffn_down.weight")).reshape(256, 2, 66)
    raw[:3, 0, :64], raw[:3, 0, 64:] = 0x55, 0
    kind, shape = BlockType.TQ2_0, (256, 512)
    path = rewrite(llama_file, tensors={"blk.1.ffn_down.weight": (kind, shape, raw.reshape(-1))})
    before, after = (gguf.read(p).read(("block_1", "ffn", "down", "kernel")) for p in (llama_file, path))
    assert after.scale == before.scale
    assert not unpack(after)[:256, :3].any()
    np.testing.assert_array_equal(unpack(after)[:, 3:], unpack(before)[:, 3:])
    raw[0, 0, 0] = 0
    path = rewrite(llama_file, tensors={"blk.1.ffn_down.weight": (kind, shape, raw.reshape(-1))})
    with pytest.raises(UserError, match="must be positive and finite"):
        gguf.read(path).read(("block_1", "ffn", "down", "kernel"))


def test_scales_beside_a_matrix_of_floats_are_factors(tmp_path):
    """Converters write the ternary values of a BitNet as floats, and the scale as a tensor of its own."""
    path = written(tmp_path, random_weights(BITNET.twin), "f16")
    half = np.array([0.5], "<f4").view(np.uint8)
    changed = rewrite(path, tensors={"blk.1.attn_q.scale": (BlockType.F32, (1,), half)})
    before, after = (np.asarray(gguf.read(p).read(Q)).astype(np.float32) for p in (path, changed))
    np.testing.assert_array_equal(after, before / 2)


def test_files_of_others_have_activations_quantised_and_compute_in_float32(tmp_path):
    path = written(tmp_path, random_weights(replace(TRILM, dtype=DType.BFLOAT16)))
    assert gguf.read(path).config.quant.activation is ActivationQuantizer.NONE
    config = gguf.read(rewrite(path, {"bitnet_jax.activation": None, "bitnet_jax.dtype": None})).config
    assert (config.quant.activation, config.dtype) == (ActivationQuantizer.PER_TOKEN, DType.FLOAT32)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "type", "target", "message"),
    [
        (RELU2, "tq2_0", "llama.cpp", "llama.cpp has no graph for ffn=relu2: its bitnet graph computes SiLU"),
        (RELU2.twin, "f16", "llama.cpp", "llama.cpp has no graph for ffn=relu2"),
        (replace(BITNET, norm=NormPlacement.INSIDE), "i2_s", "bitnet.cpp", "bitnet.cpp has no graph for norm=inside"),
        (replace(BITNET, norm_kind=NormKind.LAYER), "i2_s", "bitnet.cpp", "no graph for norm=sub, norm_kind=layer"),
        (replace(LLAMA, ffn=FeedForward.GELU), "i2_s", "bitnet.cpp", "no graph for norm=none, norm_kind=rms, ffn=gelu"),
        (replace(LLAMA, ffn=FeedForward.RELU2), "i2_s", "bitnet.cpp", "no graph for norm=none, norm_kind=rms, ffn=relu2"),
        (replace(BITNET, head_dim=32), "i2_s", "bitnet.cpp", "num_heads * head_dim=128 must be hidden_size=256"),
        (replace(BITNET, tie_embeddings=False), "tq2_0", "llama.cpp", "tie_embeddings=False: the bitnet graph of llama.cpp"),
        (replace(RELU2, tie_embeddings=False), "i2_s", "bitnet.cpp", "tie_embeddings=False: the bitnet-b1.58 graph of bitnet.cpp"),
        (BITNET, "i2_s", "llama.cpp", "type=i2_s is not known to llama.cpp"),
        (BITNET, "tq2_0", "ik_llama.cpp", "type=tq2_0 is not known to ik_llama.cpp"),
        (BITNET, "f16", "llama.cpp", "type=f16: this is a ternary model"),
        (BITNET.twin, "i2_s", "bitnet.cpp", "type=i2_s: this is no ternary model: must be one of f16, bf16, f32, q8_0"),
        (replace(BITNET, quant=QuantConfig(weight=W.NONE)), "f16", "llama.cpp", "no program quantises activations alone"),
        (replace(BITNET, quant=QuantConfig(activation_bits=4)), "i2_s", "bitnet.cpp", "activation_bits=4 must be 8"),
        (replace(BITNET, quant=QuantConfig(weight_group=256)), "i2_s", "bitnet.cpp", "weight_group=256 with type=i2_s"),
        (replace(LLAMA, quant=QuantConfig(weight_group=128)), "tq2_0", "llama.cpp", "weight_group=128 with type=tq2_0"),
        (replace(BITNET, quant=QuantConfig(weight_shards=2)), "i2_s", "bitnet.cpp", "weight_shards=2 with type=i2_s"),
        (replace(LLAMA, quant=QuantConfig(weight_shards=2)), "tq2_0", "llama.cpp", "weight_shards=2 with type=tq2_0"),
        (replace(BITNET, ffn_size=384), "tq1_0", "llama.cpp", "ffn_size=384 must be a multiple of 256 for type=tq1_0"),
        (replace(BITNET, ffn_size=320), "i2_s", "bitnet.cpp", "ffn_size=320 must be a multiple of 128 for type=i2_s"),
        (BITNET, "q4_0", "llama.cpp", "type='q4_0' must be one of"),
        (BITNET, "i2_s", "ollama", "target='ollama' must be one of bitnet.cpp, llama.cpp, ik_llama.cpp"),
    ],
)
def test_what_a_program_would_compute_otherwise_is_refused_before_anything_is_written(tmp_path, config, type, target, message):
    def never(path):
        raise AssertionError(path)

    weights = leafwise.Weights(config=config, read=never, encoding=None, where="the model")
    with pytest.raises(UserError) as caught:
        gguf.write(tmp_path / "model.gguf", weights, type=type, embedding="f16", target=target)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_per_tensor_activations_are_written_as_they_are_used(tmp_path):
    config = replace(LLAMA, quant=QuantConfig(activation=ActivationQuantizer.PER_TENSOR))
    assert gguf.read(written(tmp_path, random_weights(config))).config.quant.activation is ActivationQuantizer.PER_TOKEN


def test_a_scale_that_float16_cannot_hold_is_refused(tmp_path):
    source = random_weights(LLAMA)
    huge = trees.map_leaves(lambda path, leaf: leaf * 1e8 if trees.is_bitlinear(path) else leaf, leafwise.load(source))
    with pytest.raises(UserError, match=r"block_0/attn/q/kernel has scale .*: must be from 6e-8 to 65504 for tq2_0"):
        written(tmp_path, leafwise.from_params(huge, LLAMA))
    assert not list(tmp_path.iterdir())


HALF = np.array([0.5], "<f4").view(np.uint8)


def zeros(*shape):
    return (BlockType.F32, shape, np.zeros(4 * int(np.prod(shape)), np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"general.architecture": "qwen2"}}, "general.architecture='qwen2' is not read"),
        ({"metadata": {"general.architecture": None}}, "general.architecture='None' is not read"),
        (
            {"metadata": {"llama.block_count": 3}},
            "lacks tensor blk.2.attn_k.weight, blk.2.attn_norm.weight, blk.2.attn_output.weight and 6",
        ),
        ({"metadata": {"llama.block_count": 2**31 - 1}}, "num_layers=2147483647 must be at most 10000"),
        ({"metadata": {"llama.block_count": "2"}}, "llama.block_count='2' must be a whole number"),
        ({"metadata": {"llama.embedding_length": 512}}, "token_embd.weight has shape [257, 256]: must be [257, 512]"),
        ({"metadata": {"llama.feed_forward_length": 256}}, "has shape [512, 256]: must be [256, 256]"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"metadata": {"llama.attention.head_count_kv": 0}}, "llama.attention.head_count_kv=0 must be a whole number"),
        ({"metadata": {"llama.attention.head_count": None}}, "llama.attention.head_count=None must be a whole number"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "norm_eps=nan"),
        ({"metadata": {"llama.rope.freq_base": -1.0}}, "rope_theta=-1.0 must be positive"),
        ({"metadata": {"llama.rope.scaling.factor": 8.0}}, "llama.rope.scaling.factor=8.0 must be 1"),
        ({"metadata": {"llama.rope.dimension_count": 32}}, "llama.rope.dimension_count=32 must be 64"),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count=8 must be 0"),
        ({"metadata": {"llama.expert_count": [8, 0]}}, "must be 0: nothing else is computed here"),
        ({"metadata": {"general.architecture": ["llama"]}}, "is not read"),
        ({"metadata": {"bitnet_jax.dtype": [1, 2]}}, "bitnet_jax.dtype must be text"),
        ({"metadata": {"llama.a\nb": 1}}, "is not known"),
        ({"tensors": {"a\nb": zeros(32)}}, "has unknown tensor 'a\\nb'"),
        ({"metadata": {"llama.logit_scale": 0.5}}, "metadata 'llama.logit_scale' is not known"),
        ({"metadata": {"llama.vocab_size": 258}}, "llama.vocab_size=258 must be 257"),
        ({"metadata": {"bitnet_jax.activation": "sometimes"}}, "'sometimes' is not a valid ActivationQuantizer"),
        ({"metadata": {"tokenizer.ggml.tokens": ["a"]}}, "must be 257 strings"),
        ({"drop": ["token_embd.weight"]}, "lacks tensor token_embd.weight"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "lacks tensor blk.1.ffn_up.weight"),
        ({"tensors": {"rope_freqs.weight": zeros(32)}}, "has unknown tensor rope_freqs.weight"),
        ({"tensors": {"blk.0.attn_q.scale": (BlockType.F32, (1,), HALF)}}, "has unknown tensor blk.0.attn_q.scale"),
        ({"tensors": {"blk.0.attn_norm.weight": zeros(255)}}, "blk.0.attn_norm.weight has shape [255]: must be [256]"),
        ({"tensors": {"blk.0.attn_q.weight": zeros(256, 256)}}, "has linear layers of types F32, TQ2_0: must all be ternary, or none"),
        ({"tensors": {"output.weight": (BlockType.TQ2_0, (257, 256), np.zeros(257 * 66, np.uint8))}}, "output.weight has type TQ2_0"),
    ],
)
def test_a_file_that_is_no_whole_model_is_refused(llama_file, changes, message):
    path = rewrite(llama_file, **changes)
    with pytest.raises(UserError) as caught:
        gguf.read(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "path", "place", "value", "message"),
    [
        ("blk.1.attn_q.weight", Q, 0, [0xFF], "must not hold the bit pair 11"),
        ("blk.1.attn_q.weight", Q, 64, [0, 0x7E], "must be positive and finite"),
        ("blk.1.attn_q.weight", Q, 64, [0, 0x80], "must be positive and finite"),
        ("blk.1.attn_norm.weight", ("block_1", "attn_norm", "scale"), 0, [0, 0, 0xC0, 0x7F], "holds NaN or infinity"),
        ("token_embd.weight", ("embed", "embedding"), 0, [0, 0, 0x80, 0x7F], "holds NaN or infinity"),
    ],
)
def test_damaged_contents_are_refused_when_they_are_read(llama_file, name, path, place, value, message):
    file = gguf_container.File(llama_file)
    info, raw = file.tensors[name], np.array(file.raw(name))
    raw[place : place + len(value)] = value
    weights = gguf.read(rewrite(llama_file, tensors={name: (info.kind, info.shape, raw)}))
    with pytest.raises(UserError) as caught:
        weights.read(path)
    assert message in str(caught.value)
    assert "/".join(path) in str(caught.value)


def test_a_tokenizer_of_an_unknown_kind_can_be_left_out(llama_file):
    path = rewrite(llama_file, {"tokenizer.ggml.pre": "unheard-of"})
    with pytest.raises(UserError, match="pre='unheard-of' is not known"):
        gguf.read(path)
    assert gguf.read(path, tokenizer=False).assets == Assets()
