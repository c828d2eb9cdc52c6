"""Answers against reference answers, by a judge that compares two."""

from collections.abc import Sequence

import numpy as np

from rlalign.evaluation.estimates import WinRate, win_rate
from rlalign.rewards.pairwise import AT_ONCE, Compare, ask
from rlalign.types import Prompt


def judge_win_rate(
    compare: Compare,
    prompts: Sequence[str | Prompt],
    answers: Sequence[str],
    references: Sequence[str],
    *,
    swap: bool = True,
    at_once: int = AT_ONCE,
    level: float = 0.95,
) -> WinRate:
    """How often answers beat references to the same prompts, each pair asked in both positions.

    Pairwise comparison with swapped positions as in MT-Bench (Zheng et al. 2023, arXiv 2306.05685, section 3.4), the
    two outcomes averaged; see win_rate for what counts, and for the interval, which is over different prompts.

    Args:
      compare: a function, or endpoint_compare.
      prompts, answers, references: N each; a prompt may come again, with other answers.
      swap: False asks with the answer shown first alone.
      at_once: questions in flight.
      level: of the interval.

    Raises:
      ValueError: lengths that differ; no comparison with a verdict; an outcome outside [0, 1].
    """
    sizes = (len(prompts), len(answers), len(references))
    if len(set(sizes)) > 1:
        raise ValueError(f"{sizes[0]} prompts, {sizes[1]} answers, {sizes[2]} references: give one of each")
    texts = [prompt.text if isinstance(prompt, Prompt) else prompt for prompt in prompts]
    first = list(zip(texts, answers, references, strict=True))
    second = [(text, reference, answer) for text, answer, reference in first] if swap else []
    said = ask(compare, first + second, at_once=at_once)
    outcome = np.stack([said[: len(first)], 1.0 - said[len(first) :]], axis=1) if swap else said
    places: dict[str, int] = {}
    return win_rate(outcome, prompt=[places.setdefault(text, len(places)) for text in texts], level=level)
