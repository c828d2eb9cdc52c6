"""Every function of the core, with each of its options, against its oracle in few compiled programs: seconds in all.

What tests/mutants.py judges mutants by, beside the refusals of bad input. The modules of each package go deeper.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import advantages, losses
from rlalign_kernels.logprobs import statistics
from tests import oracles, test_logprobs

SAMPLES, LENGTH, GROUPS, PAIRS = 24, 5, 5, 12
GIGPO = {"gigpo": {}, "gigpo, by steps": {"episode_stat": "step", "scale": "none", "gamma": 0.5, "step_weight": 0.5}}
SURROGATES = {  # options, and which fields stand for advantage and weight
    "ppo token": ({}, "advantage", None),
    "ppo product": ({"aggregate": "sequence", "dual_clip": 1.5, "ratio": "product"}, "advantage_token", "weight"),
    "literal sequence": ({"clip": "literal", "ratio": "sequence", "clip_low": 0.1}, "advantage_token", None),
    "cispo token": ({"clip": "cispo", "clip_high": 0.5}, "advantage", "weight_token"),
    "none sequence": ({"clip": "none", "ratio": "sequence", "aggregate": "sequence"}, "advantage", None),
    "none product": ({"clip": "none", "ratio": "product"}, "advantage", None),
    "ppo, a length": ({"aggregate": "sequence", "max_length": 9}, "advantage", None),
}
GSIL = {"scale": 0.5, "shift": 0.25}  # a log-ratio of 7.5 is a logit of 4
WEIGHTS = {
    "token": {},
    "token, masked": {"beyond": "mask", "cap": 1.5, "floor": 0.5},
    "sequence": {"level": "sequence", "cap": 3.0},
}
PAIRED = {
    **{f"gsil {link}": ("density_ratio", {"link": link, "max_logit": 4.0, **GSIL}) for link in losses.LINKS},
    "gsil": ("density_ratio", {"scale": 0.5, "denominator": 7}),
    "spin": ("spin", {"scale": 0.3, "denominator": 7}),
    "dpo": ("dpo", {}),
    "dpo, smoothed": ("dpo", {"beta": 0.7, "label_smoothing": 0.2, "denominator": 9}),
    "simpo": ("simpo", {}),
    "simpo, options": ("simpo", {"beta": 1.5, "gamma": 0.5, "denominator": 7}),
    "bradley_terry": ("bradley_terry", {}),
    "bradley_terry, margin": ("bradley_terry", {"margin": 0.75, "denominator": 7}),
}


def groups_case(rng):
    case = oracles.random_groups(rng, SAMPLES, GROUPS)
    case["mask"] = oracles.random_tokens(rng, SAMPLES, LENGTH)["mask"]
    case["token_reward"] = rng.integers(-4, 5, (SAMPLES, LENGTH)) / 16
    case["baseline"] = rng.integers(-4, 5, GROUPS) / 4
    case["terms"] = rng.integers(-2, 3, (SAMPLES, 3)) / 2
    case["weight"] = np.round(rng.uniform(0, 3, SAMPLES) * 64) / 64
    return case


def groups_of(module, case):
    """Every advantage of groups, of the library or of the oracles."""
    how, args = {"num_groups": GROUPS, "valid": case["valid"]}, (case["reward"], case["group"])
    terms = {"terms": case["terms"], "term_weight": (10.0, 1.0, 0.5), **how}
    return {
        "grpo": module.group_relative(*args, **how),
        "grpo, ddof 0": module.group_relative(*args, ddof=0, eps=0.5, **how),
        "rloo": module.leave_one_out(*args, **how),
        "gprs": module.group_preference(*args, **how),
        "gprs, eq. 10": module.group_preference(*args, weight=case["weight"], **how),
        "remax": module.remax(*args, baseline=case["baseline"], **how),
        "terms": module.per_objective(*args, **terms),
        "terms, no std": module.per_objective(*args, scale="none", **terms),
        "informative": module.informative_groups(*args, **how),
        "spread": module.term_spread(case["terms"], case["group"], **how),
    }


def whitened_of(module, case):
    call = functools.partial(module.reinforce_pp, case["reward"], case["group"], mask=case["mask"], num_groups=GROUPS)
    call = functools.partial(call, valid=case["valid"])
    tokens = {"token_reward": case["token_reward"], "gamma": 0.75, "eps": 0.25}
    out = {"plain": call(), "group": call(baseline="group"), "tokens": call(**tokens)}
    return out | {"no tomorrow": call(**tokens | {"gamma": 0.0})}


def steps_of(module, case):
    how = {k: case[k] for k in ("group", "trajectory", "step", "anchor", "valid", "penalty")} | {"num_groups": GROUPS}
    out = {name: module.group_in_group(case["reward"], **how, **options) for name, options in GIGPO.items()}
    back = functools.partial(module.discounted_return, case["reward"], case["trajectory"], case["step"])
    parts = {"episode": case["reward"], "step": case["penalty"]}
    figures = {k: case[k] for k in ("group", "anchor", "valid")}
    out |= module.step_metrics(parts, **figures)
    return out | {"return": back(gamma=0.75, valid=case["valid"])}


def tokens_of(module, case):
    """Every loss of tokens: {name: (number or array, metrics)}."""
    mask, logp, out = case["mask"], case["logp"], {}
    for name, (options, advantage, weight) in SURROGATES.items():
        weight = None if weight is None else case[weight]
        out[name] = module.policy_gradient(logp, case["old_logp"], case[advantage], mask, weight=weight, **options)
    for kind in ("k1", "k2", "k3"):
        out[kind] = module.kl_estimate(logp, case["ref_logp"], mask, kind=kind), {}
    for name, options in WEIGHTS.items():
        out[f"weight {name}"] = module.importance_weight(logp, case["old_logp"], mask, **options)
    constant = module.negative_log_likelihood(logp, mask, aggregate="constant", max_length=7, denominator=5)
    out["constant"] = (constant if module is oracles else constant[0]), {}
    likelihood = module.negative_log_likelihood(logp, mask)
    out["likelihood"] = (likelihood if module is oracles else likelihood[0]), {}
    return out


def pairs_of(module, case):
    """Every loss of pairs and of labels, and the two scores of responses that they take."""
    logp, mask = case["logp"], case["mask"]
    out = {"sum": module.sequence_logratio(logp, case["ref_logp"], mask), "mean": module.sequence_mean(logp, mask)}
    for name, (function, options) in PAIRED.items():
        out[name] = getattr(module, function)(case["real"], case["generated"], valid=case["valid"], **options)
    labels = functools.partial(module.kto, case["logratio"], case["desirable"], valid=case["valid"])
    out["kto"] = labels()
    others = {"kl_logratio": case["kl_logratio"], "kl_valid": case["kl_valid"], "denominator": 5}
    return out | {"kto, options": labels(beta=0.4, weight_desirable=1.5, weight_undesirable=0.5, **others)}


def compare(got, want):
    assert set(got) == set(want)
    for name, values in want.items():
        for g, w in zip(jax.tree.leaves(got[name]), jax.tree.leaves(values), strict=True):
            np.testing.assert_allclose(g, w, 1e-11, 1e-11, err_msg=name)


def hidden(case, live, names):
    """The case with NaN in those fields of rows where it is not live."""
    return case | {k: np.where(live if np.ndim(case[k]) == 1 else live[:, None], case[k], np.nan) for k in names}


def without(case, *names):
    """Those fields of tokens with NaN under the mask."""
    return {k: np.where(case["mask"], case[k], np.nan) for k in names}


def advantages_agree(function, cases):
    """With NaN in what is not valid, and in the last case in its first valid row."""
    program = jax.jit(functools.partial(function, advantages))
    for k, case in enumerate(cases):
        case = hidden(case, case["valid"], [x for x in ("reward", "terms", "weight", "penalty") if x in case])
        if k == len(cases) - 1:
            case["reward"][np.flatnonzero(case["valid"])[:1]] = np.nan
        compare(program(jax.tree.map(jnp.asarray, case)), function(oracles, case))


def test_advantages_of_groups(x64):
    rng = np.random.default_rng(0)
    cases = [groups_case(rng) for _ in range(8)]
    advantages_agree(groups_of, cases)
    total = lambda r, g, v: jnp.sum(advantages.group_relative(r, g, num_groups=GROUPS, valid=v) ** 2)
    slope = jax.jit(jax.grad(total))
    for case in cases:
        assert np.all(np.isfinite(slope(case["reward"], case["group"], case["valid"])))


def test_advantages_of_tokens(x64):
    rng = np.random.default_rng(0)
    cases = [groups_case(rng) for _ in range(8)]
    cases[5]["valid"][:] = False
    cases[6]["reward"][:] = 0.1
    advantages_agree(whitened_of, cases)
    call = functools.partial(advantages.reinforce_pp, group=cases[0]["group"], num_groups=GROUPS)
    total = lambda reward, mask: jnp.sum(jnp.sin(jnp.arange(mask.size).reshape(mask.shape)) * call(reward, mask=mask))
    slope = jax.jit(jax.grad(total))
    for case in cases[4:]:
        live = case["mask"] & case["valid"][:, None]
        assert np.any(slope(case["reward"], live)) == (len(np.unique(case["reward"][live.any(axis=1)])) > 1)


def test_advantages_of_steps(x64):
    rng = np.random.default_rng(0)
    cases = [oracles.random_steps(rng, SAMPLES, GROUPS) for _ in range(8)]
    cases[5]["valid"][:] = False
    advantages_agree(steps_of, [{k: v for k, v in case.items() if np.ndim(v)} for case in cases])


def test_losses_of_tokens(x64):
    rng = np.random.default_rng(1)
    program = jax.jit(functools.partial(tokens_of, losses))
    for k in range(8):
        case = oracles.random_tokens(rng, 8, LENGTH)
        case["mask"] &= k != 7
        case["old_logp"][0, 0] = case["logp"][0, 0] - 20  # what is cut ends here: it does not count yet
        dirty = case | without(case, "logp", "old_logp", "ref_logp")
        compare(program(jax.tree.map(jnp.asarray, dirty)), tokens_of(oracles, case))


def test_losses_of_pairs(x64):
    rng = np.random.default_rng(2)
    program = jax.jit(functools.partial(pairs_of, losses))
    for k in range(8):
        case = oracles.random_pairs(rng, PAIRS) | oracles.random_tokens(rng, 8, LENGTH)
        case["valid"] &= k != 7
        case["kl_valid"] &= k != 6
        case["real"][0] = 7.5  # on the edge of max_logit
        dirty = hidden(case, case["valid"], ("real", "generated", "logratio"))
        dirty = hidden(dirty, case["kl_valid"], ("kl_logratio",)) | without(case, "logp", "ref_logp")
        compare(program(jax.tree.map(jnp.asarray, dirty)), pairs_of(oracles, case))


def test_log_probs(x64):
    """Values and gradients with all options at a small chunk, and of a vocabulary in slices; values without options."""
    states, head, a, b = test_logprobs.inputs()
    options = test_logprobs.OPTIONS["all"]

    @jax.jit
    def program(states, head):
        def loss(states, head, score, **chunk):
            logp, entropy = score(states, head, test_logprobs.NODE, **options, **chunk)
            return jnp.sum(a * logp + b * entropy), (logp, entropy)

        slope = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        mine, whole = test_logprobs.mine, test_logprobs.whole
        plain = mine(states, head), whole(states, head, test_logprobs.NODE)
        wanted, pull_whole = jax.vjp(functools.partial(whole, node=None), states, head)
        # Five columns each of three devices; the last two of the last are padding.
        slices = jnp.pad(head, ((0, 0), (0, 2)), constant_values=9.0).reshape(len(head), 3, 5).swapaxes(0, 1)
        across = functools.partial(mine, axis_name="tensor", vocab=test_logprobs.VOCAB)

        def of_slice(part):
            out, pull = jax.vjp(across, states, part)
            return out, pull((a / 3, b / 3))

        out, (by_states, by_slices) = jax.vmap(of_slice, axis_name="tensor")(slices)
        by_head = by_slices.swapaxes(0, 1).reshape(len(head), 15)
        # As under shard_map: each is handed a third of the cotangent, and finds its columns' part of the states'.
        cut = jax.tree.map(lambda x: x[0], out), jnp.sum(by_states, axis=0), by_head[:, :13], by_head[:, 13:]
        expected = wanted, *pull_whole((a, b)), jnp.zeros((len(head), 2))
        mine_all, whole_all = slope(states, head, mine, chunk=7), slope(states, head, whole)
        return (mine_all, plain[0], cut), (whole_all, plain[1], expected)

    test_logprobs.assert_near(*program(states, head), 1e-12)


def test_statistics_of_slices_join(x64):
    """Of a row whose target lies in the first, the second or no slice: as the whole row's, from whichever top."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)) * 3)
    target = jnp.array([[1], [7], [-1]])
    hot = jnp.arange(9)[None] == target
    parts = [statistics.of_logits(logits[:, cut], hot[:, cut]) for cut in (slice(0, 4), slice(4, 9))]
    for order in (parts, parts[::-1]):
        test_logprobs.assert_near(statistics.joined(*order), statistics.of_logits(logits, hot), 1e-14)


def test_bounds_are_allowed():
    """The values at which an option's range begins or ends; traced only."""
    x, row, ids, mask = jnp.zeros((3, 2)), jnp.zeros(3), jnp.zeros(3, int), jnp.ones((3, 2), bool)

    def call():
        for gamma in (0, 1):
            advantages.discounted_return(row, ids, ids, gamma=gamma)
            advantages.reinforce_pp(row, ids, mask=mask, num_groups=1, gamma=gamma)
        for cache in (1, 9):
            advantages.overlong_penalty(ids, max_length=9, cache=cache)
        for low, high in ((0, 0), (1, 3)):
            losses.policy_gradient(x, x, row, mask, clip_low=low, clip_high=high, aggregate="constant", max_length=1)
        losses.policy_gradient(x, x, row, mask, dual_clip=1.1)
        for floor in (0, 1):
            losses.importance_weight(x, x, mask, cap=1, floor=floor, beyond="mask")
        losses.spin(row, row, scale=0.1)
        losses.density_ratio(row, row, scale=0.1, max_logit=0.1)
        losses.density_ratio(row, row, link="hinge", shift=0.9)
        with pytest.warns(UserWarning, match="has no gradient on real responses until L < 0;"):
            losses.density_ratio(row, row, link="hinge", shift=1.0)
        losses.kto(row, mask[:, 0], beta=0.1)
        losses.simpo(row, row, beta=0.1)
        return losses.dpo(row, row, beta=0.1, label_smoothing=0.49)

    jax.eval_shape(call)
    assert advantages.anchor_ids(["a", "a"], [0, 0], similarity=1).tolist() == [0, 0]
