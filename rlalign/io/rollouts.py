"""What the metrics say of one rollout batch: rewards, their terms, lengths, and how far the sampler is away."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np

from rlalign import hosts
from rlalign.advantages import term_spread
from rlalign.io.config import RunConfig
from rlalign.io.updates import RunAborted
from rlalign.train.batch import MAX_LOG_WEIGHT
from rlalign.types import Batch, Rewards, Rollouts, StopReason

log = logging.getLogger(__name__)


def terms_together(mine: Rewards, count: int) -> dict[str, np.ndarray] | None:
    """The terms of all samples; a process whose rewards are all invalid knows none of their names."""
    own = mine.terms or {}
    told = hosts.texts_together((json.dumps(list(own)) if own else "",), jax.process_count())
    names = json.loads(next((text for text in told if text), "[]"))
    none = np.full(len(mine.reward), np.nan)
    return {name: hosts.together(own.get(name, none), count) for name in names} or None


def check_rewards(rewards: Rewards, max_invalid_share: float) -> None:
    """Logs how many rewards of a step are invalid, and the first reason.

    Raises:
      RunAborted: a larger share of them than is allowed.
    """
    invalid = ~rewards.valid
    if not invalid.any():
        return
    first = next(reason for reason in rewards.reason if reason)
    log.warning("%d of %d rewards are invalid, the first: %s", invalid.sum(), invalid.size, first)
    if invalid.mean() > max_invalid_share:
        raise RunAborted(
            f"{invalid.sum()} of {invalid.size} rewards of a step are invalid, more than max_invalid_share="
            f"{max_invalid_share}; the first: {first}"
        )


def term_means(rewards: Rewards) -> dict[str, float]:
    """Of each term, over valid samples."""
    terms = rewards.terms or {}
    return {name: float(np.mean(value[rewards.valid])) for name, value in terms.items() if rewards.valid.any()}


def term_metrics(rewards: Rewards, group: np.ndarray, groups: int) -> dict[str, float]:
    """Each term's mean, and its spread within groups: what does not vary there teaches nothing, whatever its weight."""
    terms = rewards.terms or {}
    if not terms:
        return {}
    stacked = np.where(rewards.valid[:, None], np.stack(list(terms.values()), axis=1), 0.0).astype(np.float32)
    spread = term_spread(jnp.asarray(stacked), jnp.asarray(group), num_groups=groups, valid=jnp.asarray(rewards.valid))
    named = dict(zip(terms, np.asarray(spread).tolist(), strict=True))
    return {f"term_{name}": mean for name, mean in term_means(rewards).items()} | {
        f"term_{name}_spread": value for name, value in named.items()
    }


def rollout_metrics(config: RunConfig, prompts, rollouts: Rollouts, rewards: Rewards, batch: Batch) -> dict[str, float]:
    """What a person watches of one rollout batch; shares in [0, 1], lengths and counts in tokens.

    tokens_repeated counts every sample with its prompt, tokens_stored what the forest holds of them. With
    recompute_logp, how far the sampler is from the trainer: importance_error, the largest |pi_trainer / pi_sampler - 1|
    of a token, and sampler_kl, the mean of log pi_sampler - log pi_trainer.
    """
    valid, mask = rewards.valid, np.asarray(rollouts.mask)
    reward = np.where(valid, np.nan_to_num(rewards.reward), 0.0)
    length = mask.sum(axis=1)
    prompt_length = np.array([len(np.asarray(p)) for p in prompts])
    signal = np.zeros(len(prompts), bool)
    pulls = np.asarray(batch.advantage) != 0
    np.logical_or.at(signal, rollouts.prompt, pulls if pulls.ndim == 1 else pulls.any(axis=1))
    count = max(int(valid.sum()), 1)
    apart = {}
    if config.recompute_logp and (live := np.asarray(batch.packed.mask)).any():
        log_ratio = (np.asarray(batch.old_logp) - rollouts.behaviour_logp)[live].astype(np.float64)
        error = np.abs(np.expm1(np.clip(log_ratio, None, MAX_LOG_WEIGHT))).max()
        apart = {"importance_error": float(error), "sampler_kl": float(-log_ratio.mean())}
    return apart | {
        "reward": float(reward.sum() / count),
        "accuracy": float((valid & (reward >= config.success)).sum() / count),
        "invalid_rewards": int((~valid).sum()),
        "groups_without_signal": int((~signal).sum()),
        "response_length": float(length.mean()),
        "truncated_share": float(np.mean(rollouts.stop == StopReason.MAX_TOKENS)),
        "tokens_stored": int(np.sum(np.asarray(batch.packed.forest.visible_until) > 0)),
        "tokens_repeated": int(np.sum(prompt_length[rollouts.prompt] + length)),
    }
