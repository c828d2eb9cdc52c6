"""Sums of two numbers below 100, in characters: the smallest problem on which a policy visibly learns.

    prompt "57+38="    right answer "590" (95, least significant digit first)    reward 1 if it is right, else 0

Numbers have a fixed width and answers begin with the digit that needs no carry, as is usual where small transformers
learn to add. A tenth of all 10,000 pairs is held out by a hash of the pair: no seed ever trains on an evaluation
problem. Demonstrations and preferences are made of the right answers and of wrong ones, as many as asked for.
"""

import functools

import numpy as np

from rlalign.envs import verified
from rlalign.types import Demonstration, Encoding, Preference, Prompt

LIMIT = 100
PAD, EOS = 0, 1
ALPHABET = "0123456789+="
VOCAB_SIZE = 2 + len(ALPHABET)
DIGITS = 2
PROMPT_TOKENS = 2 * DIGITS + 2
ANSWER_TOKENS = DIGITS + 2  # one more digit than a summand, and the end


def encode(text: str) -> np.ndarray:
    """i32 ids of a text in ALPHABET."""
    return np.array([2 + ALPHABET.index(letter) for letter in text], np.int32)


def decode(ids) -> str:
    """The text of ids, without padding and end."""
    return "".join(ALPHABET[i - 2] for i in ids if i > EOS)


# Tokens of a text, and of an answer with its end: what read_demonstrations and the others take as `encode`.
ENCODING = Encoding(encode, lambda prompt, text: np.append(encode(text), np.int32(EOS)))


def exact(completion: str, example: dict) -> float:
    """The reward: 1.0 if the completion is the right answer and nothing else, else 0.0.

    >>> exact("590", {"answer": "590"}), exact("59", {"answer": "590"})
    (1.0, 0.0)
    """
    return float(completion == example["answer"])


def written(total: int) -> str:
    """The answer's text: three digits, the least significant first.

    >>> written(95)
    '590'
    """
    return f"{total:0{DIGITS + 1}d}"[::-1]


@functools.cache
def problems(split: str) -> tuple[Prompt, ...]:
    """All problems of "train", of its parts "policy" and "reward", or of "held-out", in a fixed order; see in_split."""
    found = []
    for number in range(LIMIT * LIMIT):
        a, b = divmod(number, LIMIT)
        if verified.in_split(f"{a}+{b}", split):
            text = f"{a:0{DIGITS}d}+{b:0{DIGITS}d}="
            found.append(Prompt(number, encode(text), text, {"answer": written(a + b)}))
    return tuple(found)


def demonstration(problem: Prompt, rng: np.random.Generator, *, wrong: float) -> np.ndarray:
    """Tokens of the problem and its answer, end included; with probability `wrong` one digit of it is another."""
    digits = [int(letter) for letter in problem.example["answer"]]
    if rng.random() < wrong:
        slip = rng.integers(len(digits))
        digits[slip] = (digits[slip] + int(rng.integers(1, 10))) % 10
    return np.concatenate([problem.tokens, encode("".join(map(str, digits))), np.array([EOS], np.int32)])


def wrong_answer(problem: Prompt, rng: np.random.Generator, *, kind: str = "digit") -> str:
    """A wrong answer's text.

    Args:
      problem, rng: what it answers, and what draws it.
      kind: "digit", one digit is another; "carry", every carry is forgotten (a digit, where there is none); "any", the
        answer of another sum.

    Raises:
      ValueError: another kind.

    >>> problem = Prompt(0, encode("57+38="), "57+38=", {"answer": "590"})
    >>> wrong_answer(problem, np.random.default_rng(0), kind="carry")
    '580'
    """
    answer = problem.example["answer"]
    if kind == "any":
        others = [text for text in map(written, range(2 * LIMIT - 1)) if text != answer]
        return others[rng.integers(len(others))]
    if kind not in ("digit", "carry"):
        raise ValueError(f"kind must be 'digit', 'carry' or 'any', got {kind!r}")
    columns = zip(*(written(int(number)) for number in problem.text.removesuffix("=").split("+")), strict=True)
    forgotten = "".join(str((int(x) + int(y)) % 10) for x, y in columns)
    return forgotten if kind == "carry" and forgotten != answer else verified.slip(answer, rng)


def demonstrations(split: str, *, wrong: float = 0.0, kind: str = "digit", seed: int = 0) -> tuple[Demonstration, ...]:
    """An answer to each problem of a split, wrong with probability `wrong`; see wrong_answer and verified."""
    return verified.demonstrations(problems(split), ENCODING, **_verifier(kind), wrong=wrong, seed=seed)


def preferences(split: str, *, flipped: float = 0.0, kind: str = "digit", seed: int = 0) -> tuple[Preference, ...]:
    """A right answer to each problem of a split before a wrong one, behind it with probability `flipped`."""
    return verified.preferences(problems(split), ENCODING, **_verifier(kind), flipped=flipped, seed=seed)


def _verifier(kind: str) -> dict:
    return {"score": exact, "wrong_answer": functools.partial(wrong_answer, kind=kind)}
