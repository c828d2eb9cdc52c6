"""Conformance of every entry of ALGORITHMS: value and gradient equal its oracle, alone and through the train step."""

import dataclasses
import functools
import math
import pathlib
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlalign import losses
from rlalign.algorithms import ALGORITHMS, Algorithm, get_algorithm, try_out
from rlalign.algorithms.page import algorithms_page
from rlalign.forest import pack
from rlalign.train import init_state, make_batch, make_train_step
from rlalign.types import Batch, Rollouts
from tests import oracles

SHAPES = ((5, 3, 2), (8, 4, 3))  # samples, response tokens, group ids
CASES = 200  # of each shape
FLOATS = (
    "reward",
    "logp",
    "old_logp",
    "ref_logp",
    "entropy",
    "baseline",
    "weight",
    "label",
    "penalty",
    "terms",
    "token_reward",
)
FIELDS = (*FLOATS, "group", "valid", "mask", "pair", "trajectory", "step", "anchor", "past")
every_entry = pytest.mark.parametrize("name", ALGORITHMS)


@functools.cache
def cases(samples, length, groups):
    rng = np.random.default_rng(samples)
    return [oracles.random_case(rng, samples, length, groups) for _ in range(CASES)]


def objective(algorithm, case, groups):
    """What Algorithm's docstring says its fields mean."""
    logp, mask = case["logp"], case["mask"]
    how = {"max_length": algorithm.max_length or mask.shape[1]}
    if algorithm.data == "demonstrations":
        return algorithm.loss(logp, mask, aggregate=algorithm.aggregate, **how)[0]
    if algorithm.data in ("pairs", "labels"):
        score = {  # a stand-in for a reward model: the sum of log-probs
            "mean_logp": lambda: losses.sequence_mean(logp, mask),
            "logratio": lambda: losses.sequence_logratio(logp, case["ref_logp"], mask),
            "reward": lambda: jnp.sum(jnp.where(mask, logp, 0), axis=1),
        }[algorithm.score]()
        if algorithm.data == "labels":
            return algorithm.loss(score, case["label"] > 0, valid=jnp.any(mask, axis=1))[0]
        better, worse = case["pair"].T
        return algorithm.loss(score[better], score[worse], valid=better >= 0)[0]
    more = {name: case[name] for name in (*algorithm.needs, *algorithm.optional)}
    advantage = algorithm.advantage(case["reward"], case["group"], num_groups=groups, valid=case["valid"], **more)
    loss, _ = algorithm.loss(logp, case["old_logp"], advantage, mask, aggregate=algorithm.aggregate, **how)
    kl = losses.kl_estimate(logp, case["ref_logp"], mask, kind=algorithm.kl_kind)
    loss += algorithm.kl_coef * losses.aggregate_tokens(kl, mask, algorithm.aggregate, **how)
    return loss - algorithm.entropy_coef * losses.aggregate_tokens(case["entropy"], mask, algorithm.aggregate, **how)


def stacked(shape, dtype):
    out = oracles.stack([{k: c[k] for k in FIELDS} for c in cases(*shape)])
    return {k: jnp.asarray(v, dtype if k in FLOATS else None) for k, v in out.items()}


def test_the_page_of_algorithms_is_that_of_the_entries():
    written = (pathlib.Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
    assert written == algorithms_page(), "write it anew: python -m rlalign.algorithms.page > docs/algorithms.md"
    mine = dataclasses.replace(ALGORITHMS["grpo"], about=None)
    with pytest.raises(ValueError, match="algorithm 'mine' has no `about`: give it one to list it"):
        algorithms_page({"mine": mine})
    headings = [line for line in algorithms_page({"dpo": ALGORITHMS["dpo"]}).splitlines() if line.startswith("## ")]
    assert [h.split()[1] for h in headings] == ["Pairs:", "Settings"]  # no table without a row


def test_every_entry_has_an_oracle_and_every_oracle_an_entry():
    assert set(ALGORITHMS) == set(oracles.ORACLES)


@functools.cache
def all_entries():
    """{name: (loss of every case, its gradient)} in float64, in one program: entries share their advantages."""

    def call(logp, rest):
        return {
            name: jax.value_and_grad(lambda x, a=a: objective(a, rest | {"logp": x}, SHAPES[0][2]))(logp)
            for name, a in ALGORITHMS.items()
        }

    batch = stacked(SHAPES[0], jnp.float64)
    return jax.jit(jax.vmap(call))(batch["logp"], batch)


@every_entry
def test_value_and_gradient_equal_the_oracle(x64, name):
    oracle = oracles.ORACLES[name]
    loss, slope = all_entries()[name]
    np.testing.assert_allclose(loss, [oracle(c) for c in cases(*SHAPES[0])], rtol=1e-12, atol=1e-12)
    near = [c for c, one in enumerate(cases(*SHAPES[0])) if np.abs(one["logp"] - one["old_logp"]).max() < 5]
    for c in near[:8]:
        one = cases(*SHAPES[0])[c]
        want = oracles.numerical_gradient(lambda x, one=one: oracle(one | {"logp": x}, at=one["logp"]), one["logp"])
        np.testing.assert_allclose(slope[c], want, rtol=1e-6, atol=1e-8)


def test_float32_equals_the_oracle():
    """All entries in one program."""

    def call(case):
        return {name: objective(algorithm, case, SHAPES[1][2]) for name, algorithm in ALGORITHMS.items()}

    # A ratio of e^11 would multiply what float32 loses in an advantage near 0.
    near = [np.abs(one["logp"] - one["old_logp"]).max() < 5 for one in cases(*SHAPES[1])]
    assert sum(near) > 100
    for name, loss in jax.jit(jax.vmap(call))(stacked(SHAPES[1], jnp.float32)).items():
        assert loss.dtype == np.float32
        want = np.array([oracles.ORACLES[name](c) for c in cases(*SHAPES[1])])[near]
        assert np.std(want) > 0.01
        np.testing.assert_allclose(loss[np.array(near)], want, rtol=1e-5, atol=1e-5, err_msg=name)


class Tabular:
    """A decoder whose logits are its parameters: one row of the vocabulary a node."""

    config = types.SimpleNamespace(logit_softcap=None, reward_head=False)

    def apply(self, params, forest):
        return params["logits"]

    def head(self, params):
        return jnp.eye(params["logits"].shape[-1], dtype=params["logits"].dtype)


def scored(logits, packed):
    """logp and entropy [N, R] by walking from every response token to its parent."""
    out = {"logp": np.zeros(packed.mask.shape), "entropy": np.zeros(packed.mask.shape)}
    for n, t in np.argwhere(packed.mask):
        row, column = divmod(int(packed.node[n, t]), packed.forest.token.shape[1])
        z = logits[row, packed.forest.parent[row, column]]
        total = math.log(sum(math.exp(x) for x in z))
        out["logp"][n, t] = z[packed.forest.token[row, column]] - total
        out["entropy"][n, t] = -sum(math.exp(x - total) * (x - total) for x in z)
    return out


@pytest.mark.parametrize("name", ["dr_grpo", "gprs", "sft", "reinforce_pp", "dpo", "simpo", "kto"])
def test_a_train_step_descends_the_oracle(x64, name):
    """pack, token_logprobs, the loss with its KL and entropy terms, and the optimizer, on shared prefixes.

    Between them: max_length, a KL, no advantage, one by token, pairs with and without reference, labels.
    """
    rng, vocab, algorithm = np.random.default_rng(0), 4, ALGORITHMS[name]
    prompts, length = [np.array([1, 2]), np.array([1, 3, 3])], np.array([3, 0, 3, 1, 3])  # sample 1 is not valid
    case = {
        "reward": np.array([1.0, 9.0, 0.0, 0.5, 2.0]),
        "group": np.array([0, 0, 0, 1, 1]),
        "valid": length > 0,
        "mask": np.arange(3) < length[:, None],
        "num_groups": 2,
    }
    start = [len(prompts[g]) for g in case["group"]]
    answers = [rng.integers(0, vocab, n) for n in length]
    sequences = [np.concatenate([prompts[g], a]) for g, a in zip(case["group"], answers, strict=True)]
    packed = pack(sequences, row_length=20, response_start=start)
    np.testing.assert_array_equal(packed.mask, case["mask"])
    logits = rng.normal(size=(*packed.forest.token.shape, vocab))
    current = scored(logits, packed)["logp"]
    case |= {"old_logp": current - rng.normal(size=(5, 3)) * 0.3, "ref_logp": current + rng.normal(size=(5, 3)) * 0.5}
    case |= {"token_reward": rng.normal(size=(5, 3)) / 4}
    case |= {"pair": np.array([[0, 2], [4, 3], [-1, -1]]), "label": np.array([1.0, 1.0, -1.0, -1.0, 1.0])}
    advantage = case["label"] if algorithm.data == "labels" else None
    if algorithm.advantage is not None:
        more = {name: jnp.asarray(case[name]) for name in (*algorithm.needs, *algorithm.optional)}
        reward, group, valid = (jnp.asarray(case[k]) for k in ("reward", "group", "valid"))
        advantage = np.asarray(algorithm.advantage(reward, group, num_groups=2, valid=valid, **more))
    pair = case["pair"] if algorithm.data == "pairs" else None
    batch = Batch(packed, advantage=advantage, old_logp=case["old_logp"], ref_logp=case["ref_logp"], pair=pair)
    optimizer = optax.sgd(1.0)
    state = init_state(Tabular(), {"logits": jnp.asarray(logits)}, optimizer)
    state, metrics = make_train_step(Tabular(), algorithm, optimizer)(state, batch)

    def truth(logits):
        return oracles.ORACLES[name](case | scored(logits, packed), at=current)

    want = oracles.numerical_gradient(truth, logits)
    assert np.abs(want).max() > 0.005
    assert float(metrics["loss"]) == pytest.approx(truth(logits), rel=1e-10)
    np.testing.assert_allclose(logits - np.asarray(state.params["logits"]), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kl_coef", [0.0, 0.01])
def test_groups_without_signal_pull_towards_the_reference_only_if_asked(kl_coef):
    case = {k: jnp.asarray(v) for k, v in cases(*SHAPES[0])[0].items() if k in FIELDS}
    case |= {"reward": jnp.ones(5), "valid": jnp.ones(5, bool), "mask": jnp.ones((5, 3), bool)}
    algorithm = dataclasses.replace(ALGORITHMS["gprs"], kl_coef=kl_coef)
    slope = jax.jit(jax.grad(lambda logp: objective(algorithm, case | {"logp": logp}, 2)))(case["logp"])
    assert np.any(slope) == (kl_coef > 0)


def test_an_advantage_of_ones_own_replaces_a_named_one():
    """The README's promise, as far as the batch that the train step reads."""

    def centred(reward, group, *, num_groups, valid):
        return jnp.where(valid, reward - 0.5, 0)

    mine = dataclasses.replace(ALGORITHMS["grpo"], advantage=centred)
    assert mine.loss is ALGORITHMS["grpo"].loss
    assert mine.aggregate == ALGORITHMS["grpo"].aggregate
    assert ALGORITHMS["grpo"].advantage is not centred
    tokens, mask = np.array([[4, 5], [6, 0]], np.int32), np.array([[True, True], [True, False]])
    zeros = np.zeros((2, 2), np.float32)
    rollouts = Rollouts(tokens, mask, zeros, zeros, np.zeros(2, np.int32), np.zeros(2, np.int32))
    batch = make_batch(mine, [np.array([1, 2])], rollouts, np.array([2.0, np.nan]), row_length=8)
    assert batch.advantage.tolist() == [1.5, 0.0]


def test_entries_are_frozen_and_unknown_names_list_the_known():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALGORITHMS["grpo"].kl_coef = 1.0
    assert get_algorithm("gprs") is ALGORITHMS["gprs"]
    with pytest.raises(ValueError, match=r"^unknown algorithm 'ppo': choose one of grpo, dr_grpo, .*sft"):
        get_algorithm("ppo")


BAD = [
    ({"data": "pairs!"}, r"data must be one of rollouts, demonstrations, pairs, labels, got 'pairs!'$"),
    ({"aggregate": "mean"}, r"aggregate must be one of token, sequence, constant, got 'mean'$"),
    ({"score": "logp"}, r"score must be one of logratio, mean_logp, reward, got 'logp'$"),
    ({"score": "reward"}, r"score='reward' with data='rollouts': reward models learn from pairs$"),
    ({"needs": ("mask", "value")}, r"needs must be one of mask, weight, .*, got 'value'$"),
    ({"advantage": None}, r"data='rollouts' with advantage=None: rollouts need one, others none$"),
    ({"data": "demonstrations"}, r"data='demonstrations' with advantage=.*: rollouts need one, others none$"),
    ({"data": "pairs", "advantage": None, "kl_coef": 0.1}, r"kl_coef=0.1 with data='pairs': the KL is estimated from"),
    (
        {"data": "labels", "advantage": None, "needs": ("mask",)},
        r"needs=\('mask',\) with data='labels': there is no adv",
    ),
    (
        {"loss": partial(losses.policy_gradient, aggregate="token")},
        r"aggregate belongs to the Algorithm, not to its loss",
    ),
    ({"loss": partial(losses.policy_gradient, max_length=9)}, r"max_length belongs to the Algorithm, not to its loss"),
    (
        {"loss": partial(losses.policy_gradient, denominator=9)},
        r"denominator comes from the batch: it cannot be an opt",
    ),
    (
        {"data": "pairs", "advantage": None, "loss": losses.dpo, "entropy_coef": 0.1},
        r"entropy_coef=0.1 with data='pairs'",
    ),
    ({"loss": losses.dpo}, r"loss=dpo cannot be called with logp, old_logp, .*, as data='rollouts' asks for: .*"),
    (
        {"data": "pairs", "advantage": None},
        r"loss=policy_gradient cannot be called with better, worse, valid, denomina",
    ),
    (
        {"advantage": ALGORITHMS["remax"].advantage},
        r"advantage=remax cannot be called with reward, group, .*'baseline'",
    ),
    ({"optional": ("value",)}, r"optional must be one of mask, weight, .*, got 'value'$"),
    ({"loss": partial(losses.policy_gradient, clip="PPO")}, r"clip must be 'ppo', .* got 'PPO'$"),
    ({"loss": partial(losses.policy_gradient, dual_clip=0.5)}, r"dual_clip=0.5 must be above 1"),
    (
        {"loss": partial(losses.policy_gradient, clip="cispo", ratio="sequence")},
        r"clip='cispo' with ratio='sequence': CI",
    ),
    (
        {"loss": partial(losses.policy_gradient, ratio="product")},
        r"ratio='product' with aggregate='token': one ratio a re",
    ),
    (
        {"loss": partial(losses.policy_gradient, ratio="sequence"), "needs": ("token_reward",)},
        r"token_reward with ratio='sequence': advantages by token need the tokens' own ratios$",
    ),
    ({"loss": partial(losses.density_ratio, link="logit")}, r"link must be one of bernoulli, .*, got 'logit'$"),
    ({"kl_kind": "k4"}, r"kl_kind must be one of k1, k2, k3, got 'k4'$"),
    ({"kl_coef": -0.1}, r"kl_coef must be >= 0, got -0.1$"),
    ({"kl_coef": math.nan}, r"kl_coef must be >= 0, got nan$"),
    ({"entropy_coef": -1.0}, r"entropy_coef must be >= 0, got -1.0$"),
    ({"temperature": 0.0}, r"temperature must be > 0, got 0.0: greedy samples of a group are all equal$"),
    ({"temperature": math.nan}, r"temperature must be > 0, got nan"),
    ({"max_length": 0}, r"max_length must be at least 1, got 0$"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_combinations_without_sense_are_refused(change, text):
    good = {"advantage": ALGORITHMS["grpo"].advantage, "loss": losses.policy_gradient}
    Algorithm(**good)
    with pytest.raises(ValueError, match=text):
        Algorithm(**(good | change))


@pytest.mark.parametrize("name", ["grpo", "gigpo", "crpo_per_objective", "reinforce_pp", "kto", "sft"])
def test_entries_can_be_tried_out(name):
    try_out(ALGORITHMS[name])


TRIED = [
    (
        "grpo",
        {"advantage": partial(ALGORITHMS["grpo"].advantage.func, scale="mad")},
        r"scale must be 'std' or 'none', got",
    ),
    (
        "grpo",
        {"advantage": lambda reward, group, num_groups, valid: reward[:2]},
        r"advantage gave .*2.* for \(4,\) rewards",
    ),
    ("dpo", {"loss": partial(losses.dpo, beta=-1.0)}, r"beta must be > 0, got -1.0"),
]


@pytest.mark.parametrize(("name", "change", "text"), TRIED)
def test_wrong_options_show_before_the_first_rollout(name, change, text):
    wrong = dataclasses.replace(ALGORITHMS[name], **change)
    with pytest.raises(ValueError, match=text):
        try_out(wrong)
    with pytest.raises(ValueError, match=text):
        make_train_step(Tabular(), wrong, optax.sgd(1.0))


def test_an_advantage_that_jax_cannot_trace_shows_before_the_first_rollout():
    mine = dataclasses.replace(
        ALGORITHMS["grpo"], advantage=lambda reward, group, num_groups, valid: np.asarray(reward) - 1
    )
    with pytest.raises(jax.errors.TracerArrayConversionError):
        try_out(mine)
