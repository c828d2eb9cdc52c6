"""Folders become parameters: against transformers' logits, sharded and cast, and every way a folder can be broken."""

import json
import math
import resource
import struct
import time
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlalign.forest import pack
from rlalign.models import load_pretrained, logits
from rlalign.train.mesh import make_mesh, shardings
from tests.models.folders import FIXTURES, weights, write_folder

CASES = sorted(path.stem for path in FIXTURES.glob("*.json") if path.stem != "frequencies")


def recorded(name):
    case = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    return case, weights(case["seed"], case["shapes"])


def leaves(params):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def assert_same(params, other):
    a, b = leaves(params), leaves(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, tmp_path):
    case, tensors = recorded(name)
    decoder, params = load_pretrained(write_folder(tmp_path, case["config"], tensors))
    packed = pack([np.array(sequence) for sequence in case["tokens"]], row_length=32)
    got = logits(decoder, params, packed.forest).reshape(-1, decoder.config.vocab_size)
    expected = np.array(case["logits"])
    assert expected.std() > 0.5  # not a comparison of zeros
    np.testing.assert_allclose(got[packed.node], expected[:, 1:], atol=2e-5, rtol=0)
    np.testing.assert_allclose(got[0], expected[0, 0], atol=2e-5, rtol=0)  # both begin at the one root


@pytest.mark.parametrize("name", CASES)
def test_tree_is_the_one_that_the_decoder_initialises(name, tmp_path):
    case, tensors = recorded(name)
    decoder, params = load_pretrained(write_folder(tmp_path, case["config"], tensors))
    fresh = jax.eval_shape(lambda: decoder.init(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), fresh)


def test_shards_equal_one_file(tmp_path):
    case, tensors = recorded("qwen3")
    _, one = load_pretrained(write_folder(tmp_path / "one", case["config"], tensors))
    _, three = load_pretrained(write_folder(tmp_path / "three", case["config"], tensors, shards=3))
    assert_same(one, three)


def test_bfloat16_is_read_as_it_is_and_widened_exactly(tmp_path):
    case, tensors = recorded("qwen2")
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    write_folder(tmp_path, {**case["config"], "torch_dtype": "bfloat16"}, half)
    decoder, params = load_pretrained(tmp_path)
    assert decoder.config.dtype == "bfloat16"
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel[1], half["model.layers.1.mlp.up_proj.weight"].T)
    decoder, wide = load_pretrained(tmp_path, dtype="float32")
    assert decoder.config.dtype == "float32"
    assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))


@pytest.mark.parametrize("stored", [np.float16, np.float64])
def test_other_float_tensors_are_converted(stored, tmp_path):
    case, tensors = recorded("mistral")
    write_folder(tmp_path, case["config"], {name: value.astype(stored) for name, value in tensors.items()})
    _, params = load_pretrained(tmp_path)
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["lm_head.weight"].astype(stored).T.astype("f4"))


def test_float64(tmp_path):
    case, tensors = recorded("mistral")
    write_folder(tmp_path, case["config"], tensors)
    with pytest.raises(ValueError, match="dtype='float64' needs 64-bit JAX: set JAX_ENABLE_X64=1"):
        load_pretrained(tmp_path, dtype="float64")
    with jax.enable_x64(True):
        _, params = load_pretrained(tmp_path, dtype="float64")
        assert params["embedding"].dtype == jnp.float64


def test_float16_config_asks_for_a_dtype(tmp_path):
    case, tensors = recorded("mistral")
    write_folder(tmp_path, {**case["config"], "dtype": "float16"}, tensors)
    with pytest.raises(ValueError, match="dtype 'float16' is not supported; pass dtype='float32' or dtype='bfloat16'"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, dtype="float32")[0].config.dtype == "float32"


def test_old_rotary_buffers_are_ignored_and_a_tied_head_may_be_stored(tmp_path):
    case, tensors = recorded("qwen2")
    _, params = load_pretrained(write_folder(tmp_path / "plain", case["config"], tensors))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert_same(params, load_pretrained(write_folder(tmp_path / "more", case["config"], tensors))[1])
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_folder(tmp_path / "untied", case["config"], tensors)
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'lm_head.weight' differs from the embedding"):
        load_pretrained(tmp_path / "untied")


def test_mesh_places_each_leaf(tmp_path):
    mesh = make_mesh(fsdp=min(2, jax.device_count()))
    case, tensors = recorded("llama_biases")
    _, plain = load_pretrained(write_folder(tmp_path, case["config"], tensors))
    _, placed = load_pretrained(tmp_path, mesh=mesh)
    assert_same(plain, placed)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings(plain, mesh)


def test_host_memory_holds_the_model_once(tmp_path):
    case, _ = recorded("mistral")
    config = {**case["config"], "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8}
    grown = {64: 64, 32: 128, 48: 512, 16: 64}
    shapes = {
        name.replace("layers.0", f"layers.{layer}"): [grown[size] for size in shape]
        for name, shape in case["shapes"].items()
        for layer in range(8)
    }
    total = sum(4 * math.prod(shape) for shape in shapes.values())
    write_folder(tmp_path, config, weights(0, shapes))
    load_pretrained(tmp_path)  # whatever is imported or compiled once
    tracemalloc.start()  # sees what NumPy allocates, but not the leaves, which are mapped
    _, params = load_pretrained(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == total
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert peak < 0.5 * largest, "a leaf, or two layers of it, are somewhere twice"


UP = "model.layers.1.mlp.up_proj.weight"


def edit(name, value):
    """A change of one tensor: None drops it."""
    return lambda tensors: {key: x for key, x in {**tensors, name: value}.items() if x is not None}


TENSOR_FAULTS = {
    "missing": (edit(UP, None), rf"tensor '{UP}' is missing from model\.safetensors; complete the download"),
    "too many layers": (
        edit("model.layers.2.input_layernorm.weight", np.ones(32, np.float32)),
        r"model\.safetensors: tensor 'model\.layers\.2\.input_layernorm\.weight' is not part of the model that "
        r"config\.json describes \(2 layers, qkv_bias=False",
    ),
    "a bias that config.json denies": (
        edit("model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32)),
        r"'model\.layers\.0\.self_attn\.q_proj\.bias' is not part .* qkv_bias=False.*; correct config\.json",
    ),
    "wrong shape": (
        edit(UP, np.ones((32, 48), np.float32)),
        rf"model\.safetensors: tensor '{UP}' has shape \[32, 48\], config\.json says \[48, 32\]",
    ),
    "NaN": (
        edit(UP, np.full((48, 32), np.nan, np.float32)),
        rf"model\.safetensors: tensor '{UP}' holds NaN or infinity; download the folder again",
    ),
    "integers": (
        edit(UP, np.ones((48, 32), np.int8)),
        rf"tensor '{UP}' is stored as I8; rlalign reads F32, BF16, F16, F64: use the unquantized checkpoint",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_broken_tensors(fault, tmp_path):
    change, message = TENSOR_FAULTS[fault]
    case, tensors = recorded("mistral")
    write_folder(tmp_path, case["config"], change(tensors))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_overflow_in_the_conversion_is_named(tmp_path):
    case, tensors = recorded("mistral")
    write_folder(tmp_path, case["config"], edit(UP, np.full((48, 32), 1e300))(tensors))
    with pytest.raises(ValueError, match=f"tensor '{UP}' holds NaN or infinity"):
        load_pretrained(tmp_path)


def _truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


def _pickles(folder):
    for name in ("pytorch_model-00001-of-00002.bin", "other.pth"):
        (folder / name).write_bytes(b"")
    (folder / "model.safetensors").unlink()


FILE_FAULTS = {
    "truncated": (_truncate, ValueError, r"model\.safetensors is truncated or no safetensors file at all"),
    "LFS pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ValueError,
        r"model\.safetensors is truncated .* such as a Git LFS pointer \(.*\); download the folder again",
    ),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), ValueError, "truncated"),
    "pickles": (
        _pickles,
        ValueError,
        r"holds pickled weights only \(other\.pth, pytorch_model-00001-of-00002\.bin\), and reading a pickle runs its "
        r"code; .*save_pretrained",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        FileNotFoundError,
        r"holds neither model\.safetensors nor model\.safetensors\.index\.json; download the folder again",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        FileNotFoundError,
        r"config\.json is missing; download the folder again",
    ),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ValueError,
        r"config\.json is not JSON \(Expecting property name",
    ),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ValueError,
        r"config\.json holds a JSON list, not an object",
    ),
    "both": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        ValueError,
        r"holds both model\.safetensors and model\.safetensors\.index\.json; remove the one that does not belong",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_broken_files(fault, tmp_path):
    change, error, message = FILE_FAULTS[fault]
    case, tensors = recorded("mistral")
    change(write_folder(tmp_path, case["config"], tensors))
    with pytest.raises(error, match=message):
        load_pretrained(tmp_path)


def _entry(start, stop, shape=None):
    return json.dumps({"dtype": "F32", "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]})


HEADERS = {  # text, bytes of data, the length that the file claims, what is said
    "a hole": (f'{{"a": {_entry(0, 8)}, "b": {_entry(16, 24)}}}', 24, None, "invalid offset for tensor `b`"),
    "an overlap": (f'{{"a": {_entry(0, 8)}, "b": {_entry(4, 12)}}}', 12, None, "invalid offset for tensor `b`"),
    "a name twice": (f'{{"a": {_entry(0, 8)}, "a": {_entry(8, 16)}}}', 16, None, "invalid offset for tensor `a`"),
    "backwards": (f'{{"a": {_entry(8, 0, [2])}}}', 8, None, "invalid offset for tensor `a`"),
    "more bytes than tensors": (f'{{"a": {_entry(0, 8)}}}', 64, None, "file not fully covered"),
    "a shape beyond its bytes": (f'{{"a": {_entry(0, 8, [3])}}}', 8, None, "invalid shape, data type, or offset"),
    "a size beyond 64 bits": (f'{{"a": {_entry(0, 8, [2**62, 8])}}}', 8, None, "overflow"),
    "a huge header": (f'{{"a": {_entry(0, 8)}}}', 8, 2**60, "header too large"),
    "a header beyond the limit": (f'{{"a": {_entry(0, 8)}}}', 8, 200_000_000, "header too large"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_broken_headers_cost_neither_time_nor_memory(fault, tmp_path):
    text, data, claimed, message = HEADERS[fault]
    case, tensors = recorded("mistral")
    write_folder(tmp_path, case["config"], tensors)
    head = text.encode().ljust(-(-len(text) // 8) * 8)
    content = struct.pack("<Q", claimed or len(head)) + head + bytes(data)
    (tmp_path / "model.safetensors").write_bytes(content)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=rf"model\.safetensors is truncated or no safetensors file .*{message}"):
        load_pretrained(tmp_path)
    assert time.process_time() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_name_instead_of_a_folder():
    with pytest.raises(FileNotFoundError, match=r"Qwen/Qwen3-0\.6B is not a folder; download the model first"):
        load_pretrained("Qwen/Qwen3-0.6B")


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _move(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][UP] = {FIRST: SECOND, SECOND: FIRST}[index["weight_map"][UP]]
    path.write_text(json.dumps(index))


def _duplicate(folder):
    save_file({**load_file(folder / SECOND), **load_file(folder / FIRST)}, folder / SECOND)


def _index(text):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


SHARD_FAULTS = {
    "a shard is missing": (lambda folder: (folder / SECOND).unlink(), FileNotFoundError, rf"{SECOND} is missing"),
    "twice": (
        _duplicate,
        ValueError,
        rf"tensor 'lm_head\.weight' lies in {FIRST} and in {SECOND}; download the folder again",
    ),
    "the index is wrong": (
        _move,
        ValueError,
        rf"index\.json places tensor '{UP}' in {SECOND}, but it lies in {FIRST}; download the folder again",
    ),
    "the index is no index": (_index("{}"), ValueError, r"index\.json has no 'weight_map'"),
    "the index leaves the folder": (
        _index('{"weight_map": {"a": "../model.safetensors"}}'),
        ValueError,
        r"'\.\./model\.safetensors' is not the name of a file in the folder",
    ),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_broken_shards(fault, tmp_path):
    change, error, message = SHARD_FAULTS[fault]
    case, tensors = recorded("mistral")
    change(write_folder(tmp_path, case["config"], tensors, shards=2))
    with pytest.raises(error, match=message):
        load_pretrained(tmp_path)
