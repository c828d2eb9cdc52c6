"""Algorithms of agents that differ in their advantages alone, for experiments that compare them."""

import dataclasses
import functools
from typing import Literal

import rlalign as ra
from rlalign.envs.rows import of_steps

Name = Literal["gigpo", "grpo", "rloo", "hgpo"]
SCALED = ("gigpo", "grpo")  # whose advantages know a scale


def objective(name: Name, *, scale: Literal["std", "none"], kl_coef: float | None = None) -> ra.Algorithm:
    """The advantage of an algorithm with GiGPO's loss: its clipping, aggregation, entropy bonus and KL.

    GRPO's own entry means over answers where GiGPO's means over tokens, and has no dual clip and no entropy bonus; only
    with one loss do both say what the advantage does.

    Args:
      name: of ALGORITHMS.
      scale: of the advantages, where they know one: "std", or "none".
      kl_coef: None for GiGPO's.

    Raises:
      ValueError: another scale than "std" for advantages that have no choice.
    """
    if name not in SCALED and scale != "std":
        raise ValueError(f"scale={scale!r}: the advantages of {name} have no scale to choose; leave it at 'std'")
    entry, loss = ra.ALGORITHMS[name], ra.ALGORITHMS["gigpo"]
    assert entry.advantage is not None
    if name in SCALED:
        entry = dataclasses.replace(entry, advantage=functools.partial(entry.advantage, scale=scale))
    steps = of_steps(entry)
    changes = {field: getattr(steps, field) for field in ("advantage", "needs", "optional", "grouped")}
    return dataclasses.replace(loss, **changes, kl_coef=loss.kl_coef if kl_coef is None else kl_coef)
