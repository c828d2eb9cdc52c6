"""CRPO's reward of an answer to a clinical multiple-choice question (arXiv 2512.00601)."""

import re
from collections.abc import Mapping
from typing import Literal

from rlalign.rewards.clinical.evidence import REPORTED, reported
from rlalign.rewards.clinical.text import (
    BOX,
    BOX_IN_A_LINE,
    LETTERS,
    boxed_letter,
    effective_share,
    has_both_systems,
    inside_box,
    refers_back,
    sections,
)

ANSWER_TAG = re.compile(r"</think>\s*+<answer>")
END = "<|im_end|>"


def crpo_reward(
    completion: str,
    answer: str,
    question: str,
    *,
    mode: Literal["paper", "paper_code"] = "paper",
    k: float = 10.0,
    eos: str = END,
    options: Mapping[str, str] | None = None,
    report: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The reward of one answer, and its terms.

        r = k r_acc + r_CR + 0.5 r_cons                                               CRPO, arXiv 2512.00601, eq. 4

    The paper leaves the tests of its terms open. Mode "paper", where each rule that it lacks is our choice:
    r_acc is 1 if the text's only box, anywhere, holds the right letter, else 0. r_CR is 1 if
    <dx>...</dx><conclusion>...</conclusion> holds and dx has a System 1 and behind it a System 2, 1.5 if the conclusion
    also refers back to dx (refers_back), else 0. r_cons is effective_share.

    Mode "paper_code" is the released code's reward (BoyangGu1/Clinical-R1-3B), which is older than the paper: of the
    text up to `eos`, trimmed. r_acc is -n for n >= 2 boxes, 0 for none, -1 for one without braces closed on its line,
    -0.5 for one that holds no letter, else 1 or 0. r_CR is 1 for <think>...</think><answer>...</answer> as all of the
    text, 1.5 if the answer holds one complete box and something else.

    Args:
      completion: anything; no text raises, and time is linear in its length.
      answer: the right option's letter, A to Z.
      question: what was asked; an empty one drops the question's part of refers_back.
      mode: whose rules.
      k: weight of r_acc.
      eos: where "paper_code" cuts the text; empty for nowhere.
      options: letter -> text, for the term "coverage".
      report: further terms and their weights in the total, of REPORTED (see evidence.reported): {"citation": 0.0}
        reports alone. None for none.

    Returns:
      {"accuracy", "reasoning", "consistency", "total"}, the terms unscaled, and those of `report` before the total. In
      mode "paper" terms are never negative and without `report` the total is at most k + 2 = 12.

    Raises:
      ValueError: an answer that is no letter, an unknown mode or term; a completion or question that is no text.

    >>> text = "<dx>System 1: fever, rash. System 2: a rash with fever is measles.</dx>" + (
    ...        "<conclusion>Fever, then rash: measles</conclusion> \\\\boxed{B}")
    >>> crpo_reward(text, "B", "A child with fever and a rash")
    {'accuracy': 1.0, 'reasoning': 1.5, 'consistency': 1.0, 'total': 12.0}
    """
    if answer not in LETTERS:
        raise ValueError("answer is no capital letter, must be the letter of an option, A to Z")  # it may be a row's
    for name, text in (("completion", completion), ("question", question)):
        if not isinstance(text, str):
            raise ValueError(f"the {name} is a {type(text).__name__}, not a text: give decode=")
    if mode == "paper":
        found, dx = _by_paper(completion, answer, question)
    elif mode == "paper_code":
        found, dx = _by_code(completion, answer, eos)
    else:
        raise ValueError(f"mode must be 'paper' or 'paper_code', got {mode!r}")
    total = k * found["accuracy"] + found["reasoning"] + 0.5 * found["consistency"]
    if report:
        unknown = sorted(set(report) - set(REPORTED))
        if unknown:
            raise ValueError(f"report has {unknown[0]!r}, which is no term: use {', '.join(REPORTED)}")
        extra = reported(dx, question, options or {})
        found |= {name: extra[name] for name in report}
        total += sum(weight * extra[name] for name, weight in report.items())
    return found | {"total": total}


def _by_paper(text: str, answer: str, question: str) -> tuple[dict[str, float], str]:
    """The three terms, and the reasoning."""
    found = sections(text)
    reasoning = 0.0
    if found is not None and has_both_systems(found.dx):
        reasoning = 1.5 if refers_back(found.dx, found.conclusion, question) else 1.0
    accuracy = float(boxed_letter(text) == answer)
    terms = {"accuracy": accuracy, "reasoning": reasoning, "consistency": effective_share(text)}
    return terms, found.dx if found else ""


def _by_code(text: str, answer: str, eos: str) -> tuple[dict[str, float], str]:
    text = (text.partition(eos)[0] if eos else text).strip()
    text = text.replace("<\\think>", "</think>").replace("<\\answer>", "</answer>")
    thought, said = _think_and_answer(text)
    reasoning = 0.0 if said is None else 1.5 if _box_and_more(said) else 1.0
    accuracy = _accuracy_by_code(text, answer)
    return {"accuracy": accuracy, "reasoning": reasoning, "consistency": effective_share(text)}, thought


def _accuracy_by_code(text: str, answer: str) -> float:
    boxes = text.count(BOX)
    if boxes != 1:
        return -float(boxes) if boxes else 0.0
    inside = inside_box(text, line=True)
    if inside is None:
        return -1.0
    return float(inside == answer) if inside in LETTERS else -0.5


def _think_and_answer(text: str) -> tuple[str, str | None]:
    """What the tags hold; no answer where they are not all of the text."""
    begin, end = "<think>", "</answer>"
    found = ANSWER_TAG.search(text, len(begin))
    if not (text.startswith(begin) and text.endswith(end) and found):
        return "", None
    return text[len(begin) : found.start()], text[found.end() : -len(end)]


def _box_and_more(said: str) -> bool:
    """Whether there is exactly one complete box, and it is not all."""
    said = said.strip()
    boxes = [found[0] for found in BOX_IN_A_LINE.finditer(said) if found[1]]
    return len(boxes) == 1 and boxes[0] != said


def crpo(completion: str, example: Mapping) -> dict[str, float]:
    """crpo_reward for `fit` and RewardGuard; the example holds "answer", a letter, and "question"."""
    return crpo_reward(completion, example["answer"], example["question"])


def crpo_code(completion: str, example: Mapping) -> dict[str, float]:
    """The same in mode "paper_code"."""
    return crpo_reward(completion, example["answer"], example["question"], mode="paper_code")


def accuracy_alone(completion: str, example: Mapping) -> dict[str, float]:
    """Of the terms of crpo the accuracy is the reward, 1.0 or 0.0; the others are for the curves: GRPO beside CRPO."""
    found = crpo(completion, example)
    return found | {"total": found["accuracy"]}
