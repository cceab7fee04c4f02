"""StableHLO artefacts: the shipped runner makes the model's tokens with jax and numpy alone, and a folder that lies is refused."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import inference
from bitnet_jax import params as trees
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import ActivationQuantizer, DType, FeedForward, Layers, Linear, NormPlacement, QuantConfig, WeightQuantizer
from bitnet_jax.data import byte_tokenizer
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.formats import model_file, stablehlo, stablehlo_runner
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets
from bitnet_jax.transformer import Transformer
from kernels_pallas import Encoding
from tests.shapes import tiny

CONFIG = tiny(vocab_size=260, max_seq_len=48)
ASSETS = Assets(tokenizer=byte_tokenizer().to_json(), chat_template="{{ messages }}", prefix=(256,), stop_tokens=(256, 7))
CHUNK = 6
PROMPT = [3, 5, 7, 1, 2, 60, 33, 21, 9, 11, 4, 50, 60, 13]  # two chunks and a part of one


def parameters(config):
    return jax.jit(lambda: Transformer(config).init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"])()


@pytest.fixture(scope="module")
def params():
    return parameters(CONFIG)


@pytest.fixture(scope="module")
def generated(params):
    """`inference.generate`, always for prompts and results of one padded length."""
    packed = trees.pack(params, CONFIG)

    def generate(prompt, **options):
        return inference.generate(
            packed, CONFIG, [prompt], max_new_tokens=16, tokenizer=byte_tokenizer(), implementation="xla", **options
        ).rows[0]

    return generate


@pytest.fixture(scope="module")
def written(params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("artefact") / "model"
    stablehlo.write(directory, leafwise.from_params(params, CONFIG, assets=ASSETS, provenance={"seed": 1}), chunk=CHUNK)
    return directory


@pytest.fixture
def artefact(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


def run(directory, monkeypatch, capsys, *arguments):
    """What the runner prints, in this process."""
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    stablehlo_runner.main(directory)
    return capsys.readouterr().out.removesuffix("\n")


def ids(text):
    return [int(part) for part in text.split(",") if part]


# --- running ---------------------------------------------------------------------------------------------------------


GROUPS = QuantConfig(weight_group=16, activation=ActivationQuantizer.NONE)
PER_TENSOR = QuantConfig(activation=ActivationQuantizer.PER_TENSOR, activation_bits=2, weight=WeightQuantizer.NONE)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"tie_embeddings": False, "ffn": FeedForward.RELU2, "layers": Layers.LOOP}, {"encoding": Encoding.BASE3, "batch": 2}),
        pytest.param({}, {}, marks=pytest.mark.slow),
        pytest.param({"dtype": DType.BFLOAT16, "norm": NormPlacement.INSIDE}, {}, marks=pytest.mark.slow),
        pytest.param({"quant": GROUPS, "norm": NormPlacement.NONE}, {}, marks=pytest.mark.slow),
        pytest.param({"quant": QuantConfig(weight_shards=2)}, {}, marks=pytest.mark.slow),
        pytest.param({"quant": PER_TENSOR, "ffn": FeedForward.GELU}, {}, marks=pytest.mark.slow),
        pytest.param({"linear": Linear.FULL}, {}, marks=pytest.mark.slow),
    ],
)
def test_the_runner_makes_the_tokens_of_generate(fields, options, tmp_path, monkeypatch, capsys):
    config = tiny(max_seq_len=48, **fields)
    params = parameters(config)
    size = stablehlo.write(tmp_path / "a", leafwise.from_params(params, config), platforms=["cpu"], chunk=CHUNK, **options)
    assert size == sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    new = config.max_seq_len - len(PROMPT)  # up to the last position that there is
    found = ids(run(tmp_path / "a", monkeypatch, capsys, "--ids", ",".join(map(str, PROMPT)), "--tokens", new))
    packed = trees.pack(params, config) if is_ternary(config) else params
    # By the same products: the artefact's are portable ones, and sums of floats have another order in native ones.
    expected = inference.generate(packed, config, [PROMPT], max_new_tokens=new, implementation="xla").rows[0].tokens.tolist()
    assert len(found) == new
    assert found == expected


def test_the_runner_takes_text_as_the_model_was_trained(written, generated, monkeypatch, capsys):
    text = "a<|endoftext|>"  # text, and not the end of one
    found = run(written, monkeypatch, capsys, text, "--tokens", 16)
    assert found == generated(text, prefix=ASSETS.prefix, stop_tokens=ASSETS.stop_tokens).text


def test_the_runner_ends_at_a_stop_token(artefact, generated, monkeypatch, capsys):
    free = generated([1, 2, 3], stop_tokens=()).tokens.tolist()
    edit_manifest(artefact, lambda manifest: manifest.update(stop_tokens=[free[5], 259]))
    found = ids(run(artefact, monkeypatch, capsys, "--ids", "1,2,3", "--tokens", 16))
    assert found == free[: free.index(free[5])]


def test_the_runner_never_takes_an_id_that_the_tokenizer_lacks(artefact, generated, monkeypatch, capsys):
    free = generated([1, 2, 3], stop_tokens=()).tokens.tolist()
    edit_manifest(artefact, lambda manifest: manifest.update(stop_tokens=[], vocabulary=max(free)))
    found = ids(run(artefact, monkeypatch, capsys, "--ids", "1,2,3", "--tokens", 16))
    at = free.index(max(free))
    assert found[:at] == free[:at]
    assert max(found) < max(free)


# Only what comes with jax may be imported, and of the rest only the package in the folder.
ISOLATED = """
import importlib.machinery, runpy, sys
class Finder:
    def find_spec(self, name, path, target=None):
        root = name.partition(".")[0]
        if root == "flatbuffers" and path is None:
            found = importlib.machinery.PathFinder.find_spec(name, [p for p in sys.path if "site-packages" not in p])
            if found is None:
                raise ModuleNotFoundError(name)
            return found
        if root in {"bitnet_jax", "kernels_pallas", "flax", "safetensors", "tokenizers", "orbax"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_runner_needs_nothing_but_jax_and_numpy(written, generated, tmp_path):
    moved = shutil.copytree(written, tmp_path / "elsewhere")
    arguments = [str(moved / "run.py"), "--ids", ",".join(map(str, PROMPT)), "--tokens", "16"]
    done = subprocess.run([sys.executable, "-I", "-c", ISOLATED, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert ids(done.stdout.strip()) == generated(PROMPT, stop_tokens=ASSETS.stop_tokens).tokens.tolist()


def test_generate_asks_the_runner_and_passes_on_what_it_says(tmp_path):
    for program, expected in (("print('3,' + sys.argv[2] + ',' + sys.argv[4])", [3, 1, 2, 9]), ("print()", [])):
        (tmp_path / "run.py").write_text(f"import sys\n{program}")
        assert stablehlo.generate(tmp_path, [1, 2], 9) == expected
    (tmp_path / "run.py").write_text("raise ValueError('no such platform')")
    with pytest.raises(RunError, match=r"run\.py failed: ValueError: no such platform"):
        stablehlo.generate(tmp_path, [1], 1)


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [("1,2", 47, "must be from 1 to 48 together"), ("1,260", 1, "ids from 0 to 259"), ("1,-1", 1, "ids from 0 to 259")],
)
def test_the_runner_refuses_what_does_not_fit(written, prompt, new, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(written, monkeypatch, capsys, "--ids", prompt, "--tokens", new)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "prefill.bin", "decode.bin", "flatbuffers.zip", "tokenizer.json", "run.py"])
def test_the_runner_refuses_a_damaged_file(artefact, name, monkeypatch, capsys):
    flip(artefact / name)
    with pytest.raises(SystemExit, match=f"{name} is damaged"):
        run(artefact, monkeypatch, capsys, "--ids", "1")


def test_the_runner_refuses_what_a_newer_jax_exported(artefact, monkeypatch, capsys):
    edit_manifest(artefact, lambda manifest: manifest.update(calling_convention=1000, jax="9.9"))
    with pytest.raises(SystemExit, match=r"too old for the programs, which jax 9\.9 exported"):
        run(artefact, monkeypatch, capsys, "--ids", "1")


# --- programs --------------------------------------------------------------------------------------------------------


def test_programs_are_lowered_for_every_platform_and_called_as_the_manifest_says(written):
    manifest = json.loads((written / "manifest.json").read_text())
    for name in ("prefill", "decode"):
        exported = jax.export.deserialize(bytearray((written / f"{name}.bin").read_bytes()))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        assert exported.calling_convention_version == manifest["calling_convention"]
        flat = [(array.dtype.name, list(array.shape)) for array in exported.in_avals]
        assert flat == [(entry["dtype"], entry["shape"]) for entry in manifest["arguments"][name]]
        assert len(exported.module_kept_var_idx) == len(flat)  # so a bare module has them all


def test_rows_of_any_lengths_fill_the_cache_to_its_end_as_one_forward_pass(params, tmp_path):
    """Also where a whole chunk would reach past the capacity, and where a row has no tokens in a call."""
    capacity = 13
    weights = leafwise.from_params(params, CONFIG)
    stablehlo.write(tmp_path / "a", weights, platforms=["cpu"], batch=2, chunk=CHUNK, capacity=capacity)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    programs = (jax.export.deserialize(bytearray((tmp_path / "a" / name).read_bytes())) for name in ("prefill.bin", "decode.bin"))
    prefill, decode = (jax.jit(program.call) for program in programs)
    packed = trees.pack(params, CONFIG)
    named = dict(flat(model_file.read(tmp_path / "a" / "weights.safetensors")))
    text = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, capacity), np.int32)
    k, v = jnp.zeros(**manifest["cache"]), jnp.zeros(**manifest["cache"])
    at = np.zeros(2, np.int32)
    whole = jax.jit(lambda: Transformer(CONFIG).apply({"params": packed}, text))().logits
    for counts in ([3, 6], [6, 0], [4, 6], [0, 1]):
        chunk = np.zeros((2, CHUNK), np.int32)
        for row, count in enumerate(counts):
            chunk[row, :count] = text[row, at[row] : at[row] + count]
        logits, k, v, length = prefill(named, k, v, at, chunk, np.array(counts, np.int32))
        at = at + np.array(counts, np.int32)
        assert np.array_equal(length, at)
        for row, count in enumerate(counts):
            if count:
                np.testing.assert_allclose(logits[row], whole[row, at[row] - 1], rtol=1e-4, atol=1e-5)
    at = at - 1
    logits, *_, length = decode(named, k, v, at, text[np.arange(2), at])
    np.testing.assert_allclose(logits, whole[np.arange(2), at], rtol=1e-4, atol=1e-5)
    assert np.array_equal(length, at + 1)


def flat(weights):
    """The tensors of a model file by name."""
    for path, leaf in trees.leaves(leafwise.load(weights)):
        name = "/".join(path)
        yield from ((f"{name}.codes", leaf.codes), (f"{name}.scale", leaf.scale)) if hasattr(leaf, "codes") else ((name, leaf),)


def test_the_same_model_gives_the_same_bytes_which_name_nothing_of_this_machine(written, params, tmp_path):
    def elsewhere():  # other lines of source above the export
        weights = leafwise.from_params(params, CONFIG, assets=ASSETS, provenance={"seed": 1})
        return stablehlo.write(tmp_path / "again", weights, chunk=CHUNK)

    elsewhere()
    for path in written.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        if path.suffix == ".bin":
            assert b".py" not in path.read_bytes()


# --- writing and reading ---------------------------------------------------------------------------------------------


def test_reading_gives_the_model_that_was_written(written, params):
    assert stablehlo.is_artefact(written)
    found = stablehlo.read(written)
    assert (found.config, found.encoding, found.provenance) == (CONFIG, Encoding.TWO_BIT, {"seed": 1})
    assert found.assets == ASSETS
    expected, tree = trees.pack(params, CONFIG), leafwise.load(found)
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, expected))


def test_a_packed_model_keeps_its_encoding_unless_another_is_asked_for(params, tmp_path):
    weights = leafwise.packed(leafwise.from_params(params, CONFIG), Encoding.BASE3)
    for name, encoding, expected in (("a", None, Encoding.BASE3), ("b", Encoding.TWO_BIT, Encoding.TWO_BIT)):
        stablehlo.write(tmp_path / name, weights, encoding=encoding, platforms=["cpu"], chunk=4, capacity=8)
        found = stablehlo.read(tmp_path / name)
        assert found.encoding is expected
        mine = leafwise.load(leafwise.packed(found, Encoding.BASE3))
        assert jax.tree.all(jax.tree.map(np.array_equal, mine, leafwise.load(weights)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 49}, "capacity=49 must be at most the model's max_seq_len=48"),
        ({"capacity": 0}, "capacity=0 must be at least 1"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"chunk": -1}, "chunk=-1 must be at least 1"),
        ({"platforms": ["cpu", "abacus"]}, "must be of cpu, cuda, tpu"),
        ({"platforms": []}, "must be of cpu, cuda, tpu"),
    ],
)
def test_what_cannot_be_exported_is_refused(params, options, message, tmp_path):
    with pytest.raises(UserError) as caught:
        stablehlo.write(tmp_path / "a", leafwise.from_params(params, CONFIG), **options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing(params, tmp_path):
    weights = leafwise.from_params(params, CONFIG)

    def read(path):
        if path[0] == "block_1":
            raise UserError("block 1 is damaged")
        return weights.read(path)

    with pytest.raises(UserError, match="block 1 is damaged"):
        stablehlo.write(tmp_path / "a", replace(weights, read=read), platforms=["cpu"])
    with pytest.raises(UserError, match="the tokenizer has 257 ids, but"):
        stablehlo.write(tmp_path / "a", leafwise.from_params(params, replace(CONFIG, vocab_size=61), assets=ASSETS))
    assert list(tmp_path.iterdir()) == []


# --- artefacts that lie ----------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(directory, edit):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def change(**changes):
    return lambda directory: edit_manifest(directory, lambda manifest: manifest.update(changes))


def change_file(name, **changes):
    return lambda directory: edit_manifest(directory, lambda manifest: manifest["files"][name].update(changes))


def lie_about_shapes(directory):
    edit_manifest(directory, lambda manifest: manifest["arguments"]["prefill"][0]["shape"].append(10**12))


def other_config(directory):
    edit_manifest(directory, lambda manifest: manifest["config"].update(num_layers=3))


def surplus_in_manifest(directory):
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    edit_manifest(directory, lambda manifest: manifest["files"].update({"../outside": entry}))


def link(directory):
    outside = directory.parent / "outside"
    (directory / "weights.safetensors").rename(outside)
    (directory / "weights.safetensors").symlink_to(outside)


def other_model(directory):
    """Another model in the place of this one, with a hash that is right."""
    path = directory / "weights.safetensors"
    config = tiny(vocab_size=260, max_seq_len=48, num_layers=1)
    path.unlink()
    model_file.write(path, leafwise.packed(leafwise.from_params(parameters(config), config), Encoding.TWO_BIT))
    change_file(path.name, bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(format="other"), "must have format 'bitnet-jax-stablehlo' and format_version 1"),
        (change(format_version=2), "must have format 'bitnet-jax-stablehlo' and format_version 1"),
        (change(surprise=1), "has unknown field 'surprise'"),
        (lambda directory: edit_manifest(directory, lambda manifest: manifest.pop("jax")), "lacks field 'jax'"),
        (change(capacity=True), "capacity must be of type int"),
        (change(capacity=-1), "capacity must be from 1 to"),
        (change(batch=10**30), "batch must be from 1 to"),
        (change(chunk=9), "cache is not that of weights.safetensors"),
        (change(files=[]), "files must be of type dict"),
        (change(files={}), "is surplus or missing"),
        (change(encoding="base3"), "encoding is not that of weights.safetensors"),
        (change(cache={"shape": [1], "dtype": "float32"}), "cache is not that of weights.safetensors"),
        (lie_about_shapes, "arguments is not that of weights.safetensors"),
        (other_config, "config is not that of weights.safetensors"),
        (other_model, "config is not that of weights.safetensors"),
        (surplus_in_manifest, "'../outside' is surplus or missing"),
        (change_file("run.py", bytes=10**20), "the manifest says 100000000000000000000"),
        (change_file("run.py", sha256="0"), "run.py is damaged: its sha256 is not the manifest's"),
        (change_file("run.py", more=1), "run.py must have bytes and sha256"),
        (lambda directory: flip(directory / "prefill.bin"), "prefill.bin is damaged"),
        (lambda directory: flip(directory / "weights.safetensors"), "weights.safetensors is damaged"),
        (lambda directory: (directory / "decode.bin").write_bytes(b""), "has 0 bytes: the manifest says"),
        (lambda directory: (directory / "decode.bin").unlink(), "decode.bin is missing"),
        (lambda directory: (directory / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda directory: (directory / "payload.pkl").write_bytes(b"1"), "payload.pkl is not in the manifest"),
        (lambda directory: (directory / "folder").mkdir(), "folder is not in the manifest"),
        (link, "must be a plain file, and no link"),
        (lambda directory: (directory / "manifest.json").write_text("{" * 100_000), "cannot be read"),
        (lambda directory: (directory / "manifest.json").write_text("[" * 100_000), "cannot be read"),
        (lambda directory: (directory / "manifest.json").write_bytes(b"\xff"), "cannot be read"),
        (lambda directory: (directory / "manifest.json").write_text("9" * 5000), "cannot be read"),
        (lambda directory: (directory / "manifest.json").write_text(" " * (1 << 21)), "must be a plain file of at most 1048576 bytes"),
        (lambda directory: (directory / "manifest.json").unlink(), "cannot be read"),
    ],
)
def test_an_artefact_that_lies_is_refused(artefact, damage, message):
    damage(artefact)
    with pytest.raises(UserError) as caught:
        stablehlo.read(artefact)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
