"""CRPO's rewards: cases of every rule, a slow oracle on made-up texts, and answers that try to be paid for nothing."""

import doctest
import importlib
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.rewards import clinical
from rlalign.rewards.clinical import (
    LetterAccuracy,
    boxed_letter,
    crpo_reward,
    letter_accuracy,
    majority_vote,
)
from rlalign.rewards.clinical.evidence import REPORTED, numbers, reported
from tests.oracles.clinical import reward as oracle

QUESTION = "A 7-year-old boy has fever, a stiff neck and purpura. Platelets are 90."
DX = "System 1: a stiff neck with fever is meningitis. System 2: purpura and 90 platelets point to meningococci."
TOLD = "Purpura beside a stiff neck: meningococci"
BOXED = r" \boxed{B}"


def answer(dx=DX, told=TOLD, box=BOXED):
    return f"<dx>{dx}</dx><conclusion>{told}</conclusion>{box}"


def terms(text, letter="B", question=QUESTION, **how) -> Any:
    return crpo_reward(text, letter, question, **how)


def test_an_honest_answer_gets_all():
    assert terms(answer()) == {"accuracy": 1.0, "reasoning": 1.5, "consistency": 1.0, "total": 12.0}
    assert terms(answer(), "A")["total"] == 2.0
    assert terms(answer(), k=1.0)["total"] == 3.0


ACCURACY = {
    "the only box holds the letter": (r"So \boxed{B}.", 1),
    "tags or not": (answer(), 1),
    "another letter": (r"\boxed{C}", 0),
    "white space in it": (r"\boxed{ B }", 1),
    "the same twice": (r"\boxed{B} \boxed{B}", 0),
    "a bare one besides": (r"the \boxed answer is \boxed{B}", 0),
    "none": ("B", 0),
    "no braces": (r"\boxed B", 0),
    "braces apart": (r"\boxed {B}", 0),
    "not closed": (r"\boxed{B", 0),
    "lower case": (r"\boxed{b}", 0),
    "with its text": (r"\boxed{B: fever}", 0),
    "two letters": (r"\boxed{AB}", 0),
    "empty": (r"\boxed{}", 0),
    "a Cyrillic letter": (r"\boxed{В}", 0),
    "a full-width letter": (r"\boxed{Ｂ}", 0),
    "nothing": ("", 0),
}


@pytest.mark.parametrize(("text", "wanted"), ACCURACY.values(), ids=ACCURACY.keys())
def test_accuracy(text, wanted):
    assert terms(text)["accuracy"] == wanted


FORMAT = {
    "holds": (answer(told="no"), 1.0),
    "white space between": (answer(told="no").replace("</dx>", "</dx> \n\t"), 1.0),
    "text around": ("Well. " + answer(told="no") + " That is all.", 1.0),
    "words between": (answer().replace("</dx>", "</dx> so "), 0.0),
    "no conclusion": (f"<dx>{DX}</dx>", 0.0),
    "not closed": (f"<dx>{DX}</dx><conclusion>{TOLD}", 0.0),
    "other order": (f"<conclusion>{TOLD}</conclusion><dx>{DX}</dx>", 0.0),
    "conclusion in dx": (f"<dx>{DX}<conclusion>{TOLD}</conclusion></dx>", 0.0),
    "twice": (answer() * 2, 0.0),
    "nested dx": (answer(dx=f"<dx>{DX}</dx>"), 0.0),
    "a second opening tag": (answer(told="<dx>" + TOLD), 0.0),
    "upper case": (answer().replace("dx>", "DX>"), 0.0),
    "look-alike brackets": (answer().replace("<dx>", "＜dx＞"), 0.0),
    "no System 2": (answer(dx=DX.replace("System 2", "Then")), 0.0),
    "no System 1": (answer(dx=DX.replace("System 1", "First")), 0.0),
    "System 2 first": (answer(dx="System 2: slow. System 1: fast, which is a long stretch of text."), 0.0),
    "System 2 in the conclusion": (answer(dx="System 1: fast", told="System 2: slow"), 0.0),
    "nothing but the tags": ("<dx>System 1System 2</dx><conclusion></conclusion>", 1.0),
}


@pytest.mark.parametrize(("text", "wanted"), FORMAT.values(), ids=FORMAT.keys())
def test_format(text, wanted):
    assert terms(text)["reasoning"] == wanted


REFERS = {
    "two terms, one of the question": ("Purpura, so meningococci", 1.5),
    "one term": ("Purpura it is", 1.0),
    "the same term twice": ("Purpura purpura PURPURA", 1.0),
    "none of the question's": ("Meningitis by meningococci", 1.0),
    "not those of the question alone": ("An old boy of seven years", 1.0),
    "in any case of letters": ("PURPURA: MENINGOCOCCI", 1.5),
    "a number is a term": ("Purpura with 90", 1.5),
    "three letters are no term": ("The red spots, her", 1.0),
    "stop words are no terms": ("with this, from that", 1.0),
    "parts of words do not count": ("purpuras and meningococcicidal", 1.0),
    "copied": ("purpura and 90 platelets point to meningococci", 1.0),
    "copied in other case and spacing": ("PURPURA  and 90\nplatelets point to", 1.0),
    "copied, with a box": (r"purpura and 90 platelets point to meningococci. \boxed{B}", 1.0),
    "what a box holds is no term": (r"\boxed{purpura 90 platelets}", 1.0),
    "too long": ("Purpura, so meningococci" + "." * 80, 1.0),
    "empty": ("", 1.0),
}


@pytest.mark.parametrize(("told", "wanted"), REFERS.values(), ids=REFERS.keys())
def test_what_refers_back(told, wanted):
    dx = DX + " With this, that comes from them. The red spots."
    assert terms(answer(dx, told))["reasoning"] == wanted


def test_the_length_of_a_conclusion():
    for extra, wanted in ((0, 1.5), (1, 1.0)):
        dx = "System 1 fever rash, System 2 fever ras" + "h" * 1
        told = "fever; rash".ljust(3 * len(dx) // 5 + extra, ".")
        assert len(dx) % 5 == 0
        assert terms(answer(f"  {dx}\n", f" {told} "), question="fever")["reasoning"] == wanted


def test_an_empty_question_asks_for_no_term_of_its_own():
    text = answer(told="Meningitis by meningococci")
    assert terms(text)["reasoning"] == 1.0
    assert terms(text, question="")["reasoning"] == terms(text, question=" \n")["reasoning"] == 1.5
    assert terms(answer(told="x"), question="")["reasoning"] == 1.0


EFFECTIVE = {
    "": 0,
    "ab\n 1,~": 1,
    "\t": 0,
    "a\t": 0.5,
    "é": 0,
    "ab😀\x7f": 0.5,
    "\r\n": 0.5,
    "\ud800a": 0.5,
    "１a": 0.5,
}


@pytest.mark.parametrize(("text", "wanted"), EFFECTIVE.items())
def test_consistency(text, wanted):
    assert terms(text)["consistency"] == wanted
    assert terms(text)["total"] == wanted / 2


def code(text, letter="B", **how) -> Any:
    return crpo_reward(text, letter, "", mode="paper_code", **how)


def think(said, thought="hm"):
    return f"<think>{thought}</think>\n<answer>{said}</answer>"


CODE_ACCURACY = {
    "right": (r"\boxed{B}", 1),
    "wrong": (r"\boxed{Z}", 0),
    "none": ("B", 0),
    "two": (r"\boxed{B}\boxed{B}", -2),
    "three, some bare": (r"\boxed \boxed{B} \boxedB", -3),
    "bare": (r"\boxed B", -1),
    "braces apart": (r"\boxed {B}", -1),
    "not closed": (r"\boxed{B", -1),
    "closed on the next line": ("\\boxed{B\n}", -1),
    "a line feed of another kind": ("\\boxed{\r}", -0.5),
    "untrimmed": (r"\boxed{ B}", -0.5),
    "lower case": (r"\boxed{b}", -0.5),
    "empty": (r"\boxed{}", -0.5),
    "a text": (r"\boxed{fever}", -0.5),
    "nested": (r"\boxed{\text{B}}", -0.5),
    "behind the end": (r"\boxed{B}<|im_end|>\boxed{B}", 1),
}


@pytest.mark.parametrize(("text", "wanted"), CODE_ACCURACY.values(), ids=CODE_ACCURACY.keys())
def test_accuracy_of_the_code(text, wanted):
    assert code(text)["accuracy"] == wanted
    assert code(think(text))["accuracy"] == (1 if "im_end" in text else wanted)


CODE_FORMAT = {
    "with a box and more": (think(r"It is \boxed{B}."), 1.5),
    "a box alone": (think(r" \boxed{B} "), 1.0),
    "no box": (think("B"), 1.0),
    "two boxes": (think(r"\boxed{A} or \boxed{B}"), 1.0),
    "a bare box does not count": (think(r"\boxed or \boxed{B}"), 1.5),
    "a box over two lines does not count": (think("so \\boxed{\nB}"), 1.0),
    "boxes in the thought": (think(r"It is \boxed{B}.", r"\boxed{A}"), 1.5),
    "trimmed": ("\n " + think("B") + " \n", 1.0),
    "up to the end token": (think("B") + "<|im_end|> more", 1.0),
    "turned slashes": (r"<think>a<\think><answer>b<\answer>", 1.0),
    "nothing between the tags": ("<think></think><answer></answer>", 1.0),
    "words between": (think("B").replace("</think>", "</think> so"), 0.0),
    "text before": ("x" + think("B"), 0.0),
    "text behind": (think("B") + "x", 0.0),
    "no thought": ("<answer>B</answer>", 0.0),
    "further tags inside": (think("<answer>B</answer>", "</think><think>"), 1.0),
    "a thought that is closed twice": ("<think></think> a </think><answer>B</answer>", 1.0),
    "an answer that is no whole": ("<think></think><answer>", 0.0),
    "tags that share letters": ("<think></think><answer</answer>", 0.0),
    "nothing": ("", 0.0),
}


@pytest.mark.parametrize(("text", "wanted"), CODE_FORMAT.values(), ids=CODE_FORMAT.keys())
def test_format_of_the_code(text, wanted):
    assert code(text)["reasoning"] == wanted


def test_every_term_of_the_code_is_of_the_text_up_to_its_end():
    found = code("  \u00e9\\boxed{B}\t<|im_end|>ééé")
    assert found["consistency"] == 9 / 10
    assert found["total"] == 10 + 0 + 0.45
    assert code(r"ab</s>é", eos="</s>")["consistency"] == 1
    assert code(r"ab<|im_end|>é", eos="")["consistency"] == 12 / 13


PIECES = st.sampled_from(
    [
        *("<dx>", "</dx>", "<conclusion>", "</conclusion>", "<think>", "</think>", "<answer>", "</answer>"),
        *("<\\think>", "<\\answer>", "<|im_end|>", "\\boxed", "\\boxed{", "\\boxed{A}", "{", "}", "\n", " ", "\t"),
        *(
            "System 1",
            "System 2",
            "fever",
            "FEVER",
            "rash",
            "with",
            "38",
            "the",
            "ﬁne",
            "straße",
            "É",
            "\ud800",
            "²",
            ".",
        ),
    ]
)
SHAPED = st.builds(
    lambda dx, told, box: f"<dx>System 1 {dx} System 2</dx><conclusion>{told}</conclusion>{box}",
    *[st.lists(PIECES, max_size=8).map(" ".join)] * 2,
    st.sampled_from(["\\boxed{A}", "\\boxed{B}", ""]),
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=24).map("".join), SHAPED)
MODES = st.sampled_from(["paper", "paper_code"])


@settings(max_examples=600, deadline=None)
@given(TEXTS, st.sampled_from("ABZ"), st.one_of(st.just("Fever and rash, 38"), TEXTS), MODES)
def test_rewards_are_those_of_the_slow_oracle(text, letter, question, mode):
    assert crpo_reward(text, letter, question, mode=mode) == pytest.approx(oracle(text, letter, question, mode))


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.dictionaries(st.sampled_from("ABCDE"), TEXTS, max_size=3))
def test_nothing_scores_above_twelve_or_below_zero(text, question, options):
    report = dict.fromkeys(REPORTED, 0.0)
    found = crpo_reward(text, "A", question, options=options, report=report)
    assert 0 <= found["total"] <= 12
    assert found["accuracy"] in (0, 1)
    assert found["reasoning"] in (0, 1, 1.5)
    assert all(0 <= found[name] <= 1 for name in ("consistency", *REPORTED))
    assert found["total"] == crpo_reward(text, "A", question)["total"]
    assert crpo_reward(text, "A", question, mode="paper_code")["total"] <= 12


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_the_letter_changes_nothing_but_accuracy(text, question):
    one, other = (crpo_reward(text, letter, question) for letter in "AB")
    assert {k: one[k] for k in ("reasoning", "consistency")} == {k: other[k] for k in ("reasoning", "consistency")}
    assert one["accuracy"] + other["accuracy"] <= 1


KEYWORDS = "fever stiff neck purpura meningococci meningitis platelets 90"
SHAMS = {
    "stuffed with keywords": KEYWORDS * 20 + BOXED,
    "stuffed sections": answer(KEYWORDS * 20, KEYWORDS),
    "stuffed with labels": answer("System 1 System 2 " + KEYWORDS, KEYWORDS),
    "the question copied": answer(f"System 1 {QUESTION} System 2 {QUESTION}", QUESTION),
    "the reasoning copied": answer(told=DX[:40]),
    "boxes of all letters": answer(box=r" \boxed{A} \boxed{B} \boxed{C} \boxed{D}"),
    "the box repeated": answer(box=BOXED * 50),
    "nested tags": "<dx>" * 3 + DX + "</dx>" * 3 + f"<conclusion>{TOLD}</conclusion>" + BOXED,
    "sections repeated": answer(box="") * 5 + BOXED,
    "no labels": answer(DX.replace("System 1", "System 10").replace("System 2", "System 20")),
    "look-alike tags": answer().replace("<", "‹").replace(">", "›"),
    "look-alike words": answer(DX.replace("e", "е"), TOLD.replace("e", "е")),
    "look-alike letter": answer(box=r" \boxed{Β}"),
    "empty sections": answer("System 1System 2", ""),
    "a zero-width box": answer(box="\\boxed\u200b{B}"),
    "huge": answer(box="fever " * 150_000 + BOXED * 2),
}


@pytest.mark.parametrize("text", SHAMS.values(), ids=SHAMS.keys())
def test_no_sham_is_paid_as_an_honest_answer(text):
    assert terms(text)["total"] < terms(answer())["total"]


def test_labels_of_sections_are_no_terms_that_refer_back():
    question = "A 2-year-old boy has fever and 1 seizure."
    assert crpo_reward(answer("System 1 System 2 xxxxxxxxxx", "2 1"), "B", question)["reasoning"] == 1.0
    told = answer("System 1: 2 days old. System 2: after 1 seizure, a long line of thought.", "2 days, 1 seizure")
    assert crpo_reward(told, "B", question)["reasoning"] == 1.5


BIG = {
    "dx": "<dx>" * 250_000,
    "pairs": "<dx></dx>" * 110_000,
    "nested": "<dx>" * 110_000 + "</dx>" * 110_000,
    "bare boxes": "\\boxed" * 170_000,
    "open boxes": "\\boxed{" * 150_000,
    "open boxes on lines": "<think></think><answer>" + "\\boxed{\n" * 120_000 + "}</answer>",
    "closed thoughts": "<think>" + "</think> " * 120_000,
    "white space": "<think></think>" + " " * 1_000_000 + "<answer></answer>",
    "answers": "<think>" + "</think><answer>" * 60_000 + "</answer>",
    "numbers": answer("System 1 System 2 " + "1," * 500_000),
    "one number": answer("System 1 System 2 " + "1" * 1_000_000 + "x"),
    "one word": answer("System 1 System 2 " + "a" * 1_000_000),
    "nearly a copy": answer("System 1 System 2 fever neck " + "ab " * 300_000, "fever neck " + "ab " * 150_000 + "b"),
    "boxes in dx": answer("System 1 System 2 " + "\\boxed{" * 140_000),
    "ends": "<|im_end" * 120_000,
}


@pytest.mark.parametrize("mode", ["paper", "paper_code"])
@pytest.mark.parametrize("text", BIG.values(), ids=BIG.keys())
def test_a_megabyte_of_anything_takes_a_moment(text, mode):
    assert len(text) > 900_000
    begin = time.process_time()
    found = crpo_reward(text, "A", text[:20_000], mode=mode, report=dict.fromkeys(REPORTED, 0.0), options={"A": text})
    assert time.process_time() - begin < 5.0  # all take less than 1; what is not linear takes minutes
    assert found["total"] <= 12


def test_what_is_refused():
    for letter in ("b", "", "AB", "É", None, "Jane"):
        with pytest.raises(ValueError, match=r"answer is .*, must be the letter of an option, A to Z") as caught:
            terms("", letter)
        assert "Jane" not in str(caught.value)
    with pytest.raises(ValueError, match="mode must be 'paper' or 'paper_code', got 'code'"):
        terms("", mode="code")
    with pytest.raises(ValueError, match="the completion is a list, not a text: give decode="):
        terms([1, 2])
    with pytest.raises(ValueError, match="the question is a NoneType, not a text"):
        terms("", question=None)
    with pytest.raises(ValueError, match="report has 'quotes', which is no term: use citation, unsupported, coverage"):
        terms("", report={"quotes": 1.0})


def test_reported_terms_and_their_weights():
    options = {"A": "Septic arthritis", "B": "Meningitis"}
    found = terms(answer(), options=options, report={"coverage": 2.0, "unsupported": -1.0})
    assert list(found) == ["accuracy", "reasoning", "consistency", "coverage", "unsupported", "total"]
    assert found["coverage"] == 0.5
    assert found["total"] == 12.0 + 1.0
    assert terms("<dx>none", report={"citation": 1.0})["citation"] == 0.0


def test_evidence():
    case = "BP 120/80 mm Hg, pulse 110/min, 7 years, tall"
    assert numbers(case) == {("120", ""), ("80", "mmhg"), ("110", ""), ("7", "years")}
    assert numbers("x7 B12 7x 1,200 mg/dl 39.5°C 5 %") == {("1200", "mg/dl"), ("39.5", "°c"), ("5", "%"), ("7", "")}
    say = lambda dx, question=case: reported(dx, question, {})
    # of pulse, years, tall and the four numbers
    assert say("tall, of pulse 110")["citation"] == 3 / 7
    assert say("80 mg and 7 years")["citation"] == 2 / 7  # years is a word of its own
    assert say("80 and 7")["citation"] == 2 / 7
    assert say("120 mg")["citation"] == 1 / 7  # the question gives it no unit
    assert say("80, 81, 82 mg, 7")["unsupported"] == 0.5
    assert say("System 1: 80. System 2: none")["unsupported"] == 0.0
    assert say("no number at all") == {"citation": 0.0, "unsupported": 0.0, "coverage": 0.0}
    assert say("some", "")["citation"] == 0.0
    options = {"A": "Vitamin B12", "B": "Iron.", "C": "..."}
    assert reported("b12 is a VITAMIN", "", options)["coverage"] == pytest.approx(1 / 3)


def test_the_reward_of_an_example():
    example = {"question": QUESTION, "answer": "B", "options": {"A": "x", "B": "y"}}
    assert clinical.crpo(answer(), example) == terms(answer())
    assert clinical.crpo_code(think(r"a \boxed{B}"), example)["total"] == 12.0
    assert clinical.accuracy_alone(answer(), example) == terms(answer()) | {"total": 1.0}
    assert clinical.accuracy_alone(answer(box=""), example)["total"] == 0.0


VOTES = [
    (["A", "B", "B"], "B"),
    (["A", "B", "B", "A"], "A"),
    (["B", "A", "A", "B", "C"], "B"),
    ([None, None, "C"], "C"),
    ([None, None], None),
    ([], None),
]


@pytest.mark.parametrize(("letters", "wanted"), VOTES)
def test_the_majority(letters, wanted):
    assert majority_vote(letters) == wanted
    assert majority_vote(iter(letters)) == wanted


@given(st.lists(st.sampled_from(["A", "B", "C", None])))
def test_the_majority_by_counting(letters):
    votes = [letter for letter in letters if letter]
    wanted = None
    for letter in votes:  # the first of those with the most
        if wanted is None or votes.count(letter) > votes.count(wanted):
            wanted = letter
    assert majority_vote(letters) == wanted


def test_letters_are_counted():
    letters = [boxed_letter(text) for text in (r"\boxed{A}", r"\boxed{B}", "none", r"\boxed{ C }", r"\boxed{CD}")]
    assert boxed_letter(r"\boxed{b}") is boxed_letter(r"\boxed{}") is None
    assert letters == ["A", "B", None, "C", None]
    found = letter_accuracy(letters, ["A", "C", "A", "C", "D"])
    assert found == LetterAccuracy(correct=2, valid=3, total=5)
    assert (found.valid_ratio, found.of_all, found.of_valid) == (0.6, 0.4, 2 / 3)
    assert letter_accuracy([None], ["A"]).of_valid == 0.0
    for letters, answers in ((["A"], []), ([], [])):
        with pytest.raises(ValueError, match=r"\d letters for 0 answers: give as many, at least one"):
            letter_accuracy(letters, answers)


@pytest.mark.parametrize("module", ["text", "crpo", "evidence", "answers"])
def test_examples(module):
    found = doctest.testmod(importlib.import_module(f"rlalign.rewards.clinical.{module}"))
    assert found.attempted > 0
    assert found.failed == 0
