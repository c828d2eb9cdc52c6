"""A policy that asks for tests and diagnoses, as a small network over what is known, and its episodes on the device.

What is known is a sum: a row for what is given at first, and a row for each result. From it three heads read

    logits   f[.., A + 2]  the next action: a test or panel, STOP, ABSTAIN
    belief   f[.., C]      P(diagnosis), fitted by cross entropy
    ranking  f[.., C]      the belief, which it takes as it is, and what reinforcement adds to it

so that the diagnosis itself is an action: `ranking` is sampled, and a class-sensitive reward moves it.
"""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlalign.clinical.choice import draw, rank
from rlalign.clinical.inquiry import (
    Cases,
    Posterior,
    Rules,
    allowed,
    columns_of,
    learn,
    new_tests,
    redundant,
)
from rlalign.types import Array

Params = Any


class Heads(NamedTuple):
    """What the network says of states; see the module."""

    logits: jax.Array
    belief: jax.Array
    ranking: jax.Array


class Episodes(NamedTuple):
    """Dialogues of N patients, T = horizon + 1 decisions and k places of the ranked list.

    Attributes:
      action: i32[N, T].
      logp: f32[N, T], of the distribution that acted.
      allowed: b[N, T, A + 2], what the choice was among.
      live: b[N, T], before the episode had ended.
      column: i32[N, T, P], the results that each decision brought, -1 for none.
      ranked: i32[N, C], the first k drawn.
      rank_logp: f32[N, k].
      abstains: b[N].
      rejects: f32[N, T]; see choice.Draw.
      redundant: b[N, T], orders that brought nothing new.
      posterior: f32[N, T + 1, C] of what was known before each decision and after the last; of the belief head where no
        posterior was given.
    """

    action: jax.Array
    logp: jax.Array
    allowed: jax.Array
    live: jax.Array
    column: jax.Array
    ranked: jax.Array
    rank_logp: jax.Array
    abstains: jax.Array
    rejects: jax.Array
    redundant: jax.Array
    posterior: jax.Array


class Asker(nn.Module):
    """The network.

    Attributes:
      columns: Q, results of all tests.
      actions: A + 2.
      classes: C.
      width: of its layers.
    """

    columns: int
    actions: int
    classes: int
    width: int = 128

    def setup(self):
        small = nn.initializers.normal(0.05)
        self.first, self.results = nn.Dense(self.width), nn.Embed(self.columns, self.width, embedding_init=small)
        self.shown, self.evidence = nn.Dense(self.classes), nn.Embed(self.columns, self.classes, embedding_init=small)
        self.middle, self.believed = nn.Dense(self.width), nn.Dense(self.classes, kernel_init=nn.initializers.zeros)
        self.asking, self.act = nn.Dense(self.width), nn.Dense(self.actions, kernel_init=small)
        self.moved = nn.Dense(self.classes, kernel_init=nn.initializers.zeros)

    def given(self, given: jax.Array, told: jax.Array) -> jax.Array:
        """f32[N, width + C]: the row of what is given at first, f32[N, F], and of what is told, 0 or 1 f32[N, Q]."""
        hidden = self.first(given) + told @ self.results.embedding
        return jnp.concatenate([hidden, self.shown(given) + told @ self.evidence.embedding], axis=-1)

    def result(self, column: jax.Array) -> jax.Array:
        """f32[..., width + C]: the sum of the rows of results, i32[..., P]; -1 counts nothing."""
        at = jnp.maximum(column, 0)
        rows = jnp.concatenate([self.results(at), self.evidence(at)], axis=-1)
        return jnp.sum(jnp.where((column >= 0)[..., None], rows, 0), axis=-2)

    def heads(self, known: jax.Array) -> Heads:
        """Heads of sums f32[..., width + C]. The belief is linear in what is known, as naive Bayes is, and a rest."""
        h, evidence = nn.gelu(known[..., : self.width]), known[..., self.width :]
        h = h + nn.gelu(self.middle(h))
        belief = evidence + self.believed(h)
        sure = jax.lax.stop_gradient(nn.log_softmax(belief))
        asks = nn.gelu(self.asking(jnp.concatenate([h, jnp.exp(sure), sure / 10], axis=-1)))
        return Heads(self.act(asks), belief, sure + self.moved(h))

    def __call__(self, given: jax.Array, column: jax.Array) -> Heads:
        """Heads of what is given and of results, i32[N, P]."""
        none = jnp.zeros((len(given), self.columns), jnp.float32)
        return self.heads(self.given(given, none) + self.result(column))


def network(rules: Rules, cases: Cases, width: int = 128) -> Asker:
    """The network for these rules and patients."""
    return Asker(rules.columns, rules.actions, cases.gold.shape[1], width)


def heads(asker: Asker, params: Params, known: jax.Array) -> Heads:
    """Asker.heads with parameters."""
    return cast(Heads, asker.apply(params, known, method="heads"))


def result(asker: Asker, params: Params, column: jax.Array) -> jax.Array:
    """Asker.result with parameters."""
    return cast(jax.Array, asker.apply(params, column, method="result"))


def begin(asker: Asker, params: Params, cases: Cases) -> jax.Array:
    """f32[N, width + C]: what is known before anything is asked."""
    count, tests = cases.told.shape
    at = jnp.where(cases.told, cases.column, asker.columns)
    rows = jnp.broadcast_to(jnp.arange(count)[:, None], (count, tests))
    told = jnp.zeros((count, asker.columns), jnp.float32).at[rows, at].set(1, mode="drop")
    return cast(jax.Array, asker.apply(params, cases.given, told, method="given"))


def rollout(
    asker: Asker,
    params: Params,
    rules: Rules,
    cases: Cases,
    key: jax.Array,
    *,
    places: int = 1,
    posterior: Posterior | None = None,
    reject: bool = True,
    on_record: bool = True,
    draws: int | None = None,
    greedy: bool = False,
    forced: bool = False,
) -> Episodes:
    """Play an episode of each patient; one program, no host round trips.

    Args:
      asker, params: the policy.
      rules, cases: see rlalign.clinical.inquiry.
      key: of jax.random.
      places: k, how many places of the ranked list are drawn.
      posterior: whose probabilities the confirmation reward sees; None: those of the belief head.
      reject: False allows orders that bring nothing, which cost their turn.
      on_record: reject also what has no result on record, as in training.
      draws: M of the form with M draws; None: exact.
      greedy: the likeliest action and ranking; logp and rank_logp are then of no use.
      forced: tests until the horizon, then a diagnosis: for comparisons at equal budgets.
    """
    state = None if posterior is None else posterior.start(cases)
    final = jnp.arange(rules.actions) >= rules.stop

    def choose(key, logits, known, t):
        ok = allowed(rules, known, recorded=cases.recorded if on_record else None, asked=t)
        if not reject:
            ok = jnp.broadcast_to(final[None, :] | (t < rules.horizon), ok.shape)
        if forced:
            some = jnp.any(ok & ~final[None, :], axis=1, keepdims=True)
            ok = jnp.where(some, ok & ~final[None, :], jnp.arange(rules.actions)[None, :] == rules.stop)
        drawn = draw(key, logits, ok, draws=draws)
        best = jnp.argmax(jnp.where(ok, logits, -jnp.inf), axis=1).astype(jnp.int32)
        return ok, drawn._replace(action=best) if greedy else drawn

    def step(carry, t):
        bag, known, live, state = carry
        said = heads(asker, params, bag)
        p = jax.nn.softmax(said.belief) if posterior is None else posterior.probabilities(state)
        ok, drawn = choose(jax.random.fold_in(key, t), said.logits, known, t)
        tests = jnp.where(live[:, None], new_tests(rules, known, drawn.action), -1)
        column = columns_of(cases, tests)
        waste = live & redundant(rules, known, drawn.action)
        if posterior is not None:
            state = posterior.learn(state, cases, tests)
        known = learn(known, tests)
        out = drawn.action, drawn.logp, ok, live, column, drawn.rejects, waste, p
        return (bag + result(asker, params, column), known, live & (drawn.action < rules.stop), state), out

    start = begin(asker, params, cases), jnp.asarray(cases.told), jnp.ones(len(cases.column), bool), state
    (bag, _, _, state), out = jax.lax.scan(step, start, jnp.arange(rules.horizon + 1))
    action, logp, ok, live, column, rejects, waste, p = (jnp.swapaxes(x, 0, 1) for x in out)
    said = heads(asker, params, bag)
    last = jax.nn.softmax(said.belief) if posterior is None else posterior.probabilities(state)
    ranked, rank_logp = rank(jax.random.fold_in(key, rules.horizon + 1), said.ranking, places)
    if greedy:
        ranked = jnp.argsort(-said.ranking, axis=-1).astype(jnp.int32)
    abstains = jnp.any(live & (action == rules.stop + 1), axis=1)
    p = jnp.concatenate([p, last[:, None]], axis=1)
    return Episodes(action, logp, ok, live, column, ranked, rank_logp, abstains, rejects, waste, p)


def states(asker: Asker, params: Params, cases: Cases, column: jax.Array) -> jax.Array:
    """f32[N, T + 1, width + C]: what was known before each decision and after the last, of results i32[N, T, P]."""
    start = begin(asker, params, cases)[:, None]
    return jnp.concatenate([start, start + jnp.cumsum(result(asker, params, column), axis=1)], axis=1)


def diagnose(asker: Asker, params: Params, cases: Cases, column: Array) -> tuple[np.ndarray, np.ndarray]:
    """(ranking, belief) f32[N, T + 1, C], logits and probabilities, before each decision of results i32[N, T, P]."""

    @jax.jit
    def run(cases, column):
        said = heads(asker, params, states(asker, params, cases, column))
        return said.ranking, jax.nn.softmax(said.belief)

    ranking, belief = run(jax.tree.map(jnp.asarray, cases), jnp.asarray(column))
    return np.asarray(ranking), np.asarray(belief)
