"""Chat templates on both sides of sampling and training, and tokenizers that are refused."""

import json

import numpy as np
import pytest

from rlalign.models import load_tokenizer
from tests.models.tokenizers import CHATML, FORGETS, QUESTION, REFUSES, TALK, save_tokenizer


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """write(template, **files) -> the folder of save_tokenizer."""
    return lambda template=CHATML, **files: save_tokenizer(tmp_path_factory.mktemp("tokenizer"), template, **files)


def test_a_prompt_is_the_beginning_of_the_dialogue_to_learn(write):
    tokenizer = load_tokenizer(write())
    prompt = tokenizer.chat(QUESTION)
    assert (
        tokenizer.decode(prompt, special=True) == "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens, learn = tokenizer.dialogue(TALK)
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
    assert not learn[: len(prompt)].any()
    assert tokenizer.decode(tokens[learn], special=True) == "<think>hm</think>2<|im_end|><think>hm</think>two<|im_end|>"
    later = tokenizer.chat(TALK[:-1])
    np.testing.assert_array_equal(tokens[: len(later)], later)
    assert tokens.dtype == prompt.dtype == np.int32


def test_the_newline_behind_a_turn_is_the_templates(write):
    tokenizer = load_tokenizer(write())
    tokens, learn = tokenizer.dialogue(TALK[:2])
    assert tokenizer.decode(tokens[-2:], special=True) == "<|im_end|>\n"
    assert learn[-2]
    assert not learn[-1]


def test_only_the_last_turn(write):
    tokenizer = load_tokenizer(write())
    (tokens, learn), (same, every) = (tokenizer.dialogue(TALK, learn=which) for which in ("last", "all"))
    np.testing.assert_array_equal(tokens, same)
    assert tokenizer.decode(tokens[learn]) == "<think>hm</think>two"
    assert not (learn & ~every).any()


def test_a_template_that_forgets_is_learnt_turn_by_turn(write):
    tokenizer = load_tokenizer(write(FORGETS))
    with pytest.raises(ValueError, match=r"drop earlier reasoning do.*learn='last'"):
        tokenizer.dialogue(TALK)
    tokens, learn = tokenizer.dialogue(TALK, learn="last")
    assert tokenizer.decode(tokens[learn], special=True) == "<think>hm</think>two<|im_end|>"
    assert tokenizer.decode(tokens[~learn]).count("think") == 0
    prompt = tokenizer.chat(TALK[:-1])
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)


def test_special_tokens_are_the_templates_alone(write):
    """encode adds no BOS, though the tokenizer by itself would."""
    tokenizer = load_tokenizer(write())
    assert len(tokenizer.inner.encode("abc")) == 2
    np.testing.assert_array_equal(tokenizer.encode("abc"), [len(tokenizer) - 4])
    assert tokenizer.decode(tokenizer.encode("abcäb\n")) == "abcäb\n"


def test_a_turn_that_nothing_ends_is_refused(write):
    tokenizer = load_tokenizer(write(config={"eos_token_id": 7}))
    with pytest.raises(ValueError, match=r"with none of eos_ids=\(7,\): a model that learns it never stops"):
        tokenizer.dialogue(TALK)


def test_drift_is_found(write):
    """A policy may sample a and b where the tokenizer would write ab."""
    tokenizer = load_tokenizer(write())
    a, b, ab = (int(tokenizer.encode(text)[0]) for text in ("a", "b", "ab"))
    assert tokenizer.drifted([[ab], [a, b], [b, a], [], [ab, *tokenizer.eos_ids]]) == [1]


def test_the_ends_of_a_response(write):
    end = load_tokenizer(write()).inner.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    assert load_tokenizer(write()).eos_ids == (end[1],)
    assert load_tokenizer(write(config={"eos_token_id": end[0]})).eos_ids == (end[0],)
    both = write(config={"eos_token_id": end[0]}, generation_config={"eos_token_id": end})
    assert load_tokenizer(both).eos_ids == tuple(end)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"auto_map": {"AutoTokenizer": ["mine.Own", None]}}}, "auto_map=.*never run"),
        ({"config": {"vocab_size": 100}}, r"ids up to 260, config.json's vocab_size is 100"),
        ({"config": {"vocab_size": 300, "eos_token_id": 400}}, r"ids up to 400, config.json's vocab_size is 300"),
    ],
    ids=["auto_map", "small model", "end outside"],
)
def test_folders_that_are_refused(write, files, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(**files))


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer that transformers reads"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"download the model first"):
        load_tokenizer(tmp_path / "nowhere")


def test_no_end_token(write):
    folder = write()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"names no eos_token_id: no response would ever end"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.chat([]), "at least one message"),
        (lambda t: t.chat(TALK), "last message is the assistant's"),
        (lambda t: t.dialogue(QUESTION), "needs a message with role 'assistant'"),
        (lambda t: t.dialogue(TALK, learn="first"), "learn must be 'all' or 'last', got 'first'"),
    ],
)
def test_conversations_that_are_refused(write, call, message):
    with pytest.raises(ValueError, match=message):
        call(load_tokenizer(write()))


def test_templates_that_are_missing_or_refuse(write):
    with pytest.raises(ValueError, match=r"no chat template in the folder: a base model"):
        load_tokenizer(write(None)).chat(QUESTION)
    with pytest.raises(ValueError, match=r"refuses \['system'\]: no system role"):
        load_tokenizer(write(REFUSES)).chat([{"role": "system", "content": "x"}])
