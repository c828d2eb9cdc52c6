"""Rewards: a plain function, run in worker processes that can be killed.

    reward(completion: str | list[int], example: dict) -> float

`score` applies it to a batch of rollouts. `RewardGuard` keeps the workers from one batch to the next.
"""

from rlalign.rewards.guard import RewardGuard, score

__all__ = ["RewardGuard", "score"]
