"""Demonstrations and preferences whose quality is known: a verifier says which answers are right.

    prompts with example["answer"] ─▶ right answers, and wrong ones that the verifier refuses ─▶ demonstrations, pairs

How many are wrong, and in what way, is chosen; everything else follows from the seed and the prompt's id, so that sets
of different quality differ in nothing else, and what is wrong at one level is wrong at every higher one.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rlalign.types import Demonstration, Encoding, Preference, Prompt

SPLITS = ("train", "policy", "reward", "held-out")  # train is policy and reward together
TRIES = 100  # draws until a wrong answer is one
Score = Callable[[str, Any], float]  # (answer, example) -> 1.0 where it is right
WrongAnswer = Callable[[Prompt, np.random.Generator], str]


def in_split(key: str, split: str) -> bool:
    """Whether a problem belongs to a split, by a hash of its text: no seed moves it from one to another.

    A tenth is held out. Of the rest, "train", two tenths are for training reward models ("reward") and the others for
    the policy's prompts ("policy"), so that a reward model judges prompts that it has not seen.

    Raises:
      ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    tens, ones = divmod(zlib.crc32(key.encode()) % 100, 10)
    if ones == 0:
        return split == "held-out"
    return split in ("train", "reward" if tens < 2 else "policy")


def demonstrations(
    prompts: Iterable[Prompt],
    encode: Encoding,
    *,
    score: Score,
    wrong_answer: WrongAnswer,
    wrong: float = 0.0,
    seed: int = 0,
) -> tuple[Demonstration, ...]:
    """One answer to each prompt, each wrong with probability `wrong`.

    Args:
      prompts: whose example holds the right "answer".
      encode: how answers become tokens; `prompt.text` is what they answer.
      score: the verifier.
      wrong_answer: (prompt, random generator) -> an answer that is meant to be wrong; drawn again where it is not.
      wrong: share in [0, 1].
      seed: >= 0.
    Raises:
      ValueError: a share out of range; an answer that the verifier does not call right; no wrong one in TRIES draws.
    """
    _check_share("wrong", wrong)
    made = []
    for prompt in prompts:
        right, other, u = _answers(prompt, score, wrong_answer, seed)
        made.append(Demonstration(prompt, encode.response(prompt.text, other if u < wrong else right)))
    return tuple(made)


def preferences(
    prompts: Iterable[Prompt],
    encode: Encoding,
    *,
    score: Score,
    wrong_answer: WrongAnswer,
    flipped: float = 0.0,
    seed: int = 0,
) -> tuple[Preference, ...]:
    """One pair of a right and a wrong answer to each prompt, each labelled the other way with probability `flipped`.

    Args:
      flipped: share in [0, 1]; at 0.5 the labels say nothing.
      prompts, encode, score, wrong_answer, seed: as for demonstrations.
    Raises:
      ValueError: as demonstrations.
    """
    _check_share("flipped", flipped)
    made = []
    for prompt in prompts:
        *answers, u = _answers(prompt, score, wrong_answer, seed)
        right, other = (encode.response(prompt.text, answer) for answer in answers)
        made.append(Preference(prompt, *((other, right) if u < flipped else (right, other))))
    return tuple(made)


def slip(text: str, rng: np.random.Generator) -> str:
    """The text with one of its digits replaced by another, or one of its letters where it has no digit.

    Raises:
      ValueError: neither in it.
    """
    for alphabet in ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        places = [i for i, letter in enumerate(text) if letter in alphabet]
        if places:
            at = places[rng.integers(len(places))]
            turn = alphabet.index(text[at]) + int(rng.integers(1, len(alphabet)))
            return text[:at] + alphabet[turn % len(alphabet)] + text[at + 1 :]
    raise ValueError(f"{text!r:.40} has neither digit nor letter that could slip; use answers of other problems")


def _answers(prompt: Prompt, score: Score, wrong_answer: WrongAnswer, seed: int) -> tuple[str, str, float]:
    """(right, wrong, u in [0, 1)) of a prompt; u is drawn first, so that no choice of wrong answers moves it."""
    rng = np.random.default_rng((seed, prompt.id))
    right, u = prompt.example["answer"], rng.random()
    if score(right, prompt.example) != 1:
        raise ValueError(f"prompt {prompt.id}: the verifier does not call its own answer {right!r:.40} right")
    for _ in range(TRIES):
        other = wrong_answer(prompt, rng)
        if score(other, prompt.example) < 1:
            return right, other, u
    raise ValueError(
        f"prompt {prompt.id}: {TRIES} answers in a row that should be wrong are right, the last {other!r:.40}; "
        "choose another kind of wrong answers"
    )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, must lie in [0, 1]")
