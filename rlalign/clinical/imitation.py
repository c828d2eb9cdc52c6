"""Supervised training of who asks and diagnoses: on what an expert asked, or on the best of its own dialogues.

params, _ = warm_up(config, asker, rules, shown, actions, params, pool=cases)    # actions of information gain
best, actions = dialogues_above(0.9, config, asker, rules, cases, params, weight=class_weights(counts))
params, _ = warm_up(config, asker, rules, best, actions, params, pool=cases)     # whole dialogues that went well
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlalign.clinical.asker import Asker, Params, heads, rollout, states
from rlalign.clinical.choice import keep_above
from rlalign.clinical.inquiry import Cases, Posterior, Rules, columns_of, learn, new_tests, take, truth
from rlalign.clinical.scores import cross_entropy
from rlalign.clinical.training import Training, rewards_of
from rlalign.types import Array


def expert_columns(rules: Rules, cases: Cases, action: Array) -> jax.Array:
    """i32[N, T, P]: the results that an expert's actions i32[N, T] brought."""
    known, found = jnp.asarray(cases.told), []
    for t in range(action.shape[1]):
        tests = new_tests(rules, known, action[:, t])
        found.append(columns_of(cases, tests))
        known = learn(known, tests)
    return jnp.stack(found, axis=1)


def warm_up(
    config: Training,
    asker: Asker,
    rules: Rules,
    cases: Cases,
    action: Array,
    params: Params,
    *,
    pool: Cases | None = None,
) -> tuple[Params, dict[str, np.ndarray]]:
    """SFT: the expert's actions, STOP after the last of them, and the diagnosis, all by cross entropy, in one program.

    What an expert did after its first STOP counts for nothing.

    An expert's actions are dear and diagnoses are not: of `pool` the diagnoses alone are learned, from what the policy
    of the moment asks.

    Args:
      config: see Training.
      asker, params: the policy to begin with.
      rules, cases: the patients that the expert saw.
      action: i32[N, T], what it asked.
      pool: more patients; None: these.

    Returns:
      (params, {"action", "belief"}: f32[warm_up_steps], nats).
    """
    rate = optax.cosine_decay_schedule(config.warm_up_rate, config.warm_up_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    cases, action = jax.tree.map(jnp.asarray, cases), jnp.asarray(action)
    others = cases if pool is None else jax.tree.map(jnp.asarray, pool)
    column = jax.jit(functools.partial(expert_columns, rules))(cases, action)
    goal = jnp.concatenate([action, jnp.full((len(action), 1), rules.stop, action.dtype)], axis=1)
    stopped = jnp.cumsum(goal >= rules.stop, axis=1)
    live = stopped - (goal >= rules.stop) == 0
    batch_size = config.patients * config.samples // 2
    some = lambda key, count: jax.random.choice(key, count, (min(batch_size, count),), replace=False)

    def loss(params, index, more, key):
        batch = take(cases, index)
        said = heads(asker, params, states(asker, params, batch, column[index]))
        acts = optax.softmax_cross_entropy_with_integer_labels(said.logits, goal[index])
        acts = jnp.sum(jnp.where(live[index], acts, 0)) / jnp.sum(live[index])
        found = _uncertainty(said.belief, batch)
        played = rollout(asker, jax.lax.stop_gradient(params), rules, more, key, forced=True)
        known = states(asker, params, more, jax.lax.stop_gradient(played.column))
        belief = _uncertainty(heads(asker, params, known).belief, more)
        return acts + found + belief, {"action": acts, "belief": belief}

    def update(carry, step):
        params, moments = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed + 2), step), 3)
        index, more = some(keys[0], len(action)), take(others, some(keys[1], len(others.column)))
        slope, metrics = jax.grad(loss, has_aux=True)(params, index, more, keys[2])
        change, moments = optimizer.update(slope, moments, params)
        return (optax.apply_updates(params, change), moments), metrics

    @jax.jit
    def run(params):
        return jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(config.warm_up_steps))

    (params, _), curve = run(params)
    return params, {name: np.asarray(values) for name, values in curve.items()}


def _uncertainty(belief: jax.Array, cases: Cases) -> jax.Array:
    """The mean cross entropy of beliefs f32[N, S, C], logits."""
    return jnp.mean(cross_entropy(truth(cases)[:, None, :], jax.nn.softmax(belief)))


def dialogues_above(
    threshold: float,
    config: Training,
    asker: Asker,
    rules: Rules,
    cases: Cases,
    params: Params,
    *,
    weight: Array,
    posterior: Posterior | None = None,
) -> tuple[Cases, np.ndarray]:
    """The second mode of reject sampling: whole dialogues of a policy whose reward is above a threshold, for `warm_up`.

    Args:
      threshold: see choice.keep_above; the reward is the sum over the dialogue.
      config, asker, rules, cases, params, weight, posterior: as of `reinforce`.

    Returns:
      (cases, action i32[M, horizon]): of those kept; STOP from where a dialogue ended.

    Raises:
      ValueError: no dialogue is above the threshold.
    """
    how = {"places": config.places, "reject": config.reject, "draws": config.draws, "posterior": posterior}
    weight = jnp.asarray(weight, jnp.float32)

    @jax.jit
    def run(cases, key):
        played = rollout(asker, params, rules, cases, key, **how)
        earned = rewards_of(config, rules, cases, played, weight)
        total = jnp.sum(jnp.where(played.live, earned.step, 0), axis=1)
        action = jnp.where(played.live, played.action, rules.stop)[:, : rules.horizon]
        return action, keep_above(total, threshold, valid=~played.abstains), total

    action, kept, total = run(jax.tree.map(jnp.asarray, cases), jax.random.key(config.seed + 3))
    index = np.flatnonzero(np.asarray(kept))
    if not len(index):
        raise ValueError(f"threshold is {threshold}, and no dialogue earned more than {float(jnp.max(total)):.3f}")
    return take(cases, index), np.asarray(action)[index]
