"""Losses of one number a response: GSIL, DPO, SimPO, KTO, Bradley-Terry. Each returns (loss, metrics).

`denominator` divides the loss in place of the count; metrics are means over what is there.
"""

import math

import numpy as np

from tests.oracles.groups import everyone


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def exp(x):
    """math.exp raises where a float becomes infinite."""
    return math.inf if x > 709 else math.exp(x)


def mean(values, denominator=None):
    """0 of nothing."""
    count = len(values) if denominator is None else denominator
    return sum(values) / count if count else 0.0


def kept(values, valid):
    valid = everyone(valid, len(values))
    return [float(values[i]) for i in range(len(values)) if valid[i]]


# name -> (real term, generated term) of f = scale * L + shift
LINKS = {
    "bernoulli": (lambda f: softplus(-f), lambda f: softplus(f)),
    "brier": (lambda f: sigmoid(-f) ** 2, lambda f: sigmoid(f) ** 2),  # 1 - sigmoid(f) = sigmoid(-f), not cancelled
    "hinge": (lambda f: max(0.0, 1 - f), lambda f: max(0.0, 1 + f)),
    "kliep": (lambda f: -f, lambda f: exp(f)),
    "lsif": (lambda f: -exp(f), lambda f: 0.5 * exp(2 * f)),
}


def density_ratio(
    logratio_real,
    logratio_generated,
    *,
    valid=None,
    link="bernoulli",
    scale=1.0,
    shift=0.0,
    max_logit=math.inf,
    denominator=None,
):
    """GSIL: link_real(f_real) + link_generated(f_generated), f = scale * L + shift."""
    of_real, of_generated = LINKS[link] if isinstance(link, str) else link
    real, generated = kept(logratio_real, valid), kept(logratio_generated, valid)
    f_real, f_generated, beyond = [], [], []
    for source, out in ((real, f_real), (generated, f_generated)):
        for ratio in source:
            f = scale * ratio + shift
            beyond.append(float(abs(f) > max_logit))
            out.append(min(max(f, -max_logit), max_logit))
    terms = [of_real(a) + of_generated(b) for a, b in zip(f_real, f_generated, strict=True)]
    metrics = {
        "logit_real": mean(f_real),
        "logit_generated": mean(f_generated),
        "logit_cut_share": mean(beyond),
        "accuracy": mean([float(a > b) for a, b in zip(real, generated, strict=True)]),
    }
    return mean(terms, denominator), metrics


def preferred(first, second, valid, term, unit, denominator):
    """What the losses of a margin m = first - second share: mean term(m), mean unit * m, the share with m > 0."""
    margins = [a - b for a, b in zip(kept(first, valid), kept(second, valid), strict=True)]
    metrics = {"margin": mean([unit * m for m in margins]), "accuracy": mean([float(m > 0) for m in margins])}
    return mean([term(m) for m in margins], denominator), metrics


def spin(logratio_real, logratio_generated, *, scale, valid=None, denominator=None):
    """softplus(-scale (L_real - L_generated)); the margin is reported without the scale."""
    term = lambda m: softplus(-scale * m)
    return preferred(logratio_real, logratio_generated, valid, term, 1.0, denominator)


def dpo(logratio_chosen, logratio_rejected, *, beta=0.1, label_smoothing=0.0, valid=None, denominator=None):
    """(1 - s) softplus(-beta m) + s softplus(beta m); the margin is reported times beta."""
    term = lambda m: (1 - label_smoothing) * softplus(-beta * m) + label_smoothing * softplus(beta * m)
    return preferred(logratio_chosen, logratio_rejected, valid, term, beta, denominator)


def simpo(logp_chosen, logp_rejected, *, beta=2.0, gamma=1.0, valid=None, denominator=None):
    """softplus(-(beta m - gamma)), m of mean log-probs a token."""
    term = lambda m: softplus(-(beta * m - gamma))
    return preferred(logp_chosen, logp_rejected, valid, term, 1.0, denominator)


def bradley_terry(score_chosen, score_rejected, *, margin=0.0, valid=None, denominator=None):
    """softplus(-(s_c - s_r - margin)); the reported margin is s_c - s_r."""
    term = lambda m: softplus(-(m - margin))
    return preferred(score_chosen, score_rejected, valid, term, 1.0, denominator)


def kto(
    logratio,
    desirable,
    *,
    beta=0.1,
    weight_desirable=1.0,
    weight_undesirable=1.0,
    kl_logratio=None,
    kl_valid=None,
    valid=None,
    denominator=None,
    at=None,
):
    """w_d (1 - sigmoid(beta (L - z))) or w_u (1 - sigmoid(beta (z - L))), z = max(0, KL); `at` is the logratio of z."""
    valid = everyone(valid, len(logratio))
    if kl_logratio is None:
        divergence = mean(kept(logratio if at is None else at, valid))
    else:
        divergence = mean(kept(kl_logratio, kl_valid))
    z = 0.0 if divergence < 0 else divergence  # max(0, NaN) would be 0
    terms, good, bad = [], [], []
    for i in range(len(logratio)):
        if not valid[i]:
            continue
        ratio = float(logratio[i])
        if desirable[i]:
            good.append(ratio)
            terms.append(weight_desirable * sigmoid(-beta * (ratio - z)))
        else:
            bad.append(ratio)
            terms.append(weight_undesirable * sigmoid(-beta * (z - ratio)))
    metrics = {"kl": z, "logratio_desirable": mean(good), "logratio_undesirable": mean(bad)}
    return mean(terms, denominator), metrics


def sequence_logratio(logp, ref_logp, mask):
    """L_n = the sum over True tokens of logp - ref_logp."""
    out = np.zeros(len(logp))
    for n in range(len(logp)):
        out[n] = sum(float(logp[n][t]) - float(ref_logp[n][t]) for t in range(len(logp[n])) if mask[n][t])
    return out


def sequence_mean(logp, mask):
    """The mean over True tokens."""
    out = np.zeros(len(logp))
    for n in range(len(logp)):
        out[n] = mean([float(logp[n][t]) for t in range(len(logp[n])) if mask[n][t]])
    return out
