"""Reward functions of test_loop, in a module that a worker process loads at once."""

import math
import time


def even(completion, example):
    """Half of what a random policy writes is right."""
    return float(len(completion) % 2 == 0)


def by_terms(completion, example):
    """Two terms and their sum."""
    found = {"even": float(len(completion) % 2 == 0), "first": float(completion[:1] == example["answer"][0])}
    return found | {"total": 10 * found["even"] + found["first"]}


def raises(completion, example):
    raise RuntimeError("no grader today")


def sometimes(completion, example):
    """Raises, hangs, is not a number, or is fine."""
    kind = len(completion) + sum(map(ord, completion))
    if kind % 40 == 1:
        time.sleep(60)
    if kind % 10 == 2:
        raise ValueError("bad completion")
    return math.nan if kind % 10 == 3 else float(kind % 2)
