"""The clinic of words: questions with one answer, honest answers that get all, and traces with the faults asked for."""

import collections
import re

import numpy as np
import pytest

from rlalign.envs import clinic
from rlalign.envs.clinic import DISEASES, LETTERS, decode, encode, problem, problems, trace, written
from rlalign.rewards.clinical import crpo

NONE = {"wrong": 0.0, "malformed": 0.0, "detached": 0.0, "foreign": 0.0}


def findings(one):
    return re.fullmatch(r"a \w+ of \d+ has (\w+) , (\w+) and (\w+) \.", one.example["question"]).groups()


def test_a_question_has_one_answer():
    for number in range(300):
        one = problem(number)
        options = one.example["options"]
        assert list(options) == list(LETTERS)
        assert len(set(options.values())) == 5
        held = {letter: len({*findings(one)} & {*DISEASES[name]}) for letter, name in options.items()}
        assert held.pop(one.example["answer"]) == 3
        assert max(held.values()) < 3
        assert decode(one.tokens) == one.text
        assert one.text == problem(number).text


def test_answers_favour_no_letter_and_no_disease():
    every = problems("train")
    letters = collections.Counter(one.example["answer"] for one in every)
    diseases = collections.Counter(one.example["options"][one.example["answer"]] for one in every)
    assert all(0.16 < letters[letter] / len(every) < 0.24 for letter in LETTERS)
    assert all(0.08 < diseases[name] / len(every) < 0.12 for name in DISEASES)


def test_splits_share_no_question():
    train, held_out = ({one.text for one in problems(split)} for split in ("train", "held-out"))
    assert not train & held_out
    train_cases, held_out_cases = ({clinic.case(one) for one in problems(split)} for split in ("train", "held-out"))
    assert not train_cases & held_out_cases
    assert len(held_out_cases) >= 30
    assert len(train_cases) + len(held_out_cases) <= 350
    assert len(train) + len(held_out) == len(problems("train")) + len(problems("held-out")) > 2000
    assert {one.text for one in problems("policy")} < train


def test_an_honest_answer_gets_all_and_a_wrong_one_the_small_terms():
    for one in problems("held-out")[:100]:
        right = one.example["answer"]
        for letter in LETTERS:
            other = next(a for a in LETTERS if a != letter)
            text = written(one, letter, against=other)
            wanted = {"accuracy": float(letter == right), "reasoning": 1.5, "consistency": 1.0}
            assert {k: v for k, v in crpo(text, dict(one.example)).items() if k != "total"} == wanted
            assert decode(encode(text)) == text
            assert len(encode(text)) < clinic.ANSWER_TOKENS


FAULTS = {
    "wrong": ("accuracy", {0.0}),
    "malformed": ("reasoning", {0.0, 1.5}),  # 1.5 where the box alone is at fault
    "detached": ("reasoning", {1.0}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_term(fault):
    term, values = FAULTS[fault]
    seen = set()
    for one in problems("held-out"):
        text = trace(one, np.random.default_rng(one.id), **{**NONE, fault: 1.0})
        found = crpo(text, dict(one.example))
        assert found["total"] < 12
        seen.add(found[term])
    assert seen == values


def test_foreign_signs_cost_consistency_alone():
    one = problems("held-out")[0]
    found = crpo(trace(one, np.random.default_rng(0), **{**NONE, "foreign": 1.0}), dict(one.example))
    assert found["consistency"] < 1.0
    assert found["accuracy"] == 1.0
    assert found["reasoning"] == 1.5


def test_demonstrations_follow_from_seed_and_question():
    how = {"wrong": 0.5, "malformed": 0.5, "detached": 0.5, "foreign": 0.5}
    one, again, other = (clinic.demonstrations("held-out", seed=seed, **how) for seed in (0, 0, 1))
    same = lambda a, b: [np.array_equal(x.response, y.response) for x, y in zip(a, b, strict=True)]
    assert all(same(one, again))
    assert np.mean(same(one, other)) < 0.5
    assert all(x.response[-1] == clinic.EOS and len(x.response) <= clinic.ANSWER_TOKENS for x in one)
    shares = np.mean([crpo(decode(x.response), dict(x.prompt.example))["accuracy"] for x in one])
    assert 0.3 < shares < 0.6
