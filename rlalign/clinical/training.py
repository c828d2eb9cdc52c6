"""Group-relative reinforcement of who asks and diagnoses: everything from rollout to update in one program.

    params = init(config, asker, cases)
    params, _ = warm_up(config, asker, rules, shown, actions, params, pool=cases)    # imitation.py
    params, curve = reinforce(config, asker, rules, cases, params, posterior=posterior, weight=class_weights(counts))

Each of `patients` is played `samples` times. A decision's return is the discounted sum of what follows: confirmation
rewards and costs of tests, and at the end the diagnosis reward; its advantage is relative to the same patient's other
episodes at the same decision. Advantages and losses are rlalign.advantages' and rlalign.losses'.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlalign.advantages import group_relative, leave_one_out
from rlalign.clinical.asker import Asker, Episodes, Params, heads, rollout, states
from rlalign.clinical.choice import chosen, log_policy, rank_logps
from rlalign.clinical.inquiry import Cases, Posterior, Rules, learn, new_tests, take, truth
from rlalign.clinical.scores import abstained, confirmation, cross_entropy, diagnosis_reward, ehr_match
from rlalign.losses import policy_gradient
from rlalign.types import Array


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of both phases.

    Attributes:
      patients: of an update, drawn from all.
      samples: episodes of each of them.
      warm_up_steps: updates of the imitation.
      steps: updates of the reinforcement.
      learning_rate, warm_up_rate: Adam's at first; they fall to 0, by a line and by a cosine.
      advantage: "none" centres a group, "std" divides too, "leave_one_out" compares with the others.
      confirmation: what the confirmation reward counts; 0: nothing.
      gamma: its discount, and that of returns.
      places: k of the diagnosis reward, and places of the list that are drawn.
      penalty: lambda of the diagnosis reward.
      cost: of an order.
      abstain: the reward of giving no diagnosis.
      belief: weight of the belief's cross entropy.
      entropy: weight of the decisions' entropy.
      reject, draws: of rollout.
      seed: of everything drawn.
    """

    patients: int = 128
    samples: int = 8
    warm_up_steps: int = 600
    steps: int = 300
    learning_rate: float = 2e-4
    warm_up_rate: float = 2e-3
    advantage: Literal["none", "std", "leave_one_out"] = "none"
    confirmation: float = 0.3
    gamma: float = 0.95
    places: int = 1
    penalty: float = 0.1
    cost: float = 0.0
    abstain: float = 0.0
    belief: float = 1.0
    entropy: float = 0.003
    reject: bool = True
    draws: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.advantage not in ("none", "std", "leave_one_out"):
            raise ValueError(f"advantage is {self.advantage!r}: 'none', 'std' or 'leave_one_out'")
        if self.patients < 1 or self.samples < 2:
            raise ValueError(
                f"patients={self.patients} and samples={self.samples}: at least 1, and 2 to compare with each other"
            )


class Rewards(NamedTuple):
    """Of episodes.

    Attributes:
      step: f32[N, T], of each decision.
      diagnosis: f32[N], of the ranked list, or of abstaining; in `step` at the decision that ended the episode.
    """

    step: jax.Array
    diagnosis: jax.Array


def init(config: Training, asker: Asker, cases: Cases) -> Params:
    """Parameters that the seed names."""
    some = take(cases, slice(0, 2))
    return asker.init(jax.random.key(config.seed), some.given, some.column[:, :1])


def rewards_of(
    config: Training, rules: Rules, cases: Cases, played: Episodes, weight: Array, match: Array | None = None
) -> Rewards:
    """What each decision earned; see Rewards.

    Args:
      weight: f[C], of classes.
      match: f[N, K], what scores.ehr_match says of each test, in place of the potential; an order that brings several
        results earns their mean, one that brings none what a test that nobody ordered does.
    """
    orders = played.live & (played.action < rules.stop)
    if match is None:
        gained = confirmation(played.posterior, truth(cases), orders, gamma=config.gamma)
    else:
        gained = jnp.where(orders, _matched(rules, cases, played.action, match), 0)
    step = config.confirmation * gained - jnp.where(orders, config.cost, 0)
    found = diagnosis_reward(played.ranked, cases.gold, weight, k=config.places, penalty=config.penalty)
    found = abstained(found, played.abstains, config.abstain)
    return Rewards(step + jnp.where(played.live & ~orders, found[:, None], 0), found)


def _matched(rules: Rules, cases: Cases, action: Array, match: Array) -> jax.Array:
    """f[N, T]: the mean of f[N, K] over the new results of each order."""
    known, found = jnp.asarray(cases.told), []
    nothing = ehr_match(jnp.array(False), jnp.array(False), jnp.array(False))
    for t in range(action.shape[1]):
        tests = new_tests(rules, known, action[:, t])
        of, new = jnp.take_along_axis(match, jnp.maximum(tests, 0), axis=1), tests >= 0
        mean = jnp.sum(jnp.where(new, of, 0), axis=1) / jnp.maximum(jnp.sum(new, axis=1), 1)
        found.append(jnp.where(jnp.any(new, axis=1), mean, nothing))
        known = learn(known, tests)
    return jnp.stack(found, axis=1)


def returns(reward: Array, gamma: float) -> jax.Array:
    """G_t = sum_{s >= t} gamma^(s - t) r_s, f[N, T]."""
    place = jnp.arange(reward.shape[1])
    ahead = place[:, None] - place[None, :]
    return reward @ jnp.where(ahead >= 0, gamma ** jnp.maximum(ahead, 0), 0).astype(reward.dtype)


def advantages(config: Training, played: Episodes, rewards: Rewards) -> tuple[jax.Array, jax.Array]:
    """(f32[N, T + k], b[N, T + k]): of decisions and places of the list, and which of them were taken.

    Rows of one patient lie side by side, `samples` of them; a group is one patient at one decision.
    """
    count, decisions = rewards.step.shape
    places = played.rank_logp.shape[1]
    worth = jnp.concatenate(
        [returns(rewards.step, config.gamma), jnp.broadcast_to(rewards.diagnosis[:, None], (count, places))], axis=1
    )
    listed = jnp.broadcast_to(~played.abstains[:, None], (count, places))
    taken = jnp.concatenate([played.live, listed], axis=1)
    slots = decisions + places
    group = (jnp.arange(count) // config.samples)[:, None] * slots + jnp.arange(slots)[None, :]
    how = {"num_groups": count // config.samples * slots, "valid": taken.reshape(-1)}
    worth, group = worth.reshape(-1), group.reshape(-1)
    if config.advantage == "leave_one_out":
        away = leave_one_out(worth, group, **how)
    else:
        away = group_relative(worth, group, scale=config.advantage, **how)
    return away.reshape(taken.shape), taken


def _loss(params, config, asker, cases, played, advantage, taken):
    """Policy gradient of decisions and list, the belief's cross entropy, entropy."""
    known = states(asker, params, cases, played.column)
    said = heads(asker, params, known)
    count, decisions = played.action.shape
    flat = lambda x: x.reshape(count * decisions, x.shape[-1])
    logits, ok = flat(said.logits[:, :-1]), flat(played.allowed)
    log = log_policy(config.draws)(logits, ok)
    of_actions = chosen(log, played.action.reshape(-1)).reshape(count, decisions)
    of_places = rank_logps(said.ranking[:, -1], played.ranked[:, : played.rank_logp.shape[1]])
    old = jnp.concatenate([played.logp, played.rank_logp], axis=1)
    logp = jnp.concatenate([of_actions, of_places], axis=1)
    loss, metrics = policy_gradient(logp, old, advantage, taken, aggregate="token")
    p = jnp.where(ok, jnp.exp(log), 0)
    entropy = -jnp.sum(p * jnp.where(ok, log, 0), axis=1).reshape(count, decisions)
    entropy = jnp.sum(jnp.where(played.live, entropy, 0)) / jnp.sum(played.live)
    each = cross_entropy(truth(cases)[:, None, :], jax.nn.softmax(said.belief))
    ended = jnp.concatenate([played.live, jnp.ones((count, 1), bool)], axis=1)
    belief = jnp.sum(jnp.where(ended, each, 0)) / jnp.sum(ended)
    return loss + config.belief * belief - config.entropy * entropy, metrics | {"entropy": entropy, "belief": belief}


def reinforce(
    config: Training,
    asker: Asker,
    rules: Rules,
    cases: Cases,
    params: Params,
    *,
    weight: Array,
    posterior: Posterior | None = None,
    match: Array | None = None,
) -> tuple[Params, dict[str, np.ndarray]]:
    """`steps` updates from episodes of `cases`, in one program.

    Args:
      config: see Training.
      asker, params: the policy to begin with.
      rules, cases: the patients to learn from.
      weight: f[C], class_weights or ones.
      posterior: for the confirmation reward; None: the belief head.
      match: f[N, K], for the confirmation reward against the record (rewards_of), in its place.

    Returns:
      (params, {name: f32[steps]}): reward, diagnosis (its reward), found (share whose first place is right), orders,
      rejects, redundant, abstains, entropy, belief, and those of policy_gradient.
    """
    rate = optax.linear_schedule(config.learning_rate, 0.0, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    cases, weight = jax.tree.map(jnp.asarray, cases), jnp.asarray(weight, jnp.float32)
    match = None if match is None else jnp.asarray(match, jnp.float32)

    def update(carry, step):
        params, moments = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed + 1), step))
        drawn = jax.random.choice(keys[0], len(cases.column), (config.patients,), replace=False)
        index = jnp.repeat(drawn, config.samples)
        batch = take(cases, index)
        how = {"places": config.places, "reject": config.reject, "draws": config.draws}
        played = rollout(asker, params, rules, batch, keys[1], posterior=posterior, **how)
        rewards = rewards_of(config, rules, batch, played, weight, None if match is None else match[index])
        advantage, taken = advantages(config, played, rewards)
        slope, metrics = jax.grad(_loss, has_aux=True)(params, config, asker, batch, played, advantage, taken)
        change, moments = optimizer.update(slope, moments, params)
        params = optax.apply_updates(params, change)
        return (params, moments), metrics | figures(rules, batch, played, rewards)

    @jax.jit
    def run(params):
        return jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(config.steps))

    (params, _), curve = run(params)
    return params, {name: np.asarray(values) for name, values in curve.items()}


def figures(rules: Rules, cases: Cases, played: Episodes, rewards: Rewards) -> dict[str, jax.Array]:
    """Means of episodes, by name; see reinforce."""
    orders = played.live & (played.action < rules.stop)
    right = jnp.take_along_axis(cases.gold, played.ranked[:, :1], axis=1)[:, 0] & ~played.abstains
    per_decision = lambda x: jnp.sum(jnp.where(played.live, x, 0)) / jnp.sum(played.live)
    return {
        "reward": jnp.mean(jnp.sum(jnp.where(played.live, rewards.step, 0), axis=1)),
        "diagnosis": jnp.mean(rewards.diagnosis),
        "found": jnp.mean(right),
        "orders": jnp.mean(jnp.sum(orders, axis=1)),
        "rejects": per_decision(played.rejects),
        "redundant": jnp.sum(played.redundant) / jnp.maximum(jnp.sum(orders), 1),
        "abstains": jnp.mean(played.abstains),
    }
