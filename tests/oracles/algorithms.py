"""Whole algorithms: (case, at) -> loss, written from the papers' settings. An entry of ALGORITHMS without one fails.

`at` are the log-probs that a stop-gradient keeps (CISPO's ratio, KTO's z).
"""

import functools

from tests.oracles import groups, pairs, steps
from tests.oracles.policy import aggregate, kl_estimate, negative_log_likelihood, policy_gradient


def groups_of(case):
    return {"num_groups": case["num_groups"], "valid": case["valid"]}


def surrogate(case, advantage, how, at=None, *, kl=0.0, entropy=0.0, max_length=None, **options):
    """The clipped objective (PPO, .2 and token ratios unless said), the k3 KL and the entropy."""
    mask = case["mask"]
    loss, _ = policy_gradient(
        case["logp"], case["old_logp"], advantage, mask, aggregate=how, max_length=max_length, at=at, **options
    )
    if kl:
        estimate = kl_estimate(case["logp"], case["ref_logp"], mask, kind="k3")
        loss += kl * aggregate(estimate, mask, how, max_length)
    return loss - entropy * aggregate(case["entropy"], mask, how, max_length)


def relative(case, **options):
    return groups.group_relative(case["reward"], case["group"], **groups_of(case), **options)


def grpo(case, at=None, *, eps=1e-6, how="sequence", dual_clip=None):
    return surrogate(case, relative(case, eps=eps), how, dual_clip=dual_clip)


def dr_grpo(case, at=None):
    return surrogate(case, relative(case, scale="none"), "constant", max_length=len(case["logp"][0]))


def rloo(case, at=None):
    return surrogate(case, groups.leave_one_out(case["reward"], case["group"], **groups_of(case)), "sequence")


def reinforce_pp(case, at=None, baseline="none"):
    advantage = steps.reinforce_pp(
        case["reward"], case["group"], mask=case["mask"], baseline=baseline, **groups_of(case)
    )
    return surrogate(case, advantage, "token")


def remax(case, at=None):
    advantage = groups.remax(case["reward"], case["group"], baseline=case["baseline"], **groups_of(case))
    return surrogate(case, advantage, "constant", max_length=len(case["logp"][0]), clip="none")


def dapo(case, at=None):
    return surrogate(case, relative(case), "token", clip_low=0.2, clip_high=0.28)


def gspo(case, at=None, eps=1e-6):
    return surrogate(case, relative(case, eps=eps), "sequence", ratio="sequence", clip_low=3e-4, clip_high=4e-4)


def cispo(case, at=None, eps=1e-6):
    """The ratio is capped at 5 and has no lower bound (exp is above 0)."""
    return surrogate(case, relative(case, eps=eps), "token", at, clip="cispo", clip_low=1.0, clip_high=4.0)


def gprs(case, at=None, weight=None):
    advantage = groups.group_preference(case["reward"], case["group"], weight=weight, **groups_of(case))
    return surrogate(case, advantage, "sequence", kl=0.01)


def gprs_weight(case, at=None):
    return gprs(case, weight=case["weight"])


def gigpo(case, at=None, **options):
    named = {k: case[k] for k in ("group", "trajectory", "step", "anchor")} | options
    advantage, _ = steps.group_in_group(case["reward"], gamma=0.95, step_weight=1.0, **named, **groups_of(case))
    return surrogate(case, advantage, "token", dual_clip=3.0, kl=0.01, entropy=0.001)


def crpo(case, at=None):
    return surrogate(case, relative(case), "sequence", clip="none", kl=0.001)


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


def kto(case, at=None):
    ref, mask = case["ref_logp"], case["mask"]
    frozen = None if at is None else pairs.sequence_logratio(at, ref, mask)
    of = pairs.sequence_logratio(case["logp"], ref, mask)
    there = [any(row) for row in mask]
    return pairs.kto(of, case["label"] > 0, beta=0.1, valid=there, at=frozen)[0]


def gigpo_verl_agent(case, at=None):
    return gigpo(case, episode_stat="step", penalty=case["penalty"])


def sft(case, at=None):
    return negative_log_likelihood(case["logp"], case["mask"])


ORACLES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": functools.partial(reinforce_pp, baseline="group"),
    "remax": remax,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "gprs": gprs,
    "gprs_weight": gprs_weight,
    "gigpo": gigpo,
    "crpo": crpo,
    "gsil_bernoulli": functools.partial(gsil, link="bernoulli"),
    "gsil_brier": functools.partial(gsil, link="brier"),
    "gsil_hinge": functools.partial(gsil, link="hinge", shift=0.0),
    "gsil_kliep": functools.partial(gsil, link="kliep"),
    "gsil_lsif": functools.partial(gsil, link="lsif"),
    "spin": spin,
    "dpo": dpo,
    "kto": kto,
    "simpo": simpo,
    "sft": sft,
    "grpo_trl": functools.partial(grpo, eps=1e-4),
    "bnpo_trl": functools.partial(grpo, eps=1e-4, how="token"),
    "dapo_trl": functools.partial(grpo, eps=1e-4, how="token"),
    "dr_grpo_trl": dr_grpo,
    "cispo_trl": functools.partial(cispo, eps=1e-4),
    "gspo_trl": functools.partial(gspo, eps=1e-4),
    "grpo_verl": functools.partial(grpo, how="token", dual_clip=3.0),
    "gigpo_verl_agent": gigpo_verl_agent,
}
