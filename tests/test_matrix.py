"""The composition matrix: advantage x ratio x clip x aggregation x KL x importance correction, against the oracles.

The options are those of ALGORITHMS and of the functions. By default every pair of options meets in some cell; with
RLALIGN_MATRIX=all (make matrix) every cell runs.
"""

import functools
import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign import losses
from rlalign.algorithms import ALGORITHMS
from rlalign.losses.policy import CLIPS, RATIOS
from tests import oracles

SHAPE, CASES = (7, 3, 3), 6  # samples, response tokens, group ids
FLOATS = (
    "reward",
    "logp",
    "old_logp",
    "ref_logp",
    "behaviour",
    "baseline",
    "weight",
    "penalty",
    "terms",
    "token_reward",
)
IDS = ("group", "valid", "mask", "trajectory", "step", "anchor", "past")
ON_POLICY = {name: a for name, a in ALGORITHMS.items() if a.data == "rollouts"}


def first_of_each(keyed):
    """{name: key} without the names whose key came before."""
    seen = {}
    for name, key in keyed.items():
        seen.setdefault(key, name)
    return {name: key for key, name in seen.items()}


def clips():
    """What policy_gradient is given in ALGORITHMS but for the ratio, and every other kind of clip."""
    found = {}
    for algorithm in ON_POLICY.values():
        options = {k: v for k, v in algorithm.loss.keywords.items() if k != "ratio"}
        found.setdefault(json.dumps(options, sort_keys=True), options)
    found |= {clip: {"clip": clip} for clip in CLIPS if clip not in [o["clip"] for o in found.values()]}
    found["cispo, both sides"] = {"clip": "cispo"}
    return tuple(found.values())


def advantage_key(algorithm):
    function = functools.partial(algorithm.advantage)
    # ddof 1 and eps 1e-6 are the defaults, said or not.
    options = {
        k: v for k, v in function.keywords.items() if (k, v) not in (("ddof", 1), ("eps", 1e-6), ("scale", "std"))
    }
    return function.func.__name__, json.dumps(options, sort_keys=True), algorithm.needs, algorithm.optional


AXES = {
    "advantage": tuple(first_of_each({name: advantage_key(a) for name, a in ON_POLICY.items()})),
    "ratio": RATIOS,
    "clip": clips(),
    "aggregate": ("token", "sequence", "constant"),
    "kl": (None, "k1", "k2", "k3"),
    "correction": (
        None,
        {},
        {"beyond": "mask", "cap": 1.5, "floor": 0.5},
        {"level": "sequence"},
        {"level": "sequence", "beyond": "mask", "cap": 3.0},
    ),
}


def pairs_of(cell):
    return {(a, cell[a], b, cell[b]) for a, b in itertools.combinations(range(len(cell)), 2)}


def covering():
    """Cells (an index into each axis) in which every pair of options meets: the best of some random ones, each time."""
    sizes = [len(axis) for axis in AXES.values()]
    rng = np.random.default_rng(0)
    missing = set()
    for a, b in itertools.combinations(range(len(sizes)), 2):
        missing |= {(a, x, b, y) for x in range(sizes[a]) for y in range(sizes[b])}
    cells = []
    while missing:
        a, x, b, y = min(missing)
        tries = [[int(rng.integers(size)) for size in sizes] for _ in range(60)]
        for cell in tries:
            cell[a], cell[b] = x, y
        best = max(tries, key=lambda cell: len(pairs_of(cell) & missing))
        missing -= pairs_of(best)
        cells.append(tuple(best))
    return cells


CELLS = list(itertools.product(*(range(len(a)) for a in AXES.values())))
CHOSEN = CELLS if os.environ.get("RLALIGN_MATRIX") == "all" else covering()
PROGRAMS = sorted({cell[1:] for cell in CHOSEN})  # the advantage is an input of the others


def options_of(cell):
    return {name: axis[k] for (name, axis), k in zip(AXES.items(), cell, strict=True)}


@functools.cache
def cases():
    """Batches whose ratios are not cut, so that differences of the oracle are exact enough."""
    rng, made = np.random.default_rng(0), []
    while len(made) < CASES:
        case = oracles.random_case(rng, *SHAPE)
        near = all(np.abs((case["logp"] - case[k]).sum(axis=1)).max() < 6 for k in ("old_logp", "ref_logp"))
        if near and case["mask"].any():
            case["behaviour"] = case["old_logp"] + rng.normal(size=case["mask"].shape) * 0.4
            made.append(case)
    return made


@functools.cache
def arrays():
    stacked = oracles.stack([{k: c[k] for k in (*FLOATS, *IDS)} for c in cases()])
    return {k: jnp.asarray(v) for k, v in stacked.items()}


@functools.cache
def advantages(name):
    """Of all cases, by the library."""
    algorithm = ALGORITHMS[name]

    def one(case):
        more = {k: case[k] for k in (*algorithm.needs, *algorithm.optional)}
        out = algorithm.advantage(case["reward"], case["group"], num_groups=SHAPE[2], valid=case["valid"], **more)
        return out if out.ndim == 2 else jnp.broadcast_to(out[:, None], case["mask"].shape)

    return jax.jit(jax.vmap(one))(arrays())


@functools.cache
def program(cell):
    """Value and gradient by logp of everything but the advantage."""
    chosen = options_of((0, *cell))

    def one(logp, case, advantage):
        weight = None
        if chosen["correction"] is not None:
            args = case["old_logp"], case["behaviour"], case["mask"]
            weight, _ = losses.importance_weight(*args, **chosen["correction"])
        how = {"aggregate": chosen["aggregate"], "max_length": SHAPE[1]}
        args = logp, case["old_logp"], advantage, case["mask"]
        loss, _ = losses.policy_gradient(*args, weight=weight, ratio=chosen["ratio"], **chosen["clip"], **how)
        if chosen["kl"] is not None:
            kl = losses.kl_estimate(logp, case["ref_logp"], case["mask"], kind=chosen["kl"])
            loss += 0.1 * losses.aggregate_tokens(kl, case["mask"], chosen["aggregate"], max_length=SHAPE[1])
        return loss

    return jax.jit(jax.vmap(jax.value_and_grad(one)))


@functools.cache
def advantage_by_oracle(name, c):
    return oracles.ADVANTAGES[name](cases()[c])


def expected(cell, c, logp, at):
    chosen, case = options_of(cell), cases()[c]
    weight = None
    if chosen["correction"] is not None:
        args = case["old_logp"], case["behaviour"], case["mask"]
        weight, _ = oracles.importance_weight(*args, **chosen["correction"])
    return oracles.surrogate(
        case | {"logp": logp},
        advantage_by_oracle(chosen["advantage"], c),
        chosen["aggregate"],
        at,
        kl=0.0 if chosen["kl"] is None else 0.1,
        kind=chosen["kl"],
        max_length=SHAPE[1],
        weight=weight,
        ratio=chosen["ratio"],
        **chosen["clip"],
    )


def test_the_axes_are_those_of_the_registry_and_every_pair_meets():
    assert set(AXES["advantage"]) == set(oracles.ADVANTAGES)
    assert {options["clip"] for options in AXES["clip"]} == set(CLIPS)
    met = set().union(*(pairs_of(cell) for cell in covering()))
    assert met == set().union(*(pairs_of(cell) for cell in CELLS))
    assert len(covering()) <= 200


@pytest.mark.parametrize("cell", PROGRAMS, ids=lambda cell: "-".join(map(str, cell)))
def test_value_and_gradient_equal_the_oracle(x64, cell):
    for whole in [chosen for chosen in CHOSEN if chosen[1:] == cell]:
        name = AXES["advantage"][whole[0]]
        loss, slope = program(cell)(arrays()["logp"], arrays(), advantages(name))
        for c, case in enumerate(cases()):
            want = expected(whole, c, case["logp"], case["logp"])
            np.testing.assert_allclose(loss[c], want, rtol=1e-12, atol=1e-12, err_msg=str(options_of(whole)))
        c = sum(whole) % CASES  # one gradient a cell
        truth = lambda x, c=c, whole=whole: expected(whole, c, x, cases()[c]["logp"])
        want = oracles.numerical_gradient(truth, cases()[c]["logp"])
        np.testing.assert_allclose(slope[c], want, rtol=1e-5, atol=1e-7, err_msg=str(options_of(whole)))
