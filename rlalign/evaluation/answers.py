"""How many prompts a policy answers right: accuracy and pass@k of sampled answers."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from rlalign.evaluation.estimates import Estimate, pass_at_k, share
from rlalign.models.decoder import Decoder
from rlalign.rewards import RewardGuard, score
from rlalign.rollout import SampleConfig, sample
from rlalign.rollout.sampler import own_ids
from rlalign.types import Params, Prompt, Rollouts, StopReason


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerScores:
    """What `evaluate_answers` found; intervals are over prompts.

    Attributes:
      accuracy: the share of answers that are right: pass@1.
      pass_at: k -> pass@k.
      reward: mean of the valid rewards; NaN where none is.
      truncated: share of answers that met max_new_tokens.
      correct, total: i64[P], right answers and answers of each prompt.
      invalid: answers without a reward; they count as wrong.
      reasons: why, each different reason once.
    """

    accuracy: Estimate
    pass_at: dict[int, Estimate]
    reward: float
    truncated: float
    correct: np.ndarray
    total: np.ndarray
    invalid: int
    reasons: tuple[str, ...]


def evaluate_answers(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Prompt],
    reward: RewardGuard | Callable[[str, dict], float],
    *,
    config: SampleConfig,
    ks: Sequence[int] = (1,),
    seed: int = 0,
    decode: Callable[[list[int]], str] | None = None,
    success: float = 1.0,
    at_once: int = 64,
    workers: int = 2,
    time_limit: float = 10.0,
    level: float = 0.95,
    sampler: Callable[..., Rollouts] = sample,
    mesh: Mesh | None = None,
) -> AnswerScores:
    """Sample config.num_samples answers to each prompt, and count those that are right.

    Keys fold each prompt's id, so the answers do not depend on at_once or on the other prompts. Programs and other
    completions are only ever run in reward workers.

    Args:
      decoder, params: the policy.
      prompts: each a problem of its own.
      reward: a RewardGuard, or a top-level function for which workers are started.
      config: how to sample; num_samples is n of pass@k.
      ks: each at most num_samples.
      seed: of the samples.
      decode: token ids -> text; None: the guard's own, or the reward gets the ids.
      success: a reward from here on is right.
      at_once: prompts sampled together.
      workers, time_limit: of the workers of a plain function.
      level: of the intervals.
      sampler: called as `sample` is, such as engine_sampler.
      mesh: where the parameters lie; each of several processes computes all rewards.

    Raises:
      ValueError: no prompts, a k outside [1, num_samples], at_once < 1, what `sample` or RewardGuard refuse.
    """
    bad = [k for k in ks if not 1 <= k <= config.num_samples]
    if not len(prompts) or bad or at_once < 1:
        raise ValueError(
            f"{len(prompts)} prompts, ks={tuple(ks)} of num_samples={config.num_samples}, at_once={at_once}: give at "
            "least one prompt, every k in [1, num_samples], and at_once >= 1"
        )
    ids, found = own_ids(prompts), []
    with contextlib.ExitStack() as stack:
        if not isinstance(reward, RewardGuard):
            reward = stack.enter_context(RewardGuard(reward, workers=workers, time_limit=time_limit))
        for begin in range(0, len(prompts), at_once):
            some = slice(begin, begin + at_once)
            how = {"seed": seed, "step": 0, "config": config, "prompt_ids": ids[some], "mesh": mesh}
            rollouts = sampler(decoder, params, prompts[some], **how)
            found.append((score(reward, prompts[some], rollouts, decode=decode), rollouts.stop))
    value, valid = (np.concatenate([getattr(rewards, name) for rewards, _ in found]) for name in ("reward", "valid"))
    right = valid & (np.nan_to_num(value) >= success)
    correct = right.reshape(len(prompts), config.num_samples).sum(axis=1)
    total = np.full(len(prompts), config.num_samples)
    return AnswerScores(
        accuracy=share(correct / total, level),
        pass_at={int(k): share(pass_at_k(correct, total, k), level) for k in ks},
        reward=float(value[valid].mean()) if valid.any() else float("nan"),
        truncated=float(np.mean(np.concatenate([stop for _, stop in found]) == StopReason.MAX_TOKENS)),
        correct=correct,
        total=total,
        invalid=int((~valid).sum()),
        reasons=tuple(sorted({reason for rewards, _ in found for reason in rewards.reason if reason})),
    )
