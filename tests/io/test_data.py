"""Prompt files, good and bad, and the order in which training visits prompts."""

import collections
import json
import zlib
from typing import Any

import numpy as np
import pytest

from rlalign.io.data import prompt_order, prompts_at_step, read_prompts
from rlalign.io.records import Examples

BOS, EOS = 1, 2


def tokenize(text):
    """BOS and one token a letter."""
    return [BOS] + [10 + ord(letter) for letter in text.strip("~")]


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "prompts.jsonl"
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(raw) + b"\n")
        return path

    return write


def read(path, **options):
    return read_prompts(path, tokenize, **{"max_tokens": 8, "special_ids": (BOS, EOS)} | options)


def test_reads_prompts_in_order_with_their_records(write):
    found = read(write({"prompt": "ab", "answer": "c", "n": [1, {"k": None}]}, {"prompt": "dé"}))
    assert isinstance(found, Examples)
    assert len(found) == 2
    assert found[0].id == 0
    assert found[0].tokens.dtype == np.int32
    assert found[0].tokens.tolist() == [BOS, 10 + ord("a"), 10 + ord("b")]
    assert found[0].text == "ab"
    assert found[0].example == {"prompt": "ab", "answer": "c", "n": [1, {"k": None}]}
    assert [prompt.text for prompt in found] == ["ab", "dé"]
    assert found[-1:] == (found[1],)
    assert found.dropped == ()
    assert found.summary() == "2 prompts"
    with pytest.raises(ValueError, match="read-only"):
        found[0].tokens[0] = 5


def test_the_id_is_the_index_of_the_line_whatever_is_left_out(write):
    path = write({"prompt": "a" * 99}, b"", {"prompt": "b"}, b"{", {"prompt": "c"})
    assert [prompt.id for prompt in read(path, on_error="skip")] == [2, 4]


def test_ids_from_a_field(write):
    found = read(
        write({"prompt": "a", "id": 7}, {"prompt": "b", "id": "../../x"}, {"prompt": "c", "id": "7"}), id_field="id"
    )
    assert [prompt.id for prompt in found] == [7, zlib.crc32(b"../../x") % 2**31, zlib.crc32(b"7") % 2**31]
    assert found[1].id == 1_109_734_312  # the same on every machine and in every version


def test_a_byte_order_mark_and_windows_line_ends_are_fine(write):
    assert [prompt.text for prompt in read(write(b'\xef\xbb\xbf{"prompt": "a"}\r', b'{"prompt": "b"}\r', b"\r"))] == [
        "a",
        "b",
    ]


GOOD = {"prompt": "ok", "id": 1}
BAD = {
    "broken JSON": (b'{"prompt": "a"', r"broken JSON \(Expecting ',' delimiter.*fix the line"),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}', r"broken JSON \(Extra data"),
    "deep JSON": (b"[" * 200_000, r"broken JSON"),
    "bad UTF-8": (b'{"prompt": "\xff"}', r"byte 13 is not UTF-8; convert the file"),
    "half a surrogate": (
        b'{"prompt": "a\\ud800", "id": 2}',
        r"field 'prompt' holds half a surrogate pair; fix its escape",
    ),
    "not an object": ([1, 2], r"an array, not an object; write \{\"prompt\""),
    "null": (None, r"null, not an object"),
    "missing field": (
        {"question": "a", "id": 2},
        r"no field 'prompt' \(present: question, id\); add it or name another",
    ),
    "not a text": ({"prompt": [{"role": "user"}], "id": 2}, r"field 'prompt' is an array, not a text; .*chat template"),
    "a number": ({"prompt": 4, "id": 2}, r"field 'prompt' is a number, not a text"),
    "empty": ({"prompt": "", "id": 2}, r"field 'prompt' is empty or blank; remove the record"),
    "blank": ({"prompt": " \n\t\u3000", "id": 2}, r"field 'prompt' is empty or blank"),
    "only special tokens": ({"prompt": "~", "id": 2}, r"field 'prompt' gives no tokens but special ones \(1 in all\)"),
    "duplicate id": ({"prompt": "a", "id": 1}, r"id 1 was used at line 1 already; make field 'id' unique"),
    "missing id": ({"prompt": "a"}, r"no field 'id' \(present: prompt\)"),
    "id true": ({"prompt": "a", "id": True}, r"id True is no integer in \[0, 2\*\*31\); write it as a text"),
    "id too large": ({"prompt": "a", "id": 2**31}, r"id 2147483648 is no integer"),
    "id negative": ({"prompt": "a", "id": -1}, r"id -1 is no integer"),
    "id 1.0": ({"prompt": "a", "id": 1.0}, r"id 1.0 is no integer"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_record_is_refused_by_file_and_line_or_skipped_and_counted(write, line, message):
    path = write(GOOD, line, {"prompt": "end", "id": 3})
    with pytest.raises(ValueError, match=rf"prompts\.jsonl:2: .*{message}.*, or pass on_error='skip'"):
        read(path, id_field="id")
    found = read(path, id_field="id", on_error="skip")
    assert [prompt.id for prompt in found] == [1, 3]
    assert [item.line for item in found.dropped] == [2]
    assert found.summary() == f"2 prompts; left out: 1 {found.dropped[0].kind} (first at line 2)"


def test_a_prompt_that_is_too_long_is_left_out_and_counted(write):
    found = read(write({"prompt": "a" * 7}, {"prompt": "b" * 8}, {"prompt": "c" * 20}))
    assert [prompt.text for prompt in found] == ["a" * 7]  # with BOS exactly max_tokens
    assert [(item.line, item.kind, item.reason) for item in found.dropped] == [
        (2, "too long", "9 tokens, more than max_tokens=8"),
        (3, "too long", "21 tokens, more than max_tokens=8"),
    ]
    assert found.summary() == "1 prompts; left out: 2 too long (first at line 2)"


@pytest.mark.parametrize("lines", [(), (b"", b"  "), ({"prompt": "a" * 99},)], ids=["empty", "blank", "all too long"])
def test_a_file_without_prompts_is_refused(write, lines):
    with pytest.raises(ValueError, match=r"prompts\.jsonl: no prompts to train on: 0 prompts.*check the file, field"):
        read(write(*lines), on_error="skip")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{path.name}: no such file .*give a \.jsonl file"):
            read(path)


def test_a_file_without_line_ends_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("rlalign.io.records.MAX_LINE_BYTES", 100)
    path = tmp_path / "big.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + b"x" * 1000)
    with pytest.raises(ValueError, match=r"big\.jsonl:2: a line of over 100 bytes; is the file JSON Lines\?"):
        read(path, on_error="skip")


@pytest.mark.parametrize(
    "wrong",
    ["text", {"input_ids": [1]}, collections.UserDict(), [[1, 2]], [[1], [2, 3]], [1.5], [-1], [2**31], None, [True]],
)
def test_a_tokenizer_that_returns_no_ids_is_an_error_even_when_skipping(write, wrong):
    with pytest.raises(TypeError, match=r"tokenize returned .* for 'a', which is not a list of token ids; .* encode"):
        read_prompts(write({"prompt": "a"}), lambda text: wrong, max_tokens=8, on_error="skip")


@pytest.mark.parametrize("kind", [tuple, np.array, lambda ids: np.array(ids, np.uint16)])
def test_a_tokenizer_may_return_any_sequence_of_ids(write, kind):
    found = read_prompts(write({"prompt": "a"}), lambda text: kind([3, 4]), max_tokens=8)
    assert found[0].tokens.tolist() == [3, 4]


def test_a_tokenizer_without_tokens_makes_a_bad_record(write):
    with pytest.raises(
        ValueError, match=r"prompts.jsonl:1: field 'prompt' gives no tokens but special ones \(0 in all\)"
    ):
        read_prompts(write({"prompt": "a"}), lambda text: [], max_tokens=8)


def test_bad_options_are_refused(write):
    path = write(GOOD)
    with pytest.raises(ValueError, match="on_error is 'ignore', must be 'raise' or 'skip'"):
        read(path, on_error="ignore")
    with pytest.raises(ValueError, match="max_tokens is 0, must be positive"):
        read(path, max_tokens=0)


def test_an_order_is_a_permutation_fixed_by_seed_and_epoch():
    orders = {(seed, epoch): prompt_order(97, seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)}
    for order in orders.values():
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(97))
    assert len({order.tobytes() for order in orders.values()}) == 16
    # Recorded: a resumed run must find the same order after every upgrade.
    assert prompt_order(8, seed=0, epoch=0).tolist() == [6, 3, 1, 4, 5, 2, 7, 0]
    assert prompt_order(1, seed=5, epoch=5).tolist() == [0]


def test_the_order_favours_no_place():
    first = collections.Counter(int(prompt_order(5, seed=0, epoch=epoch)[0]) for epoch in range(2000))
    assert all(320 < first[prompt] < 480 for prompt in range(5))  # 400 expected, standard deviation 18


@pytest.mark.parametrize(("num_prompts", "per_step"), [(10, 5), (10, 4), (7, 3), (3, 8), (1, 1), (5, 5)])
def test_every_prompt_is_visited_once_an_epoch_whatever_the_restarts(num_prompts, per_step):
    steps = 4 * num_prompts
    visits = [prompts_at_step(num_prompts, per_step, seed=3, step=step) for step in range(steps)]
    assert all(visit.shape == (per_step,) and visit.dtype == np.int64 for visit in visits)
    epochs = np.concatenate(visits).reshape(-1, num_prompts)
    for epoch, visited in enumerate(epochs):
        np.testing.assert_array_equal(visited, prompt_order(num_prompts, seed=3, epoch=epoch))
    for step in (steps - 1, 2, 3):  # a resumed run asks for any step first
        np.testing.assert_array_equal(prompts_at_step(num_prompts, per_step, seed=3, step=step), visits[step])


def test_a_step_may_come_from_the_train_state():
    step: Any = np.int32(5_000_000)  # times 512 it exceeds an int32
    wide = prompts_at_step(1000, 512, seed=1, step=5_000_000)
    np.testing.assert_array_equal(prompts_at_step(1000, 512, seed=1, step=step), wide)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prompts": 0}, "num_prompts is 0, must be at least 1"),
        ({"per_step": 0}, "per_step is 0, must be at least 1"),
        ({"seed": -1}, "seed is -1, must be at least 0"),
        ({"step": -1}, "step is -1, must be at least 0"),
    ],
)
def test_bad_arguments_of_the_order_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompts_at_step(**{"num_prompts": 4, "per_step": 2, "seed": 0, "step": 0} | arguments)
