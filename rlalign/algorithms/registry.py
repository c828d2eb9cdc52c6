"""The papers' algorithms, with the defaults that they state, or that were found to work where they are silent."""

import functools
from typing import Any

from rlalign.advantages import (
    group_in_group,
    group_preference,
    group_relative,
    hierarchy_of_groups,
    leave_one_out,
    per_objective,
    reinforce_pp,
    remax,
)
from rlalign.algorithms.algorithm import About, Algorithm
from rlalign.losses import bradley_terry, density_ratio, dpo, kto, negative_log_likelihood, policy_gradient, simpo, spin

PPO = functools.partial(policy_gradient, clip="ppo", clip_low=0.2, clip_high=0.2)


def episode_and_step(reward, group, **options) -> Any:
    """group_in_group's sum of both parts f[N], in the form of the other advantages."""
    return group_in_group(reward, group=group, **options)[0]


def gsil(link: str, name: str, trap: str, **options) -> Algorithm:
    """GSIL with the official script's scale .01 and shift 2, unless `options` say otherwise."""
    defaults: dict[str, Any] = {"scale": 0.01, "shift": 2.0, "max_logit": 20.0}
    return Algorithm(
        advantage=None,
        loss=functools.partial(density_ratio, link=link, **(defaults | options)),
        data="pairs",
        about=About(
            formula=f"{name}, f = scale * L + shift, L = sum of log pi / pi_ref",
            source="GSIL, arXiv 2410.10093; code tengxiao1/GSIL",
            use="demonstrations only: the policy's own answers are the negatives",
            cost="one generated answer a demonstration and iteration; reference log-probs once",
            trap=trap,
        ),
    )


PAPERS: dict[str, Algorithm] = {
    "grpo": Algorithm(
        advantage=functools.partial(group_relative, scale="std"),
        loss=PPO,
        aggregate="sequence",
        about=About(
            formula="A = (r - mean) / (std + eps); mean over samples of token means",
            source="GRPO, arXiv 2402.03300",
            use="the default: any reward, groups of 4 or more",
            cost="G samples a prompt",
            trap="nearly equal rewards are blown up to unit size; long wrong answers are punished less a token",
        ),
    ),
    "dr_grpo": Algorithm(
        advantage=functools.partial(group_relative, scale="none"),
        loss=PPO,
        aggregate="constant",
        about=About(
            formula="A = r - mean; token sum / (samples * max_length)",
            source="Dr. GRPO, arXiv 2503.20783",
            use="answers of very different lengths: no length and no difficulty bias",
            cost="as grpo",
            trap="the step size scales with the rewards and with 1 / max_length: tune the learning rate again",
        ),
    ),
    "rloo": Algorithm(
        advantage=leave_one_out,
        loss=PPO,
        aggregate="sequence",
        about=About(
            formula="A = r - mean of the others = G/(G-1) (r - mean)",
            source="RLOO, arXiv 2402.14740",
            use="small groups: unbiased from G = 2 on",
            cost="as grpo",
            trap="not scaled: rewards of another size need another learning rate",
        ),
    ),
    "reinforce_pp": Algorithm(
        advantage=reinforce_pp,
        loss=PPO,
        needs=("mask",),
        optional=("token_reward",),
        grouped=False,
        about=About(
            formula="A_t = (G_t - mean) / sqrt(var + eps), over all tokens of the batch",
            source="REINFORCE++, arXiv 2501.03262",
            use="one sample a prompt, or rewards that compare across prompts",
            cost="no groups needed",
            trap="hard prompts get negative advantages whatever the answer; needs large batches",
        ),
    ),
    "reinforce_pp_baseline": Algorithm(
        advantage=functools.partial(reinforce_pp, baseline="group"),
        loss=PPO,
        needs=("mask",),
        optional=("token_reward",),
        about=About(
            formula="as reinforce_pp of r - mean of the group",
            source="REINFORCE++-baseline, arXiv 2501.03262",
            use="groups whose deviations are too noisy to divide by",
            cost="as grpo",
            trap="whitening over tokens: long answers weigh more in the statistics",
        ),
    ),
    "remax": Algorithm(
        advantage=remax,
        loss=functools.partial(policy_gradient, clip="none"),
        needs=("baseline",),
        grouped=False,
        aggregate="constant",
        about=About(
            formula="A = r - r(greedy answer)",
            source="ReMax, arXiv 2310.10505",
            use="one sample a prompt",
            cost="one greedy answer more a prompt",
            trap="no clip: one optimizer step a batch of rollouts",
        ),
    ),
    "dapo": Algorithm(
        advantage=functools.partial(group_relative, scale="std"),
        loss=functools.partial(policy_gradient, clip="ppo", clip_low=0.2, clip_high=0.28),
        aggregate="token",
        about=About(
            formula="GRPO's A; clip [1 - .2, 1 + .28]; sum over tokens / all tokens",
            source="DAPO, arXiv 2503.14476",
            use="long chains of thought: rare tokens may rise, every token weighs the same",
            cost="as grpo; with informative_groups more samples for the same batch",
            trap="overlong_penalty and informative_groups are yours to call: reward shaping and resampling",
        ),
    ),
    "gspo": Algorithm(
        advantage=functools.partial(group_relative, scale="std"),
        loss=functools.partial(policy_gradient, clip="ppo", clip_low=3e-4, clip_high=4e-4, ratio="sequence"),
        aggregate="sequence",
        about=About(
            formula="f = exp(mean_t log-ratio), one a sequence; clip [1 - 3e-4, 1 + 4e-4]",
            source="GSPO, arXiv 2507.18071",
            use="mixtures of experts and several updates a batch: token ratios are too noisy",
            cost="as grpo",
            trap="clips far more tokens than grpo, which is intended; other clip ranges than token ratios",
        ),
    ),
    "cispo": Algorithm(
        advantage=functools.partial(group_relative, scale="std"),
        loss=functools.partial(policy_gradient, clip="cispo", clip_low=1.0, clip_high=4.0),
        aggregate="token",
        about=About(
            formula="-stopgrad(min(f, 5)) A log pi",
            source="CISPO (MiniMax-M1), arXiv 2506.13585",
            use="several updates a batch where no token may lose its gradient",
            cost="as grpo",
            trap="the paper leaves the cap open; verl cuts below too: clip_low=.2, clip_high=.2",
        ),
    ),
    "gprs": Algorithm(
        advantage=group_preference,
        loss=PPO,
        aggregate="sequence",
        kl_coef=0.01,
        about=About(
            formula="B_j = mean_i 1[r_j >= r_i]; A = B - mean",
            source="GPRS, EMNLP 2025 main.1085, eq. 7",
            use="reward models whose scale means nothing: only the order of rewards counts",
            cost="as grpo, and reference log-probs for the KL",
            trap="advantages are at most 1/2 in size; kl_coef .01 is the reasoning setup, RLHF takes .05",
        ),
    ),
    "gprs_weight": Algorithm(
        advantage=group_preference,
        loss=PPO,
        needs=("weight",),
        aggregate="sequence",
        kl_coef=0.01,
        about=About(
            formula="B_j = mean_i w_i 1[r_j >= r_i], w = pi_ref / pi_old",
            source="GPRS, EMNLP 2025 main.1085, eq. 10",
            use="preferences against the reference's answers instead of the policy's",
            cost="as gprs",
            trap="w is a ratio of whole responses: it vanishes or explodes as the policy leaves the reference",
        ),
    ),
    "gigpo": Algorithm(
        advantage=functools.partial(episode_and_step, gamma=0.95, step_weight=1.0, scale="std"),
        loss=functools.partial(policy_gradient, clip="ppo", clip_low=0.2, clip_high=0.2, dual_clip=3.0),
        needs=("trajectory", "step", "anchor"),
        optional=("penalty",),
        aggregate="token",
        kl_coef=0.01,
        entropy_coef=0.001,
        about=About(
            formula="A = (score - mean)/F of the episode + omega (R_t - mean)/F among steps from the same state",
            source="GiGPO, arXiv 2505.10978",
            use="agents of many turns: credit by step without a critic",
            cost="grouping on the host, under 1% of an iteration",
            trap="anchors that alias states (same text, other inventory) compare what cannot be compared",
        ),
    ),
    "hgpo": Algorithm(
        advantage=functools.partial(hierarchy_of_groups, gamma=0.95, alpha=1.0),
        loss=functools.partial(policy_gradient, clip="ppo", clip_low=0.2, clip_high=0.2, dual_clip=3.0),
        needs=("trajectory", "step", "past"),
        optional=("penalty",),
        aggregate="token",
        kl_coef=0.01,
        entropy_coef=0.001,
        about=About(
            formula="A = sum_l (l + 1)^alpha A_l / sum_l (l + 1)^alpha of subgroups that share their last l states",
            source="HGPO, arXiv 2602.22817, by its pre-release code",
            use="agents whose prompt shows the last turns: the same state after another past is another step",
            cost="as gigpo, K + 1 groupings",
            trap="no comparison of whole episodes: a state that one row alone reached teaches nothing",
        ),
    ),
    "crpo": Algorithm(
        advantage=functools.partial(group_relative, scale="std"),
        loss=functools.partial(policy_gradient, clip="none"),
        aggregate="sequence",
        kl_coef=0.001,
        about=About(
            formula="GRPO's A of r = 10 r_acc + r_CR + r_cons / 2",
            source="CRPO, arXiv 2512.00601, eq. 4",
            use="a correctness reward with small terms for form",
            cost="as grpo, and reference log-probs for the KL",
            trap="where all answers are right, std blows the small terms up to full size: see crpo_per_objective",
        ),
    ),
    "crpo_per_objective": Algorithm(
        advantage=functools.partial(per_objective, term_weight=(10.0, 1.0, 0.5), scale="std"),
        loss=functools.partial(policy_gradient, clip="none"),
        needs=("terms",),
        aggregate="sequence",
        kl_coef=0.001,
        about=About(
            formula="A = 10 A(r_acc) + A(r_CR) + A(r_cons) / 2, each term normalised by itself",
            source="an option beside CRPO, arXiv 2512.00601",
            use="crpo where most groups are all right or all wrong",
            cost="as crpo",
            trap="a term that hardly varies is still blown up to its weight: watch term_spread",
        ),
    ),
    "gsil_bernoulli": gsil("bernoulli", "softplus(-f) + softplus(f)", "negatives pull e^shift times harder at L = 0"),
    "gsil_brier": gsil("brier", "(1 - sig f)^2 + (sig f)^2", "gradients vanish where f is large: keep scale small"),
    "gsil_hinge": gsil(
        "hinge",
        "max(0, 1 - f) + max(0, 1 + f)",
        "at the script's shift of 2 real answers have no gradient until L < -100, so shift is 0 here",
        shift=0.0,
    ),
    "gsil_kliep": gsil("kliep", "-f + e^f", "unbounded below in L_real; max_logit keeps e^f finite"),
    "gsil_lsif": gsil("lsif", "-e^f + e^(2f) / 2", "unbounded below in L_real; max_logit keeps e^(2f) finite"),
    "spin": Algorithm(
        advantage=None,
        loss=functools.partial(spin, scale=0.1),
        data="pairs",
        about=About(
            formula="softplus(-scale (L_real - L_generated))",
            source="SPIN, arXiv 2401.01335",
            use="GSIL's baseline: demonstrations only",
            cost="as gsil",
            trap="only the difference counts: both log-probs may fall together",
        ),
    ),
    "dpo": Algorithm(
        advantage=None,
        loss=functools.partial(dpo, beta=0.1),
        data="pairs",
        about=About(
            formula="softplus(-beta (L_chosen - L_rejected))",
            source="DPO, arXiv 2305.18290",
            use="human preference pairs, no sampling",
            cost="reference log-probs once",
            trap="the chosen log-prob often falls too; watch logp, not the margin alone",
        ),
    ),
    "bradley_terry": Algorithm(
        advantage=None,
        loss=bradley_terry,
        data="pairs",
        score="reward",
        about=About(
            formula="softplus(-(s_chosen - s_rejected)), s at the last token",
            source="Bradley and Terry 1952; InstructGPT, arXiv 2203.02155, eq. 1",
            use="a reward model from preference pairs, for fit(judge=...)",
            cost="one pass; no log-probs, no reference",
            trap="only differences are learnt: the scale and zero of s mean nothing, which gprs does not read",
        ),
    ),
    "kto": Algorithm(
        advantage=None,
        loss=functools.partial(kto, beta=0.1),
        data="labels",
        about=About(
            formula="w (1 - sigmoid(+-beta (L - z))), z = max(0, batch KL)",
            source="KTO, arXiv 2402.01306",
            use="thumbs up or down, without pairs",
            cost="reference log-probs once; mismatched responses (Batch.pair) for the paper's z",
            trap="z is averaged over what a part of the batch sees; without mismatched responses it is biased",
        ),
    ),
    "simpo": Algorithm(
        advantage=None,
        loss=functools.partial(simpo, beta=2.0, gamma=1.0),
        data="pairs",
        score="mean_logp",
        about=About(
            formula="softplus(-(beta (mean logp_c - mean logp_r) - gamma))",
            source="SimPO, arXiv 2405.14734",
            use="preference pairs without a reference in memory",
            cost="no reference",
            trap="nothing holds the policy back: small learning rates, one epoch",
        ),
    ),
    "sft": Algorithm(
        advantage=None,
        loss=negative_log_likelihood,
        data="demonstrations",
        about=About(
            formula="-mean log pi over response tokens",
            source="maximum likelihood",
            use="the start of everything",
            cost="one pass",
            trap="imitates mistakes as well",
        ),
    ),
}
