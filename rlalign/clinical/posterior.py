"""What is known of embedded patients with one disease, exactly: the Bayes ceiling, and the test that tells most.

    P(d | symptoms, labels) ~ P(d | age, sex) P(symptoms | d)
                              sum_s P(s) prod_panels sum_u P(u) prod_{tests of the panel} P(label | d, s, u)

Severity s and each panel's factor u are summed out, both exactly, as the factors take seven values (generator.py). A
result that is missing tells nothing.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.clinical import diseases, generator
from rlalign.clinical.healthy import CODES
from rlalign.clinical.inquiry import Cases, Rules, columns_of
from rlalign.clinical.loinc import PANELS
from rlalign.types import Array

CHUNK = 64  # patients whose gains are found at a time
LEAST = 1e-12


class Evidence(NamedTuple):
    """What is known of N patients; logs.

    Attributes:
      base: f32[N, D], of age, sex and symptoms.
      panel: f32[N, B, D, S, U], of the labels of each panel.
      sums: f32[N, B, D, S], the same with the factor summed out.
    """

    base: jax.Array
    panel: jax.Array
    sums: jax.Array


class Exact:
    """A rlalign.clinical.inquiry.Posterior for `draw_patients(several=False)`.

    Args:
      rules: whose actions `gain` is about; the tests of each lie in one panel.

    Raises:
      ValueError: an action with tests of two panels.
    """

    def __init__(self, rules: Rules):
        for row in np.asarray(rules.members):
            if len(set(generator.PANEL[row[row >= 0]])) != 1:
                raise ValueError(f"an action has tests {row[row >= 0].tolist()}, which do not lie in one panel")
        self._rules = rules
        self._panel = generator.PANEL[np.asarray(rules.members)[:, 0]]  # of each action
        outcomes = [_labels(row[row >= 0].tolist()) for row in np.asarray(rules.members)]
        self._largest = int(np.argmax([math.prod(map(len, labels)) for labels in outcomes]))
        chances = np.stack([generator.chances_of_labels(c) for c in range(generator.CONTEXTS)])
        self._table = np.log(np.maximum(chances, LEAST)).astype(np.float32)  # [contexts, K, 4, D, S, U]
        self._prior = np.log(generator.tables().prior)
        self._severity = np.log(generator.SEVERITY_SHARE).astype(np.float32)[None, None]
        self._node = np.log(generator.NODE_SHARE).astype(np.float32)[None, None, None]

    def start(self, cases: Cases) -> Evidence:
        """Age, sex and symptoms: `given` of cases_of."""
        first = 2 + len(generator.BANDS) - 1
        symptom = jnp.asarray(cases.given)[:, first : first + len(diseases.SYMPTOMS)] > 0.5
        p = jnp.asarray(generator.tables().symptom, jnp.float32)
        each = jnp.where(symptom[:, None], jnp.log(p)[None], jnp.log1p(-p)[None]).sum(axis=2)
        felt = jnp.log(1 - generator.NO_SYMPTOMS) + each
        nothing = jnp.where(jnp.any(symptom, axis=1), -jnp.inf, jnp.log(generator.NO_SYMPTOMS))[:, None]
        base = jnp.asarray(self._prior, jnp.float32)[cases.context] + jnp.logaddexp(felt, nothing)
        shape = (len(cases.column), len(PANELS), *self._table.shape[3:])
        return Evidence(base, jnp.zeros(shape), jnp.zeros(shape[:-1]))

    def learn(self, state: Evidence, cases: Cases, tests: Array) -> Evidence:
        """The labels of tests of one panel a patient."""
        column = columns_of(cases, tests)
        known = column >= 0
        table = jnp.asarray(self._table).reshape(generator.CONTEXTS, -1, *self._table.shape[3:])
        rows = table[jnp.asarray(cases.context)[:, None], jnp.maximum(column, 0)]
        news = jnp.sum(jnp.where(known[:, :, None, None, None], rows, 0), axis=1)
        panel = jnp.asarray(generator.PANEL)[jnp.maximum(jnp.max(tests, axis=1), 0)]
        at = jnp.arange(len(panel)), panel
        now = state.panel[at] + news
        sums = jax.nn.logsumexp(now + self._node, axis=-1)
        return Evidence(state.base, state.panel.at[at].set(now), state.sums.at[at].set(sums))

    def probabilities(self, state: Evidence) -> jax.Array:
        """f32[N, D]."""
        return jax.nn.softmax(jax.nn.logsumexp(self._joint(state), axis=2), axis=1)

    def gain(self, state: Evidence, cases: Cases) -> np.ndarray:
        """f32[N, A], nats; exact. A panel of which a test is known counts 0: what is left of it is asked test by test.

        Patients of one age band and sex go together; those who have had the panel with the most outcomes go without it.
        """
        out = np.zeros((len(cases.column), self._rules.stop), np.float32)
        done = np.asarray(jnp.any(state.panel != 0, axis=(2, 3, 4)))
        of = 2 * np.asarray(cases.context) + done[:, self._panel[self._largest]]
        for kind in np.unique(of):
            who = np.flatnonzero(of == kind)
            for start in range(0, len(who), CHUNK):
                index = who[start : start + CHUNK]
                padded = np.resize(index, CHUNK)
                part = jax.tree.map(lambda x, padded=padded: x[padded], state)
                gains = self._gains(part, self._table[kind // 2], bool(kind % 2))
                out[index] = np.asarray(gains)[: len(index)]
        several = (np.asarray(self._rules.members) >= 0).sum(axis=1) > 1
        return np.where(done[:, self._panel] & several[None], 0, out)

    def _joint(self, state: Evidence) -> jax.Array:
        """f32[N, D, S], log P(disease, severity, all that is known)."""
        return state.base[:, :, None] + self._severity + jnp.sum(state.sums, axis=1)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def _gains(self, state: Evidence, table: Array, without_largest: bool) -> jax.Array:
        joint = self._joint(state)
        joint = jax.nn.softmax(joint.reshape(len(joint), -1), axis=1).reshape(joint.shape)
        before = _entropy(jnp.sum(joint, axis=2))
        factor = jax.nn.softmax(state.panel + self._node[None], axis=-1)
        chance = jnp.exp(table)
        gains = []
        for action, row in enumerate(np.asarray(self._rules.members)):
            if without_largest and action == self._largest:
                gains.append(jnp.zeros_like(before))
                continue
            weight = joint[..., None] * factor[:, self._panel[action]]
            weight = weight.reshape(*weight.shape[:2], -1)
            both = jnp.einsum("ndm,xdm->nxd", weight, _outcomes(chance, row[row >= 0].tolist()))
            gains.append(before - jnp.sum(_entropy(both), axis=1) + _entropy(jnp.sum(both, axis=2)))
        return jnp.stack(gains, axis=1)


def _outcomes(chance: jax.Array, tests: list[int]) -> jax.Array:
    """f32[X, D, S U]: P(all labels of these tests | disease, severity, factor), of each combination."""
    out = jnp.ones((1, *chance.shape[2:]))
    for k, possible in zip(tests, _labels(tests), strict=True):
        out = (out[:, None] * chance[k, jnp.array(possible)][None]).reshape(-1, *out.shape[1:])
    return out.reshape(*out.shape[:2], -1)


def _labels(tests: list[int]) -> list[list[int]]:
    """The labels that each test can have."""
    of = generator.tables()
    return [_possible(of.low[:, k], of.high[:, k]) for k in tests]


def _possible(low: np.ndarray, high: np.ndarray) -> list[int]:
    """The labels that a test can have."""
    found = [generator.NORMAL]
    if np.isfinite(low).any():
        found.append(generator.LOW)
    if np.isfinite(high).any():
        found.append(generator.HIGH)
    return found


def _entropy(p: jax.Array) -> jax.Array:
    """-sum p ln p over the last axis."""
    return -jnp.sum(p * jnp.log(jnp.maximum(p, LEAST)), axis=-1)


def action_names(rules: Rules) -> tuple[str, ...]:
    """Of each action of generator.rules: the panel's, or the test's LOINC code; then "stop" and "abstain"."""
    names = []
    for row in np.asarray(rules.members):
        tests = row[row >= 0]
        whole = (generator.PANEL[tests[0]] == generator.PANEL).sum() == len(tests)
        names.append(list(PANELS)[generator.PANEL[tests[0]]] if whole else CODES[tests[0]])
    return (*names, "stop", "abstain")
