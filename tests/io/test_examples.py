"""Demonstrations and preferences: every form of record, the tokens made of them, and what is refused."""

import json

import numpy as np
import pytest

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.examples import chat_encoding, plain_encoding, read_demonstrations, read_preferences
from rlalign.models import load_tokenizer
from tests.models.tokenizers import CHATML, FORGETS, REFUSES, TALK, save_tokenizer

USER, ANSWER, OTHER = (
    {"role": "user", "content": "abc?"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)
STRIPS = CHATML.replace("m['content']", "m['content'] | trim")


def letters(value):
    """A prompt's letters, with the roles of messages, as numbers from 10."""
    text = value if isinstance(value, str) else "".join(f"{m['role'][0]}:{m['content']};" for m in value)
    return [10 + ord(letter) for letter in text]


LETTERS = ra.Encoding(letters, lambda prompt, text: [*letters(text), 1])


def spelled(tokens):
    return "".join(chr(i - 10) if i > 1 else "|" for i in tokens.tolist())


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """write(template) -> the folder of save_tokenizer."""
    return lambda template=CHATML: save_tokenizer(tmp_path_factory.mktemp("tokenizer"), template)


@pytest.fixture
def save(tmp_path):
    def save(*records):
        path = tmp_path / "examples.jsonl"
        path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records))
        return path

    return save


def demonstrations(path, encode=LETTERS, **options):
    return read_demonstrations(path, encode, **{"max_tokens": 100} | options)


def preferences(path, encode=LETTERS, **options):
    return read_preferences(path, encode, **{"max_tokens": 100} | options)


@pytest.mark.parametrize(
    ("record", "prompt", "response"),
    [
        ({"prompt": "ab", "response": " c"}, "ab", " c|"),
        ({"prompt": "ab", "response": [ANSWER]}, "ab", "yes|"),
        ({"prompt": [USER], "response": "c"}, "u:abc?;", "c|"),
        ({"prompt": [USER, ANSWER, USER], "response": [OTHER]}, "u:abc?;a:yes;u:abc?;", "no|"),
        ({"messages": [USER, ANSWER]}, "u:abc?;", "yes|"),
        ({"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, "s:;u:abc?;", "yes|"),
        ({"prompt": "abc?\n", "messages": [USER, ANSWER, USER, OTHER]}, "u:abc?;a:yes;u:abc?;", "no|"),
        ({"prompt": [USER], "messages": [USER, ANSWER | {"tool_calls": None}]}, "u:abc?;", "yes|"),
    ],
)
def test_the_forms_of_a_demonstration(save, record, prompt, response):
    (found,) = demonstrations(save(record))
    assert isinstance(found, ra.Demonstration)
    assert spelled(found.prompt.tokens) == prompt
    assert spelled(found.response) == response
    assert found.prompt.tokens.dtype == found.response.dtype == np.int32
    assert found.prompt.example == record
    with pytest.raises(ValueError, match="read-only"):
        found.response[0] = 5


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "ab", "chosen": "c", "rejected": "d"}, "ab", "c|", "d|"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, "u:abc?;", "yes|", "no|"),
        ({"prompt": "ab", "chosen": [ANSWER], "rejected": "d"}, "ab", "yes|", "d|"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "u:abc?;", "yes|", "no|"),
        ({"prompt": "abc?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "u:abc?;", "yes|", "no|"),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "u:abc?;", "yes|", "no|"),
    ],
)
def test_the_forms_of_a_preference(save, record, prompt, chosen, rejected):
    (found,) = preferences(save(record))
    assert isinstance(found, ra.Preference)
    assert [spelled(x) for x in (found.prompt.tokens, found.chosen, found.rejected)] == [prompt, chosen, rejected]
    assert found.prompt.example == record


def test_fields_of_other_names_and_ids(save):
    path = save({"id": 7, "q": "a", "a": "b", "r": "c"}, {"id": 9, "q": "d", "a": "e", "r": "f"})
    found = demonstrations(path, prompt_field="q", response_field="a", id_field="id")
    assert [(d.prompt.id, d.prompt.text, spelled(d.response)) for d in found] == [(7, "a", "b|"), (9, "d", "e|")]
    pairs = preferences(path, prompt_field="q", chosen_field="r", rejected_field="a")
    assert [(p.prompt.id, spelled(p.chosen), spelled(p.rejected)) for p in pairs] == [(0, "c|", "b|"), (1, "f|", "e|")]
    (talk,) = demonstrations(save({"talk": [USER, ANSWER]}), messages_field="talk")
    assert talk.prompt.text == "abc?"
    (talk,) = demonstrations(save({"messages": TALK}))
    assert talk.prompt.text == "user: What is 1 + 1?\nassistant: <think>hm</think>2\nuser: Again."


D = {"prompt": "a", "response": "b"}
BAD_DEMONSTRATIONS = {
    "no response": ({"prompt": "a"}, r"no field 'response' \(present: prompt\); add it or name another"),
    "no prompt": ({"response": "a"}, r"no field 'prompt' \(present: response\)"),
    "both": (D | {"messages": [USER, ANSWER]}, r"both 'response' and 'messages': two responses; remove one"),
    "number": (D | {"response": 4}, r"field 'response' is a number, not a response; write a text, or a list of mess"),
    "no list": (D | {"prompt": {"role": "user"}}, r"field 'prompt' is an object, not a prompt; write a text"),
    "blank": (D | {"response": " \n"}, r"the response in field 'response' is empty or blank; remove the record"),
    "blank prompt": (D | {"prompt": "\t"}, r"the prompt in field 'prompt' is empty or blank; remove the record"),
    "blank turn": (D | {"prompt": [USER | {"content": ""}]}, r"the prompt in field 'prompt' is empty or blank"),
    "empty list": (D | {"response": []}, r"field 'response' is an empty list; remove the record"),
    "user ends": ({"messages": [USER]}, r"field 'messages' ends with a message of role 'user'; end it with the assis"),
    "only one": ({"messages": [ANSWER]}, r"field 'messages' holds no message that is answered; put the prompt before"),
    "own answer": ({"messages": [USER, ANSWER, OTHER]}, r"field 'messages' asks for an answer to the assistant's own"),
    "own prompt": (D | {"prompt": [USER, ANSWER]}, r"field 'prompt' asks for an answer to the assistant's own message"),
    "whole": (D | {"response": [USER, ANSWER]}, r"field 'response' is a whole conversation; name it 'messages'"),
    "text message": ({"messages": ["a", ANSWER]}, r"message 0 of field 'messages' is a text, not an object; write \{"),
    "no role": ({"messages": [USER, {"content": "a"}]}, r"message 1 of field 'messages' has no role; give it a text"),
    "image": ({"messages": [USER | {"content": [{}]}, ANSWER]}, r"message 0 .* has an array as content; give it a te"),
    "null": (
        {"messages": [USER, ANSWER | {"content": None}]},
        r"message 1 .* has null as content; give it a text",
    ),
    "tool": (
        {"messages": [USER, ANSWER | {"tool_calls": [{"id": 1}]}]},
        r"the answer in field 'messages' has 'tool_calls' beside its content; write that into the content",
    ),
    "other prompt": (
        {"prompt": "b", "messages": [USER, ANSWER]},
        r"field 'prompt' is not what field 'messages' answers; correct one, or name another field",
    ),
    "surrogate": (b'{"prompt": "a", "response": "\\ud800"}', r"field 'response' holds half a surrogate pair; fix its"),
    "surrogate prompt": (b'{"prompt": "\\ud800", "response": "b"}', r"field 'prompt' holds half a surrogate pair"),
    "surrogate turn": (
        b'{"prompt": [{"role": "user", "content": "\\ud800"}], "response": "b"}',
        r"message 0 of field 'prompt' holds half a surrogate pair; fix its escape",
    ),
    "broken": (b"{", r"broken JSON"),
}


@pytest.mark.parametrize(("record", "message"), BAD_DEMONSTRATIONS.values(), ids=BAD_DEMONSTRATIONS.keys())
def test_a_bad_demonstration_is_refused_by_file_and_line_or_skipped_and_counted(save, record, message):
    path = save(D, record, D)
    with pytest.raises(ValueError, match=rf"examples\.jsonl:2: .*{message}.*, or pass on_error='skip'"):
        demonstrations(path)
    found = demonstrations(path, on_error="skip")
    assert [d.prompt.id for d in found] == [0, 2]
    assert found.summary() == f"2 demonstrations; left out: 1 {found.dropped[0].kind} (first at line 2)"


P = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD_PREFERENCES = {
    "one response": ({"prompt": "a", "chosen": "b"}, r"no field 'rejected' \(present: prompt, chosen\)"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, r"no field 'prompt' \(present: chosen, rejected\)"),
    "equal": (P | {"rejected": "b"}, r"fields 'chosen' and 'rejected' are the same response; remove the record"),
    "equal as tokens": (P | {"rejected": [{"role": "assistant", "content": "b"}]}, r"are the same response"),
    "two prompts": (
        {"chosen": [USER, ANSWER], "rejected": [USER | {"content": "d"}, OTHER]},
        r"fields 'chosen' and 'rejected' answer different conversations; let them differ in the last message alone",
    ),
    "half whole": (P | {"chosen": [USER, ANSWER]}, r"answer different conversations"),
    "other prompt": (
        {"prompt": [USER, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        r"field 'prompt' is not what field 'chosen' answers",
    ),
    "blank": (P | {"rejected": ""}, r"the response in field 'rejected' is empty or blank"),
    "user ends": (P | {"rejected": [USER]}, r"field 'rejected' ends with a message of role 'user'"),
}


@pytest.mark.parametrize(("record", "message"), BAD_PREFERENCES.values(), ids=BAD_PREFERENCES.keys())
def test_a_bad_preference_is_refused_by_file_and_line_or_skipped_and_counted(save, record, message):
    path = save(P, record, P)
    with pytest.raises(ValueError, match=rf"examples\.jsonl:2: .*{message}.*, or pass on_error='skip'"):
        preferences(path)
    found = preferences(path, on_error="skip")
    assert [p.prompt.id for p in found] == [0, 2]
    assert found.summary() == f"2 preferences; left out: 1 {found.dropped[0].kind} (first at line 2)"


def test_what_is_too_long_is_left_out_whole_and_counted(save):
    path = save(*({"prompt": "aaa", "response": "b" * n} for n in range(1, 8)))
    found = demonstrations(path, max_tokens=8)  # 3 and n and the end
    assert [d.response.size for d in found] == [2, 3, 4, 5]
    assert [(x.line, x.kind) for x in found.dropped] == [(n, "too long") for n in (5, 6, 7)]
    assert found.dropped[0].reason == "9 tokens, more than max_tokens=8"
    found = demonstrations(path, max_tokens=8, max_response=3)
    assert [d.response.size for d in found] == [2, 3]
    assert found.dropped[0].reason == "4 tokens, more than max_response=3"
    for pair in ({"chosen": "b" * 5, "rejected": "c"}, {"chosen": "b", "rejected": "c" * 5}):  # the longer one counts
        found = preferences(save(P, {"prompt": "aaa", **pair}), max_tokens=8)
        assert found.summary() == "1 preferences; left out: 1 too long (first at line 2)"
        assert preferences(save({"prompt": "aaa", **pair}), max_tokens=9).dropped == ()


def test_a_file_without_examples_and_bad_options_are_refused(save):
    with pytest.raises(ValueError, match=r"examples\.jsonl: no demonstrations to train on: 0 demonstr.*1 too long"):
        demonstrations(save({"prompt": "a" * 200, "response": "b"}))
    with pytest.raises(ValueError, match=r"no preferences to train on: 0 preferences.*; check the file, field"):
        preferences(save(b""))
    with pytest.raises(ValueError, match="on_error is 'ignore', must be 'raise' or 'skip'"):
        demonstrations(save(D), on_error="ignore")
    with pytest.raises(ValueError, match="max_tokens is 0, must be positive"):
        preferences(save(P), max_tokens=0)
    with pytest.raises(TypeError, match=r"encode is function, must be Encoding\(prompt, response\): chat_encoding"):
        demonstrations(save(D), encode=letters)
    with pytest.raises(ValueError, match=r":2: id 1 was used at line 1 already; make field 'id' unique"):
        demonstrations(save(D | {"id": 1}, D | {"id": 1}), id_field="id")


def test_encodings_of_ones_own(save):
    """Two functions are enough: here the characters of envs.sums."""
    end = np.array([sums.EOS], np.int32)
    encode = ra.Encoding(sums.encode, lambda prompt, text: np.concatenate([sums.encode(text), end]))
    (found,) = demonstrations(save({"prompt": "57+38=", "response": "590"}), encode)
    assert found.response.tolist() == [7, 11, 2, 1]
    bad = save({"prompt": "57 + 38", "response": "590"})
    with pytest.raises(ValueError, match=r"examples\.jsonl:1: encode\.prompt refuses it: substring not found; correct"):
        demonstrations(bad, encode)
    with pytest.raises(ValueError, match=r":1: the prompt gives no tokens; remove the record"):
        demonstrations(save(D), ra.Encoding(lambda prompt: [], LETTERS.response))
    with pytest.raises(ValueError, match=r":1: the response in field 'response' gives no tokens; let encode.response"):
        demonstrations(save(D), ra.Encoding(LETTERS.prompt, lambda prompt, text: []))
    with pytest.raises(TypeError, match=r"encode\.response returned 'b' for 'b', which is not a list of token ids"):
        demonstrations(save(D), ra.Encoding(LETTERS.prompt, lambda prompt, text: text), on_error="skip")


@pytest.mark.parametrize("template", [CHATML, FORGETS, STRIPS], ids=["chatml", "forgets", "strips"])
@pytest.mark.parametrize("talk", [TALK[:2], TALK, [{"role": "system", "content": "Hm."}, *TALK]], ids=len)
def test_prompt_and_response_are_the_dialogue_up_to_its_end_token(write, template, talk):
    tokenizer = load_tokenizer(write(template))
    encode = chat_encoding(tokenizer)
    prompt, response = encode.prompt(talk[:-1]), encode.response(talk[:-1], talk[-1]["content"])
    whole = tokenizer.inner.apply_chat_template(talk, tokenize=False)
    end = tokenizer.decode(tokenizer.eos_ids, special=True)
    assert tokenizer.decode(np.concatenate([prompt, response]), special=True) == whole[: whole.rindex(end) + len(end)]
    dialogue, _ = tokenizer.dialogue(talk, learn="last")
    np.testing.assert_array_equal(np.concatenate([prompt, response]), dialogue[: prompt.size + response.size])
    np.testing.assert_array_equal(prompt, tokenizer.chat(talk[:-1]))  # what is sampled after
    assert np.isin(response, tokenizer.eos_ids).tolist() == [False] * (response.size - 1) + [True]


def test_a_text_is_a_message_of_the_users(write, save):
    tokenizer = load_tokenizer(write())
    path = save({"prompt": "abc?", "response": "yes"}, {"messages": [USER, ANSWER]})
    text, messages = demonstrations(path, chat_encoding(tokenizer))
    np.testing.assert_array_equal(text.prompt.tokens, messages.prompt.tokens)
    np.testing.assert_array_equal(text.response, messages.response)
    assert tokenizer.decode(text.response, special=True) == "yes<|im_end|>"


def test_plain_texts_and_an_end(write, save):
    tokenizer = load_tokenizer(write(None))
    (found,) = demonstrations(save({"prompt": "abc", "response": "ab"}), plain_encoding(tokenizer))
    assert tokenizer.decode(found.prompt.tokens, special=True) == "abc"
    assert tokenizer.decode(found.response, special=True) == "ab<|im_end|>"
    assert found.response.tolist() == [*tokenizer.encode("ab"), tokenizer.eos_ids[0]]


def test_what_an_encoding_refuses(write, save):
    with pytest.raises(ValueError, match=r"no chat template: use plain_encoding, or set tokenizer.inner.chat_template"):
        chat_encoding(load_tokenizer(write(None)))
    tokenizer = load_tokenizer(write())
    ends = save(D, {"prompt": "a", "response": "b<|im_end|>c"})
    for make in (chat_encoding, plain_encoding):
        with pytest.raises(ValueError, match=r":2: encode.response refuses it: the answer writes the end token '<\|i"):
            demonstrations(ends, make(tokenizer))
    with pytest.raises(ValueError, match=r":1: encode.prompt refuses it: messages need a chat template: use chat_enc"):
        demonstrations(save({"messages": [USER, ANSWER]}), plain_encoding(tokenizer))
    refuses = chat_encoding(load_tokenizer(write(REFUSES + CHATML)))
    path = save(D, {"messages": [{"role": "system", "content": "x"}, USER, ANSWER]}, D)
    with pytest.raises(ValueError, match=r":2: encode.prompt refuses it: the chat template refuses \['system', 'user'"):
        demonstrations(path, refuses)
    assert len(demonstrations(path, refuses, on_error="skip")) == 2
