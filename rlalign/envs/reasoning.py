"""Reasoning Gym's tasks: prompts that its scorers reward, demonstrations and preferences that they verified.

    prompts = reasoning_prompts("chain_sum", "policy", 1000, chat_encoding(tokenizer))
    fit(..., prompts=prompts, reward=reasoning_score, decode=tokenizer.decode)

A problem belongs to a split by a hash of its question: splits share none, whatever their sizes and seeds.
Needs `pip install rlalign[reasoning]`.
"""

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlalign.envs.verified import WrongAnswer, demonstrations, in_split, preferences, slip
from rlalign.types import Demonstration, Encoding, Preference, Prompt

try:
    # At once, as it takes seconds: a reward worker loads this module before the clock of its first reward starts.
    reasoning_gym: Any = importlib.import_module("reasoning_gym")
except ImportError as error:
    raise ImportError("rlalign.envs.reasoning needs reasoning-gym: pip install rlalign[reasoning]") from error

SIZE = 1_000_000  # what a task is told to hold, as some tasks' problems depend on it; the few that mind take "size"
LOOKED_AT = 100  # problems a prompt, until there are too few of a split


def reasoning_prompts(
    task: str, split: str, count: int, encode: Encoding, *, seed: int = 0, config: Mapping[str, Any] | None = None
) -> tuple[Prompt, ...]:
    """The first problems of a task that belong to a split, no question twice.

    Args:
      task: its name in Reasoning Gym, such as "chain_sum".
      split: "policy", "reward" (both of them: "train") or "held-out"; see in_split.
      count: how many; a larger count begins with the same ones.
      encode: the questions' tokens.
      seed: of the task.
      config: settings of the task, such as {"max_terms": 3}; JSON values. "size" for the tasks, such as acre, that make
        all their problems at once.
    Returns:
      Prompts; `id` is the problem's index in the task, `example` what reasoning_score needs.
    Raises:
      ValueError: an unknown task, setting or split; a task whose problems do not follow from its seed, do not survive
        as JSON, or name no answer that scores 1; fewer problems than `count`.
    """
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    settings = dict(config or {})
    dataset = _dataset(task, json.dumps(settings | {"seed": seed}, sort_keys=True))
    found: dict[str, Prompt] = {}
    for index in range(min(dataset.size, LOOKED_AT * count)):
        entry = dataset[index]
        question = entry["question"]
        if question in found or not in_split(question, split):
            continue
        if dataset[index]["question"] != question:  # some tasks draw from a state that is not theirs
            raise ValueError(f"task {task!r} gives another problem each time: no run could be continued; use another")
        example = _example(task, settings, entry)
        found[question] = Prompt(index, encode.prompt(question), question, example)
        if len(found) == count:
            return tuple(found.values())
    raise ValueError(f"task {task!r} has {len(found)} questions for {split!r}, not {count}: lower it, or widen config")


def reasoning_score(completion: str, example: dict[str, Any]) -> float:
    """The reward: what the task's own scorer gives, 1.0 for a right answer, for many tasks a part of it for others.

    Scored is what stands between the last <answer> and </answer>; without them the whole completion, stripped.
    """
    answer = reasoning_gym.utils.extract_answer(completion)
    answer = completion.strip() if answer is None else answer
    dataset = _dataset(example["task"], json.dumps(example["config"], sort_keys=True))
    return float(dataset.score_answer(answer, example))


def reasoning_demonstrations(
    prompts: Sequence[Prompt],
    encode: Encoding,
    *,
    wrong: float = 0.0,
    kind: Literal["slip", "other"] = "slip",
    seed: int = 0,
) -> tuple[Demonstration, ...]:
    """The right answer to each prompt, or, with probability `wrong`, one that the task's scorer gives less than 1.

    Args:
      prompts: of reasoning_prompts.
      encode: the answers' tokens.
      wrong: share in [0, 1].
      kind: "slip" changes a digit or a letter of the right answer; "other" takes the answer of another prompt.
      seed: >= 0.
    Raises:
      ValueError: a share out of range, an unknown kind, a prompt for which no answer of that kind is wrong.
    """
    score, wrong_answer = reasoning_score, _wrong_answer(prompts, kind)
    return demonstrations(prompts, encode, score=score, wrong_answer=wrong_answer, wrong=wrong, seed=seed)


def reasoning_preferences(
    prompts: Sequence[Prompt],
    encode: Encoding,
    *,
    flipped: float = 0.0,
    kind: Literal["slip", "other"] = "slip",
    seed: int = 0,
) -> tuple[Preference, ...]:
    """The right answer to each prompt before a wrong one, or, with probability `flipped`, behind it.

    Args and errors as reasoning_demonstrations.
    """
    score, wrong_answer = reasoning_score, _wrong_answer(prompts, kind)
    return preferences(prompts, encode, score=score, wrong_answer=wrong_answer, flipped=flipped, seed=seed)


@functools.lru_cache(maxsize=64)
def _dataset(task: str, config: str) -> Any:
    if task not in reasoning_gym.factory.DATASETS:
        known = ", ".join(sorted(reasoning_gym.factory.DATASETS))
        raise ValueError(f"Reasoning Gym has no task {task!r}: one of {known}")
    try:
        return reasoning_gym.create_dataset(task, **{"size": SIZE} | json.loads(config))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"task {task!r} refuses the settings {config}: {error}") from error


def _example(task: str, settings: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a problem, in JSON values, as a reward worker gets it; with an answer that is right."""
    try:
        example = json.loads(json.dumps({"task": task, "config": settings, **entry}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {task!r} has problems that JSON does not hold ({error}); use another") from error
    score = reasoning_score(example["answer"], example) if isinstance(example["answer"], str) else None
    if score != 1:
        named = f"{example['answer']!r:.40}: {score}"
        raise ValueError(f"task {task!r} names no answer that scores 1 ({named}); use another")
    return example


def _wrong_answer(prompts: Sequence[Prompt], kind: str) -> WrongAnswer:
    if kind == "slip":
        return lambda prompt, rng: slip(prompt.example["answer"], rng)
    if kind == "other":
        answers = [prompt.example["answer"] for prompt in prompts]
        return lambda prompt, rng: answers[rng.integers(len(answers))]
    raise ValueError(f"kind must be 'slip' or 'other', got {kind!r}")
