"""Losses of pairs and of labelled responses: GSIL, SPIN, DPO, SimPO, Bradley-Terry and KTO.

They take one number a response: a log-ratio to the reference summed over its tokens (sequence_logratio), a mean
log-prob (sequence_mean), or a reward model's score. Pairs that are not `valid` enter nothing, whatever they hold.
"""

import math
import warnings
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.losses.aggregate import Metrics, wide
from rlalign.types import Array

Link = Callable[[jax.Array], jax.Array]
softplus = jax.nn.softplus


def sequence_logratio(logp: Array, ref_logp: Array, mask: Array) -> jax.Array:
    """L_n = sum over True tokens of (logp - ref_logp).

    Args:
      logp: f[N, R].  ref_logp: f[N, R], no gradient.  mask: b[N, R].

    Returns:
      f[N], nats a response, in float32 or wider.
    """
    expect(mask=(mask, "b[N, R]"), logp=(logp, "f[N, R]"), ref_logp=(ref_logp, "f[N, R]"))
    reference = jax.lax.stop_gradient(jnp.where(mask, wide(ref_logp), 0))
    return jnp.sum(jnp.where(mask, wide(logp), 0) - reference, axis=1)


def sequence_mean(logp: Array, mask: Array) -> jax.Array:
    """Mean of logp over True tokens; 0 where there is none.

    Args:
      logp: f[N, R].  mask: b[N, R].

    Returns:
      f[N], nats a token, in float32 or wider.
    """
    expect(mask=(mask, "b[N, R]"), logp=(logp, "f[N, R]"))
    total = jnp.sum(jnp.where(mask, wide(logp), 0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1).astype(total.dtype)


def _valid(x: Array, valid: Array | None) -> jax.Array:
    return jnp.ones(jnp.shape(x), bool) if valid is None else jnp.asarray(valid)


def mean_over(x: jax.Array, valid: jax.Array, denominator: Array | None = None) -> jax.Array:
    """Mean of x f[M] where valid; `denominator` replaces their count."""
    count = jnp.sum(valid) if denominator is None else jnp.asarray(denominator)
    return jnp.sum(jnp.where(valid, x, 0)) / jnp.maximum(count, 1).astype(x.dtype)


# Each link: f = log(p_data / p_ref) is what the minimiser f* equals (hinge: only its sign), because the generated
# responses come from the reference. In brackets the convex function that generates it.
LINKS: dict[str, tuple[Link, Link]] = {
    "bernoulli": (lambda f: softplus(-f), softplus),  # logistic regression [x log x - (1 + x) log(1 + x)]
    "brier": (lambda f: jnp.square(jax.nn.sigmoid(-f)), lambda f: jnp.square(jax.nn.sigmoid(f))),  # [-x / (1 + x)]
    "hinge": (lambda f: jnp.maximum(1 - f, 0), lambda f: jnp.maximum(1 + f, 0)),  # [|x - 1|]
    "kliep": (lambda f: -f, jnp.exp),  # KL importance estimation [x log x - x]
    "lsif": (lambda f: -jnp.exp(f), lambda f: jnp.exp(2 * f) / 2),  # least squares [(x - 1)^2 / 2]
}


def density_ratio(
    logratio_real: Array,
    logratio_generated: Array,
    *,
    valid: Array | None = None,
    link: Literal["bernoulli", "brier", "hinge", "kliep", "lsif"] | tuple[Link, Link] = "bernoulli",
    scale: float = 1.0,
    shift: float = 0.0,
    max_logit: float = math.inf,
    denominator: Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """GSIL: tell demonstrations from the reference's own responses by the policy's log-ratio.

        loss = mean of real(f(L_real)) + generated(f(L_generated)),   f(L) = scale * L + shift

        link         real              generated          convex function of x = e^f                  minimiser f*
        bernoulli    softplus(-f)      softplus(f)        x log x - (1 + x) log(1 + x)                log(p_data/p_ref)
        brier        (1 - sig f)^2     (sig f)^2          -x / (1 + x)                                log(p_data/p_ref)
        hinge        max(0, 1 - f)     max(0, 1 + f)      |x - 1|                                     its sign
        kliep        -f                e^f                x log x - x                                 log(p_data/p_ref)
        lsif         -e^f              e^(2f) / 2         (x - 1)^2 / 2                               log(p_data/p_ref)

    arXiv 2410.10093; formulas from the code tengxiao1/GSIL at bf269e0, which calls scale alpha and shift beta. At L = 0
    the gradient on generated responses is e^shift that on real ones (7.4 at its shift of 2), but for hinge, which at
    its (.01, 2) has none on real responses until L < -100.

    Args:
      logratio_real, logratio_generated: f[M], sums over response tokens (sequence_logratio).
      valid: b[M].
      link: a name, or (real, generated) functions of f.
      scale, shift: see above.
      max_logit: |f| is cut there, so that kliep and lsif stay finite (float32 overflows at f = 88 and 44); a cut logit
        has no gradient. inf is the code's loss.
      denominator: the whole batch's valid pairs, where a step sees only a part of it.

    Returns:
      (loss, metrics): logit_real, logit_generated (means), logit_cut_share (of the 2 M logits), accuracy (share of
      pairs with L_real > L_generated).
    """
    expect(
        logratio_real=(logratio_real, "f[M]"), logratio_generated=(logratio_generated, "f[M]"), valid=(valid, "b[M]")
    )
    if isinstance(link, str) and link not in LINKS:
        raise ValueError(f"unknown link {link!r}: choose one of {', '.join(LINKS)}, or a pair (real, generated)")
    if not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}: otherwise the loss pushes demonstrations down")
    if not max_logit > 0:
        raise ValueError(f"max_logit must be > 0, got {max_logit}")
    if link == "hinge" and shift >= 1:
        warnings.warn(
            f"hinge with shift={shift} has no gradient on real responses until L < {(1 - shift) / scale:g}; "
            "with shift=0 it has",
            stacklevel=2,
        )
    valid = _valid(logratio_real, valid)
    real, generated = (jnp.where(valid, wide(x), 0) for x in (logratio_real, logratio_generated))
    logits = [scale * x + shift for x in (real, generated)]
    cut = [jnp.clip(f, -max_logit, max_logit) for f in logits]
    on_real, on_generated = LINKS[link] if isinstance(link, str) else link
    loss = mean_over(on_real(cut[0]) + on_generated(cut[1]), valid, denominator)
    beyond = sum((jnp.abs(f) > max_logit).astype(f.dtype) for f in logits) / 2
    metrics = {
        "logit_real": mean_over(cut[0], valid),
        "logit_generated": mean_over(cut[1], valid),
        "logit_cut_share": mean_over(jnp.asarray(beyond), valid),
        "accuracy": mean_over((real > generated).astype(real.dtype), valid),
    }
    return loss, jax.lax.stop_gradient(metrics)


def _margin(better: Array, worse: Array, valid: Array | None) -> tuple[jax.Array, jax.Array]:
    """better - worse f[M], 0 where not valid, and valid as an array."""
    valid = _valid(better, valid)
    return jnp.where(valid, wide(better), 0) - jnp.where(valid, wide(worse), 0), valid


def _judged(loss: jax.Array, margin: jax.Array, valid: jax.Array, denominator, *, unit: float = 1.0):
    """(mean loss, metrics) of pairs."""
    margin = jax.lax.stop_gradient(margin)
    accuracy = mean_over((margin > 0).astype(margin.dtype), valid)
    return mean_over(loss, valid, denominator), {"margin": mean_over(unit * margin, valid), "accuracy": accuracy}


def spin(
    logratio_real: Array,
    logratio_generated: Array,
    *,
    scale: float,
    valid: Array | None = None,
    denominator: Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """SPIN: softplus(-scale (L_real - L_generated)), the reference being the policy that generated.

    arXiv 2401.01335, with the logistic loss; GSIL's baseline.

    Args:
      logratio_real, logratio_generated: f[M].
      scale: its lambda.
      valid: b[M].
      denominator: as in density_ratio.

    Returns:
      (loss, metrics): margin (mean of L_real - L_generated, nats), accuracy.
    """
    expect(
        logratio_real=(logratio_real, "f[M]"), logratio_generated=(logratio_generated, "f[M]"), valid=(valid, "b[M]")
    )
    if not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    margin, valid = _margin(logratio_real, logratio_generated, valid)
    return _judged(softplus(-scale * margin), margin, valid, denominator)


def dpo(
    logratio_chosen: Array,
    logratio_rejected: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    valid: Array | None = None,
    denominator: Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """DPO: softplus(-beta (L_chosen - L_rejected)).

        (1 - s) softplus(-m) + s softplus(m),   m = beta (L_c - L_r)          DPO, arXiv 2305.18290, eq. 7; s: cDPO

    Args:
      logratio_chosen, logratio_rejected: f[M], sums over response tokens.
      beta: strength of the pull to the reference.
      label_smoothing: s, the share of labels believed wrong, in [0, 0.5).
      valid: b[M].
      denominator: as in density_ratio.

    Returns:
      (loss, metrics): margin (mean of m), accuracy.
    """
    expect(
        logratio_chosen=(logratio_chosen, "f[M]"), logratio_rejected=(logratio_rejected, "f[M]"), valid=(valid, "b[M]")
    )
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    margin, valid = _margin(logratio_chosen, logratio_rejected, valid)
    m, s = beta * margin, label_smoothing
    loss = softplus(-m) if s == 0 else (1 - s) * softplus(-m) + s * softplus(m)
    return _judged(loss, margin, valid, denominator, unit=beta)


def simpo(
    logp_chosen: Array,
    logp_rejected: Array,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    valid: Array | None = None,
    denominator: Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """SimPO: softplus(-(beta (mean logp_chosen - mean logp_rejected) - gamma)); no reference.

    SimPO, arXiv 2405.14734, eq. 6.

    Args:
      logp_chosen, logp_rejected: f[M], mean log-probs a token (sequence_mean).
      beta, gamma: scale and target margin.
      valid: b[M].
      denominator: as in density_ratio.

    Returns:
      (loss, metrics): margin (mean difference, nats a token), accuracy.
    """
    expect(logp_chosen=(logp_chosen, "f[M]"), logp_rejected=(logp_rejected, "f[M]"), valid=(valid, "b[M]"))
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    margin, valid = _margin(logp_chosen, logp_rejected, valid)
    return _judged(softplus(gamma - beta * margin), margin, valid, denominator)


def bradley_terry(
    score_chosen: Array,
    score_rejected: Array,
    *,
    margin: float = 0.0,
    valid: Array | None = None,
    denominator: Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """A reward model's loss: softplus(-(s_chosen - s_rejected - margin)).

    Bradley and Terry 1952; InstructGPT, arXiv 2203.02155, eq. 1; margin: Llama 2, arXiv 2307.09288, eq. 2.

    Args:
      score_chosen, score_rejected: f[M].
      margin: by how much the chosen should win.
      valid: b[M].
      denominator: as in density_ratio.

    Returns:
      (loss, metrics): margin (mean of s_chosen - s_rejected), accuracy.
    """
    expect(score_chosen=(score_chosen, "f[M]"), score_rejected=(score_rejected, "f[M]"), valid=(valid, "b[M]"))
    ahead, valid = _margin(score_chosen, score_rejected, valid)
    return _judged(softplus(margin - ahead), ahead, valid, denominator)


def kto(
    logratio: Array,
    desirable: Array,
    *,
    beta: float = 0.1,
    weight_desirable: float = 1.0,
    weight_undesirable: float = 1.0,
    kl_logratio: Array | None = None,
    kl_valid: Array | None = None,
    valid: Array | None = None,
    denominator: Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """KTO: responses that are good or bad, without pairs.

        w_d (1 - sigmoid(beta (L - z)))  desirable     w_u (1 - sigmoid(beta (z - L)))  undesirable
        z = max(0, mean log-ratio), no gradient                               KTO, arXiv 2402.01306, eq. 8

    Args:
      logratio: f[N], sums over response tokens.
      desirable: b[N].
      beta, weight_desirable, weight_undesirable: see above.
      kl_logratio: f[K], log-ratios of responses to other prompts than theirs, whose mean estimates the KL (the paper's
        way); None takes the batch's own.
      kl_valid: b[K].
      valid: b[N].
      denominator: as in density_ratio. z is always the mean over what this call sees: where a step splits a batch,
        each part has its own.

    Returns:
      (loss, metrics): kl (z, nats), logratio_desirable and logratio_undesirable (means).
    """
    expect(logratio=(logratio, "f[N]"), desirable=(desirable, "b[N]"), valid=(valid, "b[N]"))
    expect(kl_logratio=(kl_logratio, "f[K]"), kl_valid=(kl_valid, "b[K]"))
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    valid = _valid(logratio, valid)
    ratio = jnp.where(valid, wide(logratio), 0)
    apart, apart_valid = (ratio, valid) if kl_logratio is None else (wide(kl_logratio), _valid(kl_logratio, kl_valid))
    z = jax.lax.stop_gradient(jnp.maximum(mean_over(apart, apart_valid), 0))
    sign = jnp.where(desirable, 1, -1).astype(ratio.dtype)
    weight = jnp.where(desirable, weight_desirable, weight_undesirable).astype(ratio.dtype)
    loss = mean_over(weight * jax.nn.sigmoid(-sign * beta * (ratio - z)), valid, denominator)
    good, bad = valid & desirable, valid & ~jnp.asarray(desirable)
    metrics = {
        "kl": z,
        "logratio_desirable": mean_over(ratio, good),
        "logratio_undesirable": mean_over(ratio, bad),
    }
    return loss, jax.lax.stop_gradient(metrics)
