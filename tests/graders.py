"""Rewards of the tests' small runs. Each reward worker loads this module, so it imports nothing."""


def share_right(completion: str, example: dict) -> float:
    """Which digits are right: a reward with signal from the first step on."""
    return sum(a == b for a, b in zip(completion.ljust(3), example["answer"], strict=False)) / 3


def share_right_but_for_9(completion: str, example: dict) -> dict[str, float]:
    """The same as a term and its total, with none where the first digit is 9."""
    if completion.startswith("9"):
        raise ValueError("a reward that fails")
    share = share_right(completion, example)
    return {"share": share, "total": share}
