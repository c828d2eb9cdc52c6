"""How well a policy asks and diagnoses held-out patients, at every budget of orders and by its own choice of when."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.clinical.asker import Asker, Params, diagnose, rollout
from rlalign.clinical.inquiry import Cases, Rules
from rlalign.clinical.scores import calibration, recalls


class Stopped(NamedTuple):
    """Episodes that end when the policy says so.

    Attributes:
      action: i32[N, T], orders; -1 after the end.
      ranked: i32[N, C], the list at the end.
      belief: f32[N, C], probabilities then.
      abstains: b[N].
      rejects: f32[N], candidates that reject sampling turned down, of all orders.
    """

    action: np.ndarray
    ranked: np.ndarray
    belief: np.ndarray
    abstains: np.ndarray
    rejects: np.ndarray


class Trial(NamedTuple):
    """What a policy did with held-out patients; rows of the last axis are classes.

    Attributes:
      ranked: i32[N, T, C], its list after 0, 1, .. T - 1 orders, tests asked until the horizon.
      belief: f32[N, T, C], probabilities at the same moments.
      action: i32[N, T], of those orders.
      own: {name: number} of episodes that end when the policy says so: orders, rejects, redundant, abstains, found.
      stopped: those episodes.
    """

    ranked: np.ndarray
    belief: np.ndarray
    action: np.ndarray
    own: dict[str, float]
    stopped: Stopped


def trial(asker: Asker, params: Params, rules: Rules, cases: Cases, *, reject: bool = True, seed: int = 0) -> Trial:
    """Let a policy ask, its likeliest action each time; nothing tells it which results are on record.

    Args:
      asker, params: the policy.
      rules, cases: see rlalign.clinical.inquiry.
      reject: as it was trained.
      seed: of nothing that a greedy policy does, and of the candidates that are counted as rejected.
    """
    cases = jax.tree.map(jnp.asarray, cases)

    def play(forced: bool):
        how: dict[str, Any] = {"greedy": True, "on_record": False, "reject": reject, "forced": forced}
        return jax.jit(lambda cases: rollout(asker, params, rules, cases, jax.random.key(seed), **how))(cases)

    forced, own = play(True), play(False)
    ranking, belief = diagnose(asker, params, cases, forced.column[:, : rules.horizon])
    orders = own.live & (own.action < rules.stop)
    right = jnp.take_along_axis(cases.gold, own.ranked[:, :1], axis=1)[:, 0] & ~own.abstains
    figures = {
        "orders": jnp.mean(jnp.sum(orders, axis=1)),
        "rejects": jnp.sum(jnp.where(orders, own.rejects, 0)) / jnp.maximum(jnp.sum(orders), 1),
        "redundant": jnp.sum(own.redundant) / jnp.maximum(jnp.sum(orders), 1),
        "abstains": jnp.mean(own.abstains),
        "found": jnp.mean(right),
    }
    ranked = np.argsort(-ranking, axis=-1, kind="stable").astype(np.int32)
    stopped = Stopped(
        np.where(orders, own.action, -1),
        np.asarray(own.ranked),
        np.asarray(own.posterior[:, -1]),
        np.asarray(own.abstains),
        np.asarray(jnp.sum(jnp.where(orders, own.rejects, 0), axis=1)),
    )
    return Trial(ranked, belief, np.asarray(forced.action), {name: float(x) for name, x in figures.items()}, stopped)


def report(ranked: np.ndarray, gold: np.ndarray, belief: np.ndarray | None = None) -> dict[str, float]:
    """Recall@1 and @5, micro and macro, that of the rarest third of the classes that occur, and calibration.

    Args:
      ranked: i32[N, C].
      gold: b[N, C].
      belief: f32[N, C]; None leaves calibration out.
    """
    out, lists, gold_ = {}, jnp.asarray(ranked), jnp.asarray(gold)
    count = np.asarray(gold).sum(axis=0)
    rare = [c for c in np.argsort(count, kind="stable") if count[c]]
    rare = rare[: max(len(rare) // 3, 1)]
    for k in (1, 5):
        found = recalls(lists, gold_, k)
        out |= {f"recall@{k}": float(found.micro), f"macro recall@{k}": float(found.macro)}
        out[f"rare recall@{k}"] = float(np.asarray(found.by_class)[rare].mean())
    if belief is not None:
        of = calibration(jnp.asarray(belief), gold_)
        out |= {"calibration error": float(of.error), "brier": float(of.brier)}
    return out
