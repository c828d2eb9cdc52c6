"""TRL's and verl's readings, for comparisons: their ddof, eps, clip, aggregation and importance correction.

docs/parity.md has what was measured against TRL, and every known difference.
"""

import functools

from rlalign.advantages import group_relative
from rlalign.algorithms.algorithm import About, Algorithm
from rlalign.algorithms.registry import PPO, episode_and_step
from rlalign.losses import importance_weight, policy_gradient

BY_STD = functools.partial(group_relative, scale="std", ddof=1, eps=1e-4)
DUAL = functools.partial(PPO, dual_clip=3.0)
SEQUENCE_MASK = functools.partial(importance_weight, level="sequence", beyond="mask", cap=3.0)


def like(library: str, formula: str, trap: str) -> About:
    """The row of an entry that follows `library`."""
    return About(formula, library, "numbers that are to equal that library's", "as the paper's entry", trap)


TRL, VERL = "TRL 1.16.0", "verl, core_algos.py"

PARITY: dict[str, Algorithm] = {
    "grpo_trl": Algorithm(
        advantage=BY_STD,
        loss=PPO,
        aggregate="sequence",
        correction=SEQUENCE_MASK,
        about=like(TRL, "grpo with eps 1e-4", "TRL counts rows without a token; a KL there is times the ratio"),
    ),
    "bnpo_trl": Algorithm(
        advantage=BY_STD,
        loss=PPO,
        aggregate="token",
        correction=SEQUENCE_MASK,
        about=like(TRL, "grpo over all tokens, eps 1e-4", "TRL takes it over each micro-batch"),
    ),
    "dapo_trl": Algorithm(
        advantage=BY_STD,
        loss=PPO,
        aggregate="token",
        correction=SEQUENCE_MASK,
        about=like(TRL, "its default loss: over all tokens, eps 1e-4, clip .2", "no asymmetric clip unless asked for"),
    ),
    "dr_grpo_trl": Algorithm(
        advantage=functools.partial(group_relative, scale="none"),
        loss=PPO,
        aggregate="constant",
        correction=SEQUENCE_MASK,
        about=like(TRL, "dr_grpo", "set max_length to its max_completion_length"),
    ),
    "cispo_trl": Algorithm(
        advantage=BY_STD,
        loss=functools.partial(policy_gradient, clip="cispo", clip_low=1.0, clip_high=4.0),
        aggregate="token",
        correction=SEQUENCE_MASK,
        about=like(TRL, "cispo with epsilon_high 5, eps 1e-4", "its epsilon_high is the cap itself, not one above 1"),
    ),
    "gspo_trl": Algorithm(
        advantage=BY_STD,
        loss=functools.partial(policy_gradient, clip="ppo", clip_low=3e-4, clip_high=4e-4, ratio="sequence"),
        aggregate="sequence",
        correction=SEQUENCE_MASK,
        about=like(TRL, "gspo with eps 1e-4", "its importance_sampling_level='sequence'"),
    ),
    "grpo_verl": Algorithm(
        advantage=functools.partial(group_relative, scale="std", ddof=1, eps=1e-6),
        loss=DUAL,
        aggregate="token",
        correction=None,
        about=like(VERL, "grpo over all tokens, dual clip 3", "a group of one keeps its reward there, here 0"),
    ),
    "gigpo_verl_agent": Algorithm(
        advantage=functools.partial(episode_and_step, episode_stat="step", scale="std", gamma=0.95, step_weight=1.0),
        loss=DUAL,
        needs=("trajectory", "step", "anchor"),
        optional=("penalty",),
        aggregate="token",
        kl_coef=0.01,
        entropy_coef=0.001,
        correction=None,
        about=like("verl-agent, core_gigpo.py", "gigpo with statistics over rows", "its k3 is cut at 10"),
    ),
}
