"""Judges that count: what a server is asked, what is read of its answers, and means over responses."""

import logging
import math

import numpy as np
import pytest

import rlalign as ra
from rlalign.evaluation.estimates import interval
from rlalign.evaluation.reasoning import ASPECTS, INSTRUCTION, endpoint_count, judge_reasoning
from rlalign.rollout import Engine
from tests.protocol import served

OPTIONS = {"A": "Rest", "B": "Ice"}
PROMPTS = [
    ra.Prompt(n, np.array([1]), text, {"question": text, "options": OPTIONS, "answer": "B"})
    for n, text in enumerate(("A {limp}?", "A cough?", "A rash?"))
]


class Judge:
    """Says how many letters x the response has, with the case shown before it."""

    path = "/v1/chat/completions"

    def __init__(self):
        self.asked, self.headers, self.failures = [], [], []
        self.say = lambda shown: f"<count>9</count> first, but <count> {shown.count('x')} </count>"

    def answer(self, body):
        shown = body["messages"][1]["content"]
        response = shown.split("<response>\n")[1].split("\n</response>")[0]
        return {"choices": [{"message": {"content": self.say(response)}}]}


@pytest.fixture
def judge():
    with served(Judge()) as one:
        yield one


def test_what_a_server_is_asked(judge):
    count = endpoint_count(Engine(judge.url, "judge"), max_tokens=99)
    assert count("backtracking", "A {limp}?", "B: Ice", "x or {x}") == 2.0
    (body,) = judge.asked
    assert {"model": "judge", "temperature": 0.0, "max_tokens": 99}.items() <= body.items()
    assert body["messages"][0] == {"role": "system", "content": INSTRUCTION}
    shown = body["messages"][1]["content"]
    order = [shown.index(text) for text in ("A {limp}?", "B: Ice", "x or {x}", ASPECTS["backtracking"])]
    assert order == sorted(order)


NO_COUNTS = ["none", "<count></count>", "<count>two</count>", "count 2", "", None, "<count>-1</count>"]
NO_COUNTS += ["<count>1</count>, no, <count>some</count>", "<count>2.5</count>", "<count>1234567</count>"]


@pytest.mark.parametrize("text", NO_COUNTS)
def test_an_answer_without_a_count_is_nan(judge, text):
    judge.say = lambda shown: text
    assert math.isnan(endpoint_count(Engine(judge.url, "judge"))("subgoals", "?", "A", "x"))


def test_means_over_responses_by_a_server(judge):
    count = endpoint_count(Engine(judge.url, "judge"))
    responses = ["xx", "x", "none"]
    found = judge_reasoning(count, PROMPTS, responses, aspects=["verification", "subgoals"], at_once=3)
    assert found == dict.fromkeys(("verification", "subgoals"), (interval([2.0, 1.0, 0.0]), 3, 0))
    assert len(judge.asked) == 6
    assert all("A: Rest\nB: Ice" in body["messages"][1]["content"] for body in judge.asked)


def test_one_stray_verdict_costs_one(judge, caplog):
    count = endpoint_count(Engine(judge.url, "judge"))
    with caplog.at_level(logging.WARNING):
        found = judge_reasoning(count, PROMPTS, ["xx", "x", "none"], aspects=["faithfulness", "subgoals"])
    assert found == {"faithfulness": (interval([1.0, 0.0]), 2, 1), "subgoals": (interval([2.0, 1.0, 0.0]), 3, 0)}
    assert [record.getMessage() for record in caplog.records] == ["1 of 3 responses got no count of faithfulness"]


def test_every_aspect_is_asked_of_every_response_and_none_is_no_number(caplog):
    calls = []

    def count(aspect, question, answer, response):
        calls.append((aspect, question.split("\n")[0], answer, response))
        return math.nan if response == "b" or aspect == "subgoals" else float(aspect == "faithfulness")

    with caplog.at_level(logging.WARNING):
        found = judge_reasoning(count, PROMPTS, ["a", "b", "c"], at_once=1)
    assert list(found) == list(ASPECTS)
    texts = [prompt.text for prompt in PROMPTS]
    assert calls == [(a, q, "B: Ice", r) for a in ASPECTS for q, r in zip(texts, "abc", strict=True)]
    assert found["faithfulness"] == ((1.0, 1.0, 1.0), 2, 1)
    assert found["verification"].mean.value == 0.0
    assert math.isnan(found["subgoals"].mean.value)
    assert found["subgoals"][1:] == (0, 3)
    assert "1 of 3 responses got no count of verification" in caplog.text
    assert "limp" not in caplog.text


def test_what_is_refused():
    for value, aspect in ((-1.0, "subgoals"), (math.inf, "subgoals"), (2.0, "faithfulness")):
        with pytest.raises(ValueError, match=rf"count gave {value} for {aspect}: numbers from 0 to "):
            judge_reasoning(lambda *_, value=value: value, PROMPTS[:1], ["a"], aspects=[aspect])
    calls = []
    with pytest.raises(ValueError, match=r"count gave -1.0 for verification"):  # at once, not after all calls
        judge_reasoning(lambda *one: calls.append(one) or -1.0, PROMPTS, ["a", "b", "c"], at_once=1)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="3 prompts, 1 responses, at_once=16: give as many, at least one each"):
        judge_reasoning(lambda *_: 0.0, PROMPTS, ["a"])
    engine = Engine("http://localhost:1/v1", "judge")
    with pytest.raises(ValueError, match=r"instruction must ask for <count>NUMBER</count> \(it does: False\)"):
        endpoint_count(engine, instruction="Count.")
    with pytest.raises(ValueError, match=r"aspect must be one of verification, .* got 'style'"):
        endpoint_count(engine)("style", "?", "A", "x")
