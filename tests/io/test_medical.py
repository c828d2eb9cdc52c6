"""MedQA, MedMCQA and MedXpertQA: hand-made records with the names of the true ones, and bad ones."""

import doctest
import json

import numpy as np
import pytest

from rlalign.io import medical
from rlalign.io.medical import (
    INSTRUCTION,
    of_split,
    prompt_text,
    read_medical_demonstrations,
    read_medical_questions,
)
from rlalign.rewards.clinical import crpo
from rlalign.types import Encoding

LETTERS = Encoding(
    lambda text: np.array([ord(x) for x in text], np.int32),
    lambda prompt, text: np.array([*map(ord, text), 1], np.int32),
)
MEDQA = {
    "question": " A woman has a dry eye. Which?\n",
    "answer": "Tears",
    "options": {"A": "Salt", "B": "Tears ", "C": "Oil", "D": "Milk", "E": "Wax"},
    "meta_info": "step1",
    "answer_idx": "B",
}
MEDMCQA = {
    "question": "Vitamin for the eye:",
    "exp": None,
    "cop": 3,
    "opa": "K",
    "opb": "D",
    "opc": "A",
    "opd": "C",
    "subject_name": "Physiology",
    "topic_name": None,
    "id": "45258d3d-0000-44dd-a161-c3fccbdadd88",
    "choice_type": "single",
}
MEDXPERTQA = {
    "id": "Text-7",
    "question": "A man limps. What next?\nAnswer Choices: (A) Rest (B) Ice (C) Both",
    "options": {"A": "Rest", "B": "Ice", "C": "Both"},
    "label": "C",
    "medical_task": "Treatment",
    "body_system": "Skeletal",
    "question_type": "Reasoning",
}
RECORDS = {"medqa": MEDQA, "medmcqa": MEDMCQA, "medxpertqa": MEDXPERTQA}


@pytest.fixture
def write(tmp_path):
    def write(*records):
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def read(path, form, **how):
    return read_medical_questions(path, LETTERS, form=form, **{"max_tokens": 2000, **how})


WANTED = {
    "medqa": ("A woman has a dry eye. Which?", {**MEDQA["options"], "B": "Tears"}, "B"),
    "medmcqa": ("Vitamin for the eye:", {"A": "K", "B": "D", "C": "A", "D": "C"}, "C"),
    "medxpertqa": ("A man limps. What next?", MEDXPERTQA["options"], "C"),
}


@pytest.mark.parametrize("form", RECORDS)
def test_a_record_becomes_a_prompt(form, write):
    (found,) = read(write(RECORDS[form]), form)
    question, options, answer = WANTED[form]
    assert found.example == {"question": question, "options": options, "answer": answer, "form": form}
    assert found.text == prompt_text(question, options)
    assert found.text.startswith(INSTRUCTION)
    assert found.text.endswith("\n".join(f"{a}: {text}" for a, text in options.items()))
    assert "Answer Choices" not in found.text
    assert "".join(map(chr, found.tokens)) == found.text
    assert found.id == 0
    text = f"<dx>System 1 dry System 2 limps eye</dx><conclusion>a</conclusion>\\boxed{{{answer}}}"
    assert crpo(text, dict(found.example))["accuracy"] == 1.0


def test_the_instruction_names_what_the_reward_reads():
    for what in ("<dx>", "</dx>", "System 1:", "System 2:", "<conclusion>", "</conclusion>", "\\boxed{letter}"):
        assert INSTRUCTION.count(what) == 1


def without(record, *names, **changes):
    return {name: value for name, value in {**record, **changes}.items() if name not in names}


SECRET = "Mr Marmot"
BAD = {
    "no question": ("medqa", without(MEDQA, "question"), "no field 'question' .*; add it or name another"),
    "a blank question": ("medqa", without(MEDQA, question=" \n"), "field 'question' is empty or blank; remove"),
    "a question that is no text": ("medqa", without(MEDQA, question=[SECRET]), "field 'question' is an array, not a"),
    "half a surrogate": ("medqa", without(MEDQA, question="a\ud800"), "field 'question' holds half a surrogate pair"),
    "no options": ("medqa", without(MEDQA, "options"), "no field 'options'"),
    "options as a list": ("medqa", without(MEDQA, options=[SECRET]), "field 'options' is an array, not an object"),
    "one option": ("medqa", without(MEDQA, options={"A": SECRET}), "has not A, B, ... as its names, at least two"),
    "options without B": ("medqa", without(MEDQA, options={"A": "x", "C": SECRET}), "has not A, B, ... as its names"),
    "an empty option": ("medqa", without(MEDQA, options={"A": SECRET, "B": ""}), "field 'options.B' is empty or blank"),
    "no answer": ("medqa", without(MEDQA, "answer_idx"), "no field 'answer_idx'"),
    "an answer of no option": ("medqa", without(MEDQA, answer_idx="F"), "'answer_idx' names none of the 5 options"),
    "an answer by its text": ("medqa", without(MEDQA, answer_idx=SECRET), "'answer_idx' names none of the 5 options"),
    "cop true": ("medmcqa", without(MEDMCQA, cop=True), "'cop' is no number from 1 to 4"),
    "cop null": ("medmcqa", without(MEDMCQA, cop=None), "'cop' is no number from 1 to 4"),
    "no opd": ("medmcqa", without(MEDMCQA, "opd"), "no field 'opd'"),
    "a null option": ("medmcqa", without(MEDMCQA, opa=None), "field 'opa' is null, not a text"),
    "images": ("medxpertqa", without(MEDXPERTQA, images=["MM-1.jpeg"]), "field 'images' is not empty; .* Text subset"),
    "choices alone": ("medxpertqa", without(MEDXPERTQA, question="Answer Choices: x"), "nothing before 'Answer Ch"),
    "a label of none": ("medxpertqa", without(MEDXPERTQA, label="J"), "field 'label' names none of the 3 options"),
}


@pytest.mark.parametrize(("form", "record", "message"), BAD.values(), ids=BAD.keys())
def test_bad_records_are_named_by_file_and_line_without_their_text(form, record, message, write):
    path = write(RECORDS[form], record, RECORDS[form])
    with pytest.raises(ValueError, match=rf"questions\.jsonl:2: .*{message}") as raised:
        read(path, form)
    assert SECRET not in str(raised.value)
    found = read(path, form, on_error="skip")
    assert [prompt.id for prompt in found] == [0, 2]
    assert [item.line for item in found.dropped] == [2]


def test_what_cop_counts_from(write):
    path = write(without(MEDMCQA, cop=0), MEDMCQA)
    assert [one.example["answer"] for one in read(path, "medmcqa", first_option=0)] == ["A", "D"]


@pytest.mark.parametrize(("first", "cop"), [(1, 0), (1, 5), (1, -1), (0, 4), (0, -1)])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_cop_of_another_count_is_never_skipped(first, cop, on_error, write):
    """Left out, it would leave the other answers off by one."""
    path = write(MEDMCQA, without(MEDMCQA, cop=cop, opa=SECRET))
    message = f"'cop' is no number from {first} to {first + 3}; here options count from {first}: pass first_option="
    message += f"{1 - first}, or remove records without an answer$"
    with pytest.raises(ValueError, match=rf"questions\.jsonl:2: field {message}") as raised:
        read(path, "medmcqa", first_option=first, on_error=on_error)
    assert SECRET not in str(raised.value)
    assert "on_error" not in str(raised.value)
    write(MEDMCQA, without(MEDMCQA, cop=cop, opa=""))
    with pytest.raises(ValueError, match=message):
        read_medical_demonstrations(
            path, LETTERS, form="medmcqa", max_tokens=2000, first_option=first, on_error=on_error, response_field="opc"
        )


def test_long_prompts_are_left_out_and_counted(write):
    path = write(MEDQA, without(MEDQA, question="long " * 200))
    assert read(path, "medqa", max_tokens=1200).summary() == "1 questions; left out: 1 too long (first at line 2)"
    with pytest.raises(ValueError, match=r"form must be one of medqa, medmcqa, medxpertqa, got 'usmle'"):
        read(path, "usmle")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        read(path.with_name("none.jsonl"), "medqa")


def test_traces_are_the_same_records_with_a_response(write):
    path = write(*(without(MEDQA, response=text) for text in ("So \\boxed{B}", "x" * 400, "ok")))
    found = read_medical_demonstrations(path, LETTERS, form="medqa", max_tokens=2000, max_response=100)
    assert [demonstration.response.tolist() for demonstration in found] == [
        [*map(ord, "So \\boxed{B}"), 1],
        [*map(ord, "ok"), 1],
    ]
    assert found[0].prompt.example == read(path, "medqa")[0].example
    assert found.summary() == "2 traces; left out: 1 too long (first at line 2)"
    for record, message in ((MEDQA, "no field 'response'"), (without(MEDQA, response=""), "'response' is empty")):
        with pytest.raises(ValueError, match=rf"questions\.jsonl:1: .*{message}"):
            read_medical_demonstrations(write(record), LETTERS, form="medqa", max_tokens=2000)


def test_splits_and_halves_do_not_overlap_and_depend_on_the_question_alone(write):
    records = [without(MEDQA, question=f"question {number}") for number in range(400)]
    prompts = read(write(*records), "medqa")
    text = lambda some: {prompt.text for prompt in some}
    train, held_out = of_split(prompts, "train"), of_split(prompts, "held-out")
    halves = [of_split(prompts, "train", half=half) for half in (0, 1)]
    assert text(train) | text(held_out) == text(prompts)
    assert not text(train) & text(held_out)
    assert text(halves[0]) | text(halves[1]) == text(train)
    assert not text(halves[0]) & text(halves[1])
    assert 20 < len(held_out) < 65
    assert all(150 < len(half) < 210 for half in halves)
    again = read(write(*records[::-1]), "medqa")
    assert text(of_split(again, "held-out")) == text(held_out)


def test_examples():
    assert doctest.testmod(medical).failed == 0
