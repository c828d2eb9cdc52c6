"""Sums of two numbers below 100, in characters: the smallest problem on which a policy visibly learns.

    prompt "57+38="    right answer "590" (95, least significant digit first)    reward 1 if it is right, else 0

Numbers have a fixed width and answers begin with the digit that needs no carry, as is usual where small transformers
learn to add. A tenth of all 10,000 pairs is held out by a hash of the pair: no seed ever trains on an evaluation
problem.
"""

import functools
import zlib

import numpy as np

from rlalign.types import Prompt

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
    """All problems of "train" or "held-out", in a fixed order."""
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'train' or 'held-out', got {split!r}")
    found = []
    for number in range(LIMIT * LIMIT):
        a, b = divmod(number, LIMIT)
        if (zlib.crc32(f"{a}+{b}".encode()) % 10 == 0) == (split == "held-out"):
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
