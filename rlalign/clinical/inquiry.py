"""Asking for tests as arrays: which tests an action brings, which actions are left, what is learned from them.

    rules = Rules(members=..., columns=..., horizon=8)         # actions: tests and panels, then STOP, then ABSTAIN
    known = cases.told
    tests = new_tests(rules, known, action)                     # i32[N, P]: the new ones, -1 for none
    known = learn(known, tests)

Many patients go side by side, and nothing here leaves the device. What a patient shows at first is `given`; the result
of a test is one of `columns` numbers, so that everything known is a sum over rows of a table (`column`). Which tests
were ordered on record is no part of what a policy sees: it would leak the diagnosis.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.checks import expect
from rlalign.types import Array

HORIZON = 8  # orders until a diagnosis is due


class Rules(NamedTuple):
    """What is the same for all patients.

    Attributes:
      members: i32[A, P], the tests that each action brings, -1 for none. Actions A and A + 1 are STOP, which gives the
        ranked list of diagnoses, and ABSTAIN.
      columns: Q, how many results there are, of all tests together.
      horizon: orders until only STOP and ABSTAIN are left.
    """

    members: Array
    columns: int
    horizon: int = HORIZON

    @property
    def stop(self) -> int:
        """The action that gives the ranked list."""
        return len(self.members)

    @property
    def actions(self) -> int:
        """How many there are: tests and panels, STOP and ABSTAIN."""
        return len(self.members) + 2


class Cases(NamedTuple):
    """Patients.

    Attributes:
      given: f32[N, F], who the patient is and what symptoms there are.
      column: i32[N, K], the result of each test, in [0, Q); one without a result on record has a column of its own.
      recorded: b[N, K], whether a test has a result on record.
      told: b[N, K], whose results are known before anything is asked.
      gold: b[N, C], the diagnoses.
      context: i32[N], what a posterior looks up by, such as sex and age band.
    """

    given: Array
    column: Array
    recorded: Array
    told: Array
    gold: Array
    context: Array


class Posterior(Protocol):
    """P(diagnosis | what is known), followed test by test, for many patients."""

    def start(self, cases: Cases) -> Any:
        """The state before anything is asked."""
        ...

    def learn(self, state: Any, cases: Cases, tests: Array) -> Any:
        """The state after the results of new tests, i32[N, P], -1 for none."""
        ...

    def probabilities(self, state: Any) -> jax.Array:
        """f[N, C]."""
        ...

    def gain(self, state: Any, cases: Cases) -> np.ndarray:
        """f[N, A]: the expected fall of the entropy of the diagnosis, in nats, by each action; on the host."""
        ...


def panels_of(groups: list[list[int]]) -> np.ndarray:
    """i32[A, P]: rows of tests, padded with -1.

    >>> panels_of([[3], [0, 1]]).tolist()
    [[3, -1], [0, 1]]
    """
    width = max(map(len, groups))
    return np.array([[*group, *[-1] * (width - len(group))] for group in groups], np.int32)


def told_tests(cases: Cases) -> jax.Array:
    """i32[N, K]: the tests whose results are known from the start, -1 for the others."""
    return jnp.where(cases.told, jnp.arange(cases.told.shape[1], dtype=jnp.int32)[None, :], -1)


def truth(cases: Cases) -> jax.Array:
    """f[N, C]: 1 / |gold| on each gold class."""
    return cases.gold / jnp.maximum(jnp.sum(cases.gold, axis=1, keepdims=True), 1)


def new_tests(rules: Rules, known: Array, action: Array) -> jax.Array:
    """i32[N, P]: the tests that an action adds to what is known, -1 for none; none for STOP and ABSTAIN."""
    expect(known=(known, "b[N, K]"), action=(action, "i[N]"))
    members = jnp.asarray(rules.members)
    tests = jnp.where((action < len(members))[:, None], members[jnp.minimum(action, len(members) - 1)], -1)
    seen = jnp.take_along_axis(known, jnp.maximum(tests, 0), axis=1)
    return jnp.where(seen, -1, tests)


def learn(known: Array, tests: Array) -> jax.Array:
    """b[N, K] after these tests, i32[N, P]."""
    expect(known=(known, "b[N, K]"), tests=(tests, "i[N, P]"))
    rows = jnp.arange(len(known))[:, None]
    return jnp.asarray(known).at[rows, jnp.where(tests < 0, known.shape[1], tests)].set(True, mode="drop")


def allowed(rules: Rules, known: Array, *, recorded: Array | None = None, asked: Array | int = 0) -> jax.Array:
    """The actions that reject sampling leaves.

    Rejected: a test that is known, a panel all of whose tests are, and, where `recorded` is given (in training), an
    action that would bring no result on record. STOP and ABSTAIN remain always, and alone once the horizon is reached
    or nothing else is left.

    Args:
      rules: see Rules.
      known: b[N, K].
      recorded: b[N, K], or None.
      asked: orders so far, i[N] or one number.

    Returns:
      b[N, A + 2].
    """
    expect(known=(known, "b[N, K]"), recorded=(recorded, "b[N, K]"))
    members = jnp.asarray(rules.members)
    fresh = ~known if recorded is None else ~known & recorded
    brings = jnp.any(fresh[:, jnp.maximum(members, 0)] & (members >= 0)[None], axis=2)
    brings = brings & jnp.broadcast_to(jnp.asarray(asked) < rules.horizon, len(known))[:, None]
    return jnp.concatenate([brings, jnp.ones((len(known), 2), bool)], axis=1)


def redundant(rules: Rules, known: Array, action: Array) -> jax.Array:
    """b[N]: an order whose results are all known."""
    return (action < rules.stop) & ~jnp.any(new_tests(rules, known, action) >= 0, axis=1)


def columns_of(cases: Cases, tests: Array) -> jax.Array:
    """i32[N, P]: the results of tests, -1 for none."""
    found = jnp.take_along_axis(cases.column, jnp.maximum(tests, 0), axis=1)
    return jnp.where(tests < 0, -1, found)


def take(cases: Cases, index: Any) -> Cases:
    """Some of the patients."""
    return Cases(*(x[index] for x in cases))
