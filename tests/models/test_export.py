"""Folders out: what load_pretrained read comes back bit for bit, in every family, with or without its source."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from rlalign.models import Decoder, load_pretrained, save_pretrained
from rlalign.models.export import to_hugging_face
from rlalign.models.families import from_hugging_face
from rlalign.models.reward import add_reward_head
from rlalign.train.mesh import make_mesh
from tests.models.folders import write_folder
from tests.models.test_pretrained import CASES, assert_same, recorded
from tests.tiny import QWEN2, QWEN3, random_params


@pytest.mark.parametrize("name", CASES)
def test_what_was_read_is_written_again(name, tmp_path):
    """The same tensors under the same names, from the config alone; read again, the same parameters."""
    case, tensors = recorded(name)
    decoder, params = load_pretrained(write_folder(tmp_path / "from", case["config"], tensors))
    save_pretrained(tmp_path / "to", decoder, params)
    with safe_open(tmp_path / "to" / "model.safetensors", framework="numpy") as written:
        assert set(written.keys()) == set(tensors)
        for key in tensors:
            np.testing.assert_array_equal(written.get_tensor(key), tensors[key], err_msg=key)
    again, same = load_pretrained(tmp_path / "to")
    assert again.config == decoder.config
    assert_same(same, params)


def as_reward_model(name):
    """(config.json, tensors) of a recorded model with one number in place of its head."""
    case, tensors = recorded(name)
    config = case["config"]
    kind = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    kind = kind.replace("Gemma3For", "Gemma3TextFor")
    kept = {key: value for key, value in tensors.items() if key not in ("lm_head.weight", "embed_out.weight")}
    score = np.linspace(-1, 1, config["hidden_size"], dtype=np.float32)[None]
    return {**config, "architectures": [kind], "id2label": {"0": "good"}}, {**kept, "score.weight": score}


@pytest.mark.parametrize("name", CASES)
def test_a_reward_model_is_read_and_written_again(name, tmp_path):
    config, tensors = as_reward_model(name)
    decoder, params = load_pretrained(write_folder(tmp_path / "from", config, tensors))
    assert decoder.config.reward_head
    np.testing.assert_array_equal(params["reward"]["kernel"], tensors["score.weight"].T)
    save_pretrained(tmp_path / "to", decoder, params)
    written = json.loads((tmp_path / "to" / "config.json").read_text())
    assert written["architectures"][0].endswith("ForSequenceClassification")  # a Mistral without window is a Llama
    again, same = load_pretrained(tmp_path / "to")
    assert again.config == decoder.config
    assert_same(same, params)


def test_a_reward_model_of_a_language_model_is_a_classifier(tmp_path):
    """Its source is the folder that it began as."""
    case, tensors = recorded("qwen3")
    source = write_folder(tmp_path / "from", case["config"], tensors)
    decoder, params = add_reward_head(*load_pretrained(source))
    save_pretrained(tmp_path / "to", decoder, params, source=source)
    written = json.loads((tmp_path / "to" / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForSequenceClassification"]
    assert written["id2label"] == {"0": "LABEL_0"}
    again, same = load_pretrained(tmp_path / "to")
    assert again.config == decoder.config
    assert_same(same, params)


def test_a_source_gives_its_config_and_its_tokenizer(tmp_path):
    case, tensors = recorded("qwen2")
    source = write_folder(tmp_path / "from", {**case["config"], "transformers_version": "4.40.0"}, tensors, shards=2)
    (source / "tokenizer.json").write_text("{}")
    (source / "weights.bin").write_text("never copied")
    decoder, params = load_pretrained(source, dtype="bfloat16")
    save_pretrained(tmp_path / "to", decoder, params, source=source)
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert config == {**case["config"], "transformers_version": "4.40.0", "dtype": "bfloat16"}
    assert {p.name for p in (tmp_path / "to").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    again, same = load_pretrained(tmp_path / "to")
    assert again.config.dtype == "bfloat16"
    assert_same(same, params)


def test_files_hold_no_more_than_asked_for(tmp_path):
    params = random_params(QWEN3)
    save_pretrained(tmp_path, Decoder(QWEN3), params, shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    for file in files:
        with safe_open(file, framework="numpy") as written:
            tensors = {key: written.get_tensor(key) for key in written.keys()}  # noqa: SIM118
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 4000
        assert all(index["weight_map"][key] == file.name for key in tensors)
    assert_same(load_pretrained(tmp_path)[1], params)


def test_parameters_on_a_mesh(tmp_path):
    from rlalign.train import place_params

    params = random_params(QWEN2)
    save_pretrained(tmp_path, Decoder(QWEN2), place_params(params, make_mesh(fsdp=2, tensor=2)))
    assert_same(load_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize("name", CASES)
def test_configs_come_back(name):
    """from_hugging_face(to_hugging_face(config)) is the config."""
    config = from_hugging_face(recorded(name)[0]["config"])
    assert from_hugging_face(to_hugging_face(config)) == config


def test_a_model_of_no_family_is_refused():
    odd = dataclasses.replace(QWEN2, post_norms=True, activation="gelu")
    with pytest.raises(ValueError, match=r"no family .*; qwen2 is the nearest: post_norms=True \(there False\)$"):
        to_hugging_face(odd)


def test_another_models_source_is_refused(tmp_path):
    case, tensors = recorded("qwen2")
    source = write_folder(tmp_path / "from", case["config"], tensors)
    with pytest.raises(ValueError, match=r"config.json is of another model: vocab_size=17 \(there 64\), width=16"):
        save_pretrained(tmp_path / "to", Decoder(QWEN2), random_params(QWEN2), source=source)
    assert not (tmp_path / "to").exists()


def test_a_folder_with_weights_is_left_alone(tmp_path):
    params = jax.tree.map(jnp.zeros_like, random_params(QWEN2))
    save_pretrained(tmp_path, Decoder(QWEN2), params)
    with pytest.raises(FileExistsError, match="holds weights already; choose another folder, or remove them"):
        save_pretrained(tmp_path, Decoder(QWEN2), random_params(QWEN2))
    assert_same(load_pretrained(tmp_path)[1], params)
