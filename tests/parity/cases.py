"""Which settings of TRL equal which of ours, and the random batches that both are given.

GRPO's cases hold an Algorithm as it would stand in ALGORITHMS; the others hold a loss.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np

from rlalign import advantages, losses
from rlalign.advantages import group_relative
from rlalign.algorithms import ALGORITHMS, Algorithm
from rlalign.losses import policy_gradient
from tests.parity import trl_side

BATCHES = 20  # of each case
GROUPS, GENERATIONS, LENGTH = 3, 4, 7
ROWS = GROUPS * GENERATIONS
MAX_LENGTH = 9  # TRL's max_completion_length: longer than any response here
CAP = 3.0  # TRL's default bound of the importance ratio


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
      settings: of TRL's configuration class; what is not named keeps TRL's default.
      ours: what equals it: an Algorithm, or batch, logp -> loss.
      text: how `ours` stands in the table; made from the Algorithm if empty.
      theirs: of trl_side, (settings, batch) -> (advantage or None, loss, gradient).
      batch: generator, distance -> dict of arrays; `distance` is how far the policy is from the one that sampled.
      importance: for Algorithms: how importance_weight is called on (old_logp, behaviour_logp, mask).
      kl_ratio: for Algorithms: the KL of each token is multiplied by this ratio of the policy to the old one.
    """

    settings: dict
    ours: Algorithm | Callable
    text: str = ""
    theirs: Callable = trl_side.grpo
    batch: Callable = lambda rng, distance: rollouts(rng, distance)
    importance: dict | None = None
    kl_ratio: str | None = None


def log_probs(rng, *shape):
    return -np.abs(rng.normal(1.0, 0.7, shape))


def rollouts(rng, distance, truncated=0.0, scored=1.0, terms=1):
    """Responses of random length with a tool's tokens inside; some cut off (they lose all tokens), some not scored."""
    length = rng.integers(1, LENGTH + 1, ROWS)
    length[0] = LENGTH
    own = rng.random((ROWS, LENGTH)) < 0.8  # the policy's tokens; the others are a tool's
    own[np.arange(ROWS), length - 1] = True
    lost = rng.random(ROWS) < truncated
    valid = rng.random(ROWS) < scored
    reward = np.where(valid[:, None], rng.integers(0, 5, (ROWS, terms)) / 4, np.nan)
    old_logp = log_probs(rng, ROWS, LENGTH)
    return {
        "length": length,
        "own": own,
        "truncated": lost,
        "mask": own & (np.arange(LENGTH) < length[:, None]) & ~lost[:, None],
        "reward": reward,
        "valid": valid,
        "group": np.repeat(np.arange(GROUPS), GENERATIONS),
        "old_logp": old_logp,
        "logp": old_logp + rng.normal(0, distance, (ROWS, LENGTH)),
        "ref_logp": old_logp + rng.normal(0, 0.3, (ROWS, LENGTH)),
        "behaviour_logp": old_logp + rng.normal(0, 0.6, (ROWS, LENGTH)),
    }


def responses(rng, distance, rows=8):
    """Rows for the losses of pairs (the first half chosen, the second rejected) and of KTO."""
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (rows, 1))
    logp, other = log_probs(rng, rows, LENGTH), log_probs(rng, rows, LENGTH)
    return {
        "mask": mask,
        "logp": logp,
        "ref_logp": logp + rng.normal(0, distance, logp.shape),
        "desirable": rng.random(rows) < 0.6,
        "kl_mask": np.roll(mask, 1, axis=0),
        "kl_logp": other,
        "kl_ref_logp": other + rng.normal(0, distance, logp.shape) - 0.1 * distance,
    }


unscored = partial(rollouts, scored=0.8)
wounded = partial(unscored, truncated=0.3)


def batch_scaled(reward, group, *, num_groups, valid):
    """TRL's scale_rewards="batch": the group's mean, the whole batch's deviation."""
    reward = jnp.where(valid, reward, 0)
    away = group_relative(reward, group, num_groups=num_groups, valid=valid, scale="none")
    return away / (jnp.std(reward, where=valid, ddof=1) + 1e-4)


def normalize_then_sum(terms, group, *, num_groups, valid):
    """TRL's multi_objective_aggregation of that name whitens the sum over the batch once more."""
    total = advantages.per_objective(
        terms[:, 0], group, terms=terms, term_weight=(1.0, 0.5), num_groups=num_groups, valid=valid, ddof=1, eps=1e-4
    )
    whole = {"where": valid}
    return jnp.where(valid, (total - jnp.mean(total, **whole)) / (jnp.std(total, ddof=1, **whole) + 1e-4), 0)


def pairs(loss):
    """A loss of two log-ratios, as a loss of all rows' tokens."""
    return lambda batch, logp: loss(*jnp.split(losses.sequence_logratio(logp, batch["ref_logp"], batch["mask"]), 2))[0]


def simpo(batch, logp):
    return losses.simpo(*jnp.split(losses.sequence_mean(logp, batch["mask"]), 2), beta=2.0, gamma=0.5)[0]


def kto(batch, logp):
    ratio = losses.sequence_logratio(logp, batch["ref_logp"], batch["mask"])
    kl = losses.sequence_logratio(batch["kl_logp"], batch["kl_ref_logp"], batch["kl_mask"])
    kl = {"kl_logratio": kl, "kl_valid": jnp.any(batch["kl_mask"], axis=1)}
    return losses.kto(ratio, batch["desirable"], beta=0.1, weight_undesirable=1.5, **kl)[0]


ppo = partial(policy_gradient, clip="ppo")
cispo = partial(policy_gradient, clip="cispo", clip_low=1.0)  # TRL's cap is the ratio's own, and from above only
gspo = partial(policy_gradient, clip="ppo", ratio="sequence")
replace = dataclasses.replace
base, by_token = ALGORITHMS["grpo_trl"], ALGORITHMS["bnpo_trl"]
constant = replace(ALGORITHMS["dr_grpo_trl"], max_length=MAX_LENGTH)

DR_GRPO = {"loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": MAX_LENGTH}
VLLM = {"loss_type": "grpo", "use_vllm": True}
PLAIN_KL = {"beta": 0.04, "use_bias_correction_kl": False}
LOST = {**PLAIN_KL, "mask_truncated_completions": True}  # a response cut off keeps its row and loses its tokens

CASES = {
    "grpo": Case({"loss_type": "grpo"}, base),
    "grpo, KL": Case({"loss_type": "grpo", **PLAIN_KL}, replace(base, kl_coef=0.04)),
    "grpo, KL by default": Case({"loss_type": "grpo", "beta": 0.04}, replace(base, kl_coef=0.04), kl_ratio="token"),
    "grpo, asymmetric clip": Case(
        {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.28},
        replace(base, loss=partial(ppo, clip_low=0.1, clip_high=0.28)),
    ),
    "grpo, two-sided clip": Case({"loss_type": "grpo", "delta": 1.5}, replace(base, loss=partial(ppo, dual_clip=1.5))),
    "grpo, rows without tokens": Case({"loss_type": "grpo", **LOST}, replace(base, kl_coef=0.04), batch=wounded),
    "grpo, micro-batches": Case({"loss_type": "grpo", "gradient_accumulation_steps": 3}, base),
    "grpo, scaled by the batch": Case(
        {"loss_type": "grpo", "scale_rewards": "batch"}, replace(base, advantage=batch_scaled), batch=unscored
    ),
    "grpo, two rewards": Case(
        {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
        replace(base, advantage=normalize_then_sum),
        batch=partial(unscored, terms=2),
    ),
    "bnpo": Case({"loss_type": "bnpo", **PLAIN_KL}, replace(by_token, kl_coef=0.04)),
    "dapo": Case({"loss_type": "dapo"}, ALGORITHMS["dapo_trl"]),
    "dapo, asymmetric clip": Case(
        {"loss_type": "dapo", "epsilon_high": 0.28}, replace(by_token, loss=partial(ppo, clip_high=0.28))
    ),
    "dapo, rows without tokens": Case({"loss_type": "dapo", **LOST}, replace(by_token, kl_coef=0.04), batch=wounded),
    "dapo, micro-batches": Case({"loss_type": "dapo", "gradient_accumulation_steps": 3}, by_token),
    "dr_grpo": Case(DR_GRPO, constant),
    "dr_grpo, rows without tokens": Case(DR_GRPO | LOST, replace(constant, kl_coef=0.04), batch=wounded),
    "cispo": Case({"loss_type": "cispo", "epsilon_high": 5.0}, ALGORITHMS["cispo_trl"]),
    "cispo, KL, low cap": Case(
        {"loss_type": "cispo", "epsilon_high": 1.25, **PLAIN_KL},
        replace(by_token, loss=partial(cispo, clip_high=0.25), kl_coef=0.04),
    ),
    "gspo": Case(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        ALGORITHMS["gspo_trl"],
    ),
    "gspo, KL by default, mean over tokens": Case(
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "beta": 0.04},
        replace(by_token, loss=gspo, kl_coef=0.04),
        kl_ratio="sequence",
    ),
    "luspo": Case(
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        replace(base, loss=gspo, aggregate="constant", max_length=1),
    ),
    "importance, token_truncate": Case(
        VLLM | {"vllm_importance_sampling_mode": "token_truncate"},
        base,
        importance={"level": "token", "beyond": "truncate", "cap": CAP},
    ),
    "importance, token_mask": Case(
        VLLM | {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.5},
        base,
        importance={"level": "token", "beyond": "mask", "cap": CAP, "floor": 0.5},
    ),
    "importance, sequence_truncate": Case(
        VLLM | {"vllm_importance_sampling_mode": "sequence_truncate"},
        base,
        importance={"level": "sequence", "beyond": "truncate", "cap": CAP},
    ),
    "importance, sequence_mask": Case(
        VLLM | PLAIN_KL,
        replace(base, kl_coef=0.04),
        importance={"level": "sequence", "beyond": "mask", "cap": CAP},
    ),
    "dpo": Case({"beta": 0.1}, pairs(partial(losses.dpo, beta=0.1)), "dpo(beta=0.1)", trl_side.dpo, responses),
    # TRL's DPO smooths labels only where it sorts the batch first: no matter with one pair.
    "dpo, smoothed labels": Case(
        {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.1},
        pairs(partial(losses.dpo, beta=0.3, label_smoothing=0.1)),
        "dpo(beta=0.3, label_smoothing=0.1)",
        trl_side.dpo,
        partial(responses, rows=2),
    ),
    "kto": Case(
        {"beta": 0.1, "undesirable_weight": 1.5}, kto, "kto(beta=0.1, weight_undesirable=1.5)", trl_side.kto, responses
    ),
    "simpo": Case(
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5},
        simpo,
        "simpo(beta=2.0, gamma=0.5)",
        trl_side.simpo,
        responses,
    ),
}
