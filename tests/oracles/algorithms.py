"""Whole algorithms: (case, at) -> loss, written from the papers' settings. An entry of ALGORITHMS without one fails.

`at` are the log-probs that a stop-gradient keeps (CISPO's ratio, KTO's z).
"""

import functools

from tests.oracles import groups, pairs, steps
from tests.oracles.policy import aggregate, kl_estimate, negative_log_likelihood, policy_gradient


def groups_of(case):
    return {"num_groups": case["num_groups"], "valid": case["valid"]}


def surrogate(case, advantage, how, at=None, *, kl=0.0, kind="k3", entropy=0.0, max_length=None, **options):
    """The clipped objective (PPO, .2 and token ratios unless said), the KL and the entropy."""
    mask = case["mask"]
    loss, _ = policy_gradient(
        case["logp"], case["old_logp"], advantage, mask, aggregate=how, max_length=max_length, at=at, **options
    )
    if kl:
        estimate = kl_estimate(case["logp"], case["ref_logp"], mask, kind=kind)
        loss += kl * aggregate(estimate, mask, how, max_length)
    return loss - entropy * aggregate(case["entropy"], mask, how, max_length)


def relative(case, **options):
    return groups.group_relative(case["reward"], case["group"], **groups_of(case), **options)


def ungrouped(function, case, *names, **options):
    """An advantage that needs the arrays `names` of the case besides its rewards and groups."""
    more = {name: case[name] for name in names} | options
    return function(case["reward"], case["group"], **groups_of(case), **more)


def episode_and_step(case, **options):
    named = {k: case[k] for k in ("group", "trajectory", "step", "anchor")} | options
    return steps.group_in_group(case["reward"], gamma=0.95, step_weight=1.0, **named, **groups_of(case))[0]


# case -> advantage, under the name of the first entry that has it.
ADVANTAGES = {
    "grpo": relative,
    "dr_grpo": lambda case: relative(case, scale="none"),
    "rloo": lambda case: ungrouped(groups.leave_one_out, case),
    "reinforce_pp": lambda case: ungrouped(steps.reinforce_pp, case, "mask", "token_reward"),
    "reinforce_pp_baseline": lambda case: ungrouped(steps.reinforce_pp, case, "mask", "token_reward", baseline="group"),
    "remax": lambda case: ungrouped(groups.remax, case, "baseline"),
    "gprs": lambda case: ungrouped(groups.group_preference, case),
    "gprs_weight": lambda case: ungrouped(groups.group_preference, case, "weight"),
    "gigpo": lambda case: episode_and_step(case, penalty=case["penalty"]),
    "hgpo": lambda case: ungrouped(steps.hierarchy_of_groups, case, "trajectory", "step", "past", "penalty"),
    "crpo_per_objective": lambda case: ungrouped(groups.per_objective, case, "terms", term_weight=(10.0, 1.0, 0.5)),
    "grpo_trl": lambda case: relative(case, eps=1e-4),
    "gigpo_verl_agent": lambda case: episode_and_step(case, episode_stat="step", penalty=case["penalty"]),
}


def on_policy(advantage, how, **options):
    """(case, at) -> the surrogate with that advantage; "constant" divides by the width of the batch."""

    def loss(case, at=None):
        length = len(case["logp"][0])
        return surrogate(case, ADVANTAGES[advantage](case), how, at, max_length=length, **options)

    return loss


def judged(case, mean=False):
    """(numbers of the better, of the worse responses), by log-ratio or by mean log-prob."""
    if mean:
        of = pairs.sequence_mean(case["logp"], case["mask"])
    else:
        of = pairs.sequence_logratio(case["logp"], case["ref_logp"], case["mask"])
    real = [pair for pair in case["pair"] if pair[0] >= 0]
    return [of[a] for a, _ in real], [of[b] for _, b in real]


def gsil(case, at=None, *, link, shift=2.0):
    return pairs.density_ratio(*judged(case), link=link, scale=0.01, shift=shift, max_logit=20.0)[0]


def spin(case, at=None):
    return pairs.spin(*judged(case), scale=0.1)[0]


def dpo(case, at=None):
    return pairs.dpo(*judged(case), beta=0.1)[0]


def simpo(case, at=None):
    return pairs.simpo(*judged(case, mean=True), beta=2.0, gamma=1.0)[0]


def bradley_terry(case, at=None):
    """Of a reward model whose rewards are the sums of log-probs."""
    total = [
        sum(x for x, counts in zip(*row, strict=True) if counts) for row in zip(case["logp"], case["mask"], strict=True)
    ]
    real = [pair for pair in case["pair"] if pair[0] >= 0]
    return pairs.bradley_terry([total[a] for a, _ in real], [total[b] for _, b in real])[0]


def kto(case, at=None):
    ref, mask = case["ref_logp"], case["mask"]
    frozen = None if at is None else pairs.sequence_logratio(at, ref, mask)
    of = pairs.sequence_logratio(case["logp"], ref, mask)
    there = [any(row) for row in mask]
    return pairs.kto(of, case["label"] > 0, beta=0.1, valid=there, at=frozen)[0]


def sft(case, at=None):
    return negative_log_likelihood(case["logp"], case["mask"])


CISPO = {"clip": "cispo", "clip_low": 1.0, "clip_high": 4.0}  # capped at 5; exp is above 0
GSPO = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}
AGENT = {"dual_clip": 3.0, "kl": 0.01, "entropy": 0.001}
ORACLES = {
    "grpo": on_policy("grpo", "sequence"),
    "dr_grpo": on_policy("dr_grpo", "constant"),
    "rloo": on_policy("rloo", "sequence"),
    "reinforce_pp": on_policy("reinforce_pp", "token"),
    "reinforce_pp_baseline": on_policy("reinforce_pp_baseline", "token"),
    "remax": on_policy("remax", "constant", clip="none"),
    "dapo": on_policy("grpo", "token", clip_low=0.2, clip_high=0.28),
    "gspo": on_policy("grpo", "sequence", **GSPO),
    "cispo": on_policy("grpo", "token", **CISPO),
    "gprs": on_policy("gprs", "sequence", kl=0.01),
    "gprs_weight": on_policy("gprs_weight", "sequence", kl=0.01),
    "gigpo": on_policy("gigpo", "token", **AGENT),
    "hgpo": on_policy("hgpo", "token", **AGENT),
    "crpo": on_policy("grpo", "sequence", clip="none", kl=0.001),
    "crpo_per_objective": on_policy("crpo_per_objective", "sequence", clip="none", kl=0.001),
    "gsil_bernoulli": functools.partial(gsil, link="bernoulli"),
    "gsil_brier": functools.partial(gsil, link="brier"),
    "gsil_hinge": functools.partial(gsil, link="hinge", shift=0.0),
    "gsil_kliep": functools.partial(gsil, link="kliep"),
    "gsil_lsif": functools.partial(gsil, link="lsif"),
    "spin": spin,
    "dpo": dpo,
    "bradley_terry": bradley_terry,
    "kto": kto,
    "simpo": simpo,
    "sft": sft,
    "grpo_trl": on_policy("grpo_trl", "sequence"),
    "bnpo_trl": on_policy("grpo_trl", "token"),
    "dapo_trl": on_policy("grpo_trl", "token"),
    "dr_grpo_trl": on_policy("dr_grpo", "constant"),
    "cispo_trl": on_policy("grpo_trl", "token", **CISPO),
    "gspo_trl": on_policy("grpo_trl", "sequence", **GSPO),
    "grpo_verl": on_policy("grpo", "token", dual_clip=3.0),
    "gigpo_verl_agent": on_policy("gigpo_verl_agent", "token", **AGENT),
}
