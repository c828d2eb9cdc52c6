"""What a trained policy is measured beside: who asks at random, what is asked most, or what tells most.

    asked = play(rules, cases, posterior, "information gain", seed=0)
    asked.posterior[:, 3]                                       # after three orders

All of them diagnose by the posterior that they are given, so they differ by what they ask alone. Prior: the diagnoses
by how common they are, or, after 0 orders, by what is given. Ceiling: the posterior after every test there is.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.clinical.inquiry import Cases, Posterior, Rules, allowed, learn, new_tests

ASKERS = ("information gain", "random", "frequency")


class Asked(NamedTuple):
    """What was asked of patients.

    Attributes:
      action: i32[N, T].
      posterior: f32[N, T + 1, C], before the first order and after each.
    """

    action: np.ndarray
    posterior: np.ndarray


def play(
    rules: Rules,
    cases: Cases,
    posterior: Posterior,
    asker: Literal["information gain", "random", "frequency"],
    *,
    seed: int,
    frequency: np.ndarray | None = None,
    orders: int | None = None,
) -> Asked:
    """Ask until the horizon, always something that is not known yet.

    Args:
      rules, cases: see rlalign.clinical.inquiry.
      posterior: of the diagnoses.
      asker: of ASKERS.
      seed: of the random asker, and of ties.
      frequency: f[A], how often each action is ordered on record; for the asker of that name.
      orders: how many; None: the horizon.

    Raises:
      ValueError: no such asker, or no frequencies for it.
    """
    if asker not in ASKERS or (asker == "frequency") != (frequency is not None):
        raise ValueError(f"asker is {asker!r}: one of {', '.join(ASKERS)}, the last one with frequency=f[A]")
    rng = np.random.default_rng(seed)
    state, known = posterior.start(cases), jnp.asarray(cases.told)
    actions, seen = [], [np.asarray(posterior.probabilities(state))]
    learned = jax.jit(posterior.learn)
    for _ in range(rules.horizon if orders is None else orders):
        left = np.asarray(allowed(rules, known))[:, : rules.stop]
        score = rng.random(left.shape)
        if asker == "information gain":
            score = posterior.gain(state, cases) + 1e-9 * score
        elif frequency is not None:
            score = frequency[None, :] + 1e-9 * score
        action = np.where(left.any(axis=1), np.where(left, score, -np.inf).argmax(axis=1), rules.stop)
        tests = new_tests(rules, known, jnp.asarray(action, jnp.int32))
        state, known = learned(state, cases, tests), learn(known, tests)
        actions.append(action.astype(np.int32))
        seen.append(np.asarray(posterior.probabilities(state)))
    return Asked(np.stack(actions, axis=1), np.stack(seen, axis=1))


def ceiling(cases: Cases, posterior: Posterior) -> np.ndarray:
    """f32[N, C]: the posterior after every test there is."""
    every = jnp.where(cases.told, -1, jnp.arange(cases.column.shape[1], dtype=jnp.int32)[None, :])
    state = posterior.start(cases)
    learned = jax.jit(posterior.learn)
    for k in range(every.shape[1]):
        state = learned(state, cases, every[:, k : k + 1])
    return np.asarray(posterior.probabilities(state))


def ranking(p: np.ndarray) -> np.ndarray:
    """i32[..., C]: classes by their probability; ties by their number."""
    return np.argsort(-p, axis=-1, kind="stable").astype(np.int32)
