"""A reward that workers load in milliseconds."""


def number_only(completion, example):
    """1 if right; raises where the completion is no number."""
    return float(int(completion) == int(example["answer"]))
