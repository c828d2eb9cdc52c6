"""The train step against plain loops, split every way; what it refuses, and what leaves everything as it was."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign.algorithms import ALGORITHMS
from rlalign.forest import pack
from rlalign.io.updates import RunAborted, Updates
from rlalign.models.decoder import Decoder
from rlalign.train import OptimizerConfig, init_state, make_optimizer, make_scorer, make_train_step, split_batch
from rlalign.types import Batch, Packed
from tests.tiny import ragged_groups
from tests.train.cases import (
    ALGORITHM,
    COUNT,
    MODEL,
    NARROW,
    OPTIMIZER,
    RESPONSE,
    SAMPLES,
    assert_like_by_hand,
    assert_near,
    batch,
    by_hand,
    fields,
    loss_by_hand,
    new_state,
    params,
    plain,
    step,
    train,
    train_pmap,
)

GRPO = ALGORITHMS["grpo"]


def test_steps_equal_plain_loops(x64):
    """Three updates: the loss token by token over repeated prompts, AdamW from its paper."""
    state, history = train(batch())
    assert_like_by_hand(state.params, history, 1e-12)
    assert (int(state.step), int(state.skipped)) == (3, 0)
    clipped = by_hand()[0][1]
    assert 0 < clipped["clip_share"] < 1  # the batch tests the clip, the norm's clip and the denominators
    assert clipped["grad_norm"] > 0.5
    assert not batch().packed.mask.any(axis=1).all()


def test_microbatches_change_nothing(x64):
    state, history = train(batch(parts=3), microbatches=3)
    assert_like_by_hand(state.params, history, 1e-12)


def test_pmap_changes_nothing(x64):
    state, history = train_pmap(batch(parts=4), 4)
    for device in range(4):
        first = jax.tree.map(lambda x, d=device: x[d], (state.params, history))
        assert_like_by_hand(*first, 1e-12)


def test_float32(x64):
    with jax.enable_x64(False):
        state, history = train(batch(dtype="float32"), NARROW)
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert_near(state.params, by_hand()[-1][0], 1e-6)
    for metrics, (_, expected) in zip(history, by_hand(), strict=True):
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def snapshot(state):
    return jax.tree.map(np.array, (state.params, state.opt_state))


def assert_unchanged(before, state):
    jax.tree.map(np.testing.assert_array_equal, before, snapshot(state))


def with_value(name, index, value):
    x = fields()[name].copy()
    x[index] = value
    return {name: x}


BROKEN = {
    "old_logp": ("old_logp", (0, 1), np.nan),
    "ref_logp": ("ref_logp", (5, 0), np.nan),
    "advantage inf": ("advantage", 4, np.inf),
    "advantage nan": ("advantage", 4, np.nan),
    "weight": ("weight", (1, 0), np.inf),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_gradient_that_is_not_finite_changes_nothing(case, x64):
    """Bit for bit, moments and the schedule's count too; the next batch trains as if it had never been."""
    state, _ = step()(new_state(), batch())
    before = snapshot(state)
    state, metrics = step()(state, batch(**with_value(*BROKEN[case])))
    assert_unchanged(before, state)
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (1, 1, 1)
    assert not np.isfinite(metrics["grad_norm"])
    for _ in range(2):
        state, metrics = step()(state, batch())
    assert_near(state.params, by_hand()[-1][0], 1e-12)
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (3, 1, 0)


def test_what_the_mask_hides_changes_nothing(x64):
    """NaN in masked slots and in the advantage of a sample without tokens: bit for bit the same step."""
    mask = batch().packed.mask
    assert not mask[2].any()
    hidden = {k: np.where(mask, fields()[k], np.nan) for k in ("old_logp", "ref_logp", "weight")}
    hidden |= with_value("advantage", 2, np.nan)
    clean, dirty = (step()(new_state(), data)[0] for data in (batch(), batch(**hidden)))
    assert_unchanged(snapshot(clean), dirty)
    assert int(dirty.step) == 1


def test_a_batch_without_tokens_changes_nothing(x64):
    empty = pack(
        SAMPLES.tokens, row_length=48, response_start=[len(t) for t in SAMPLES.tokens], response_length=RESPONSE
    )
    assert not empty.mask.any()
    assert empty.forest.token.shape == batch().packed.forest.token.shape
    state = new_state()
    before = snapshot(state)
    state, metrics = step()(state, batch()._replace(packed=empty))
    assert_unchanged(before, state)
    assert (int(state.skipped), int(metrics["tokens"])) == (1, 0)
    assert all(np.isfinite(x) for x in metrics.values())


def on_policy():
    """GRPO as it is, for a batch without old_logp."""
    return make_train_step(Decoder(MODEL), GRPO, make_optimizer(OptimizerConfig(learning_rate=1e-3, eps=1e-4)))


def test_without_old_logp_the_batch_is_on_policy_and_without_signal_it_is_no_step(x64):
    run, optimizer = on_policy(), make_optimizer(OptimizerConfig(learning_rate=1e-3, eps=1e-4))
    data = batch(old_logp=None, ref_logp=None, weight=None)
    state = init_state(Decoder(MODEL), params(), optimizer)
    before = snapshot(state)
    state, metrics = run(state, data._replace(advantage=np.zeros(COUNT)))
    assert_unchanged(before, state)
    assert (float(metrics["grad_norm"]), int(metrics["skipped"]), int(state.skipped)) == (0, 1, 1)

    state, metrics = run(state, data)
    assert (float(metrics["ratio_error"]), float(metrics["clip_share"]), float(metrics["approx_kl"])) == (0, 0, 0)
    # With a ratio of 1 the loss is minus the mean advantage of the samples that have tokens.
    live = data.packed.mask.any(axis=1)
    assert float(metrics["loss"]) == pytest.approx(-data.advantage[live].mean(), rel=1e-12)
    assert not np.array_equal(state.params["embedding"], before[0]["embedding"])
    assert "kl" not in metrics


def test_without_signal_the_kl_pulls_towards_the_reference(x64):
    data, state = batch(advantage=np.zeros(COUNT)), new_state()
    kl = []
    for _ in range(12):
        state, metrics = step()(state, data)
        kl.append(float(metrics["kl"]))
    assert (int(state.step), int(state.skipped)) == (12, 0)
    assert kl[-1] < 0.9 * kl[0]
    assert all(after < before for before, after in itertools.pairwise(kl))


def test_a_loss_spike_is_refused_where_that_is_asked_for():
    """Six deviations above the last 128: bit for bit unchanged, and the next batch trains; five in a row end a run."""
    watched = dataclasses.replace(OPTIMIZER, spike_sigma=6.0)
    noise = 1.0 + 0.1 * np.random.default_rng(0).normal(size=140)
    usual = Batch(SAMPLES.pack(row_length=48, response_length=RESPONSE))
    at = lambda size: usual._replace(advantage=np.full(COUNT, -size, np.float32))  # the loss is the mean of `size`
    for config, refused in ((watched, 1), (OPTIMIZER, 0)):
        run = make_train_step(Decoder(NARROW), GRPO, make_optimizer(config))
        state = init_state(Decoder(NARROW), params(NARROW), make_optimizer(config))
        update = Updates(run, max_bad_steps=5, learning_rate=1e-3)
        state, metrics = update(state, at(50.0))  # before there are 128 losses nothing is a spike
        assert (int(state.step), metrics["skipped"]) == (1, 0)
        for size in noise[:128]:
            state, metrics = update(state, at(size))
            assert metrics["skipped"] == 0
        before = snapshot(state)
        state, metrics = update(state, at(1.0 + 0.1 * 12))
        assert metrics["skipped"] == int(state.skipped) == refused
        if not refused:
            continue
        assert_unchanged(before, state)
        state, metrics = update(state, at(1.2))
        assert (metrics["skipped"], int(state.step)) == (0, 130)
        with pytest.raises(RunAborted) as stopped:
            functools.reduce(lambda state, size: update(state, at(size))[0], [9.0] * 5, state)
        assert stopped.value.reason.startswith("5 gradients in a row came with a loss far above the usual")


def test_the_old_state_is_donated(x64):
    """Its buffers are reused: the documented price of not holding parameters and moments twice."""
    old = new_state()
    step()(old, batch())
    assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.opt_state)))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(old.params["embedding"])


def test_bfloat16_keeps_its_dtype_and_stays_finite():
    config = dataclasses.replace(MODEL, dtype="bfloat16", remat="full")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2))
    state = init_state(Decoder(config), params(config), optimizer)
    start = snapshot(state)[0]
    rng = np.random.default_rng(0)
    packed = SAMPLES.pack(row_length=48, response_length=RESPONSE)
    data = Batch(packed, advantage=rng.normal(size=COUNT).astype(np.float32))
    run = make_train_step(Decoder(config), GRPO, optimizer)
    for _ in range(2):
        state, metrics = run(state, data)
    assert int(state.step) == 2
    assert metrics["loss"].dtype == jnp.float32
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(start), strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(x, np.float32)).all()
        assert not np.array_equal(x, y)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_scorer_is_the_policys_log_prob(x64, microbatches):
    zero = np.zeros((COUNT, RESPONSE))
    expected = plain()(params(), zero, zero)[0][0]
    score = make_scorer(Decoder(MODEL), temperature=ALGORITHM.temperature, microbatches=microbatches)
    got = score(params(), batch(parts=microbatches).packed)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def tokens_of(packed: Packed) -> list[tuple]:
    """The response tokens of each sample, read through `node`."""
    flat = np.asarray(packed.forest.token).reshape(-1)
    return [tuple(flat[node[mask]]) for node, mask in zip(packed.node, packed.mask, strict=True)]


def test_split_batch_keeps_every_sample_once():
    """Minibatches: each part is a batch of its own whose fields still belong together."""
    names = ("advantage", "old_logp", "ref_logp", "weight")
    rng = np.random.default_rng(2)
    data = Batch(
        SAMPLES.pack(row_length=48, parts=4, response_length=RESPONSE),
        advantage=rng.normal(size=COUNT),
        **{name: rng.normal(size=(COUNT, RESPONSE)) for name in names[1:]},
    )
    whole = {}
    for n, tokens in enumerate(tokens_of(data.packed)):
        if tokens:
            whole[data.advantage[n]] = (tokens, *(tuple(getattr(data, k)[n][data.packed.mask[n]]) for k in names[1:]))
    parts, seen = split_batch(data, 2), []
    for k in range(2):
        part = jax.tree.map(lambda x, k=k: x[k], parts)
        for m, tokens in enumerate(tokens_of(part.packed)):
            if tokens:
                mask = part.packed.mask[m]
                assert whole[part.advantage[m]] == (tokens, *(tuple(getattr(part, n)[m][mask]) for n in names[1:]))
                seen.append(part.advantage[m])
            else:
                assert part.advantage[m] == 0
                assert (part.packed.node[m] == -1).all()
    assert sorted(seen) == sorted(whole)
    assert len(whole) == COUNT - 1


def test_split_batch_keeps_pairs_together():
    samples = ragged_groups(3, [(4, (3, 2)), (5, (1, 4)), (2, (2, 2)), (6, (5, 3))])
    unit = np.repeat(np.arange(4), 2)
    pair = np.array([[0, 1], [-1, -1], [3, 2], [4, 5], [7, 6]], np.int32)
    data = Batch(samples.pack(row_length=20, parts=2, unit=unit), pair=pair)
    tokens = tokens_of(data.packed)
    parts, found = split_batch(data, 2), []
    for k in range(2):
        local = tokens_of(jax.tree.map(lambda x, k=k: x[k], parts.packed))
        mine = parts.pair[k][(parts.pair[k] >= 0).all(axis=1)]
        assert len(mine) > 0
        found += [(local[a], local[b]) for a, b in mine]
    assert sorted(found) == sorted((tokens[a], tokens[b]) for a, b in pair if a >= 0)

    apart = Batch(samples.pack(row_length=20, parts=2, unit=unit), pair=np.array([[0, 1], [0, 7], [0, 3], [0, 5]]))
    with pytest.raises(ValueError, match=r"pair \[0, \d\] lies in two parts: give both samples one `unit` in pack"):
        split_batch(apart, 2)


def test_one_chosen_answer_may_have_many_rejected_ones():
    sequences = [np.array([1, 2, 3]), np.array([1, 2, 4]), np.array([1, 2, 5]), np.array([1, 2])]
    packed = pack(sequences, row_length=8, response_start=[2] * 4)
    many = np.array([[0, 1], [0, 2], [1, 2], [1, 0], [2, 0], [2, 1]], np.int32)
    found = split_batch(Batch(packed, pair=many), 1)
    pair = found.pair[0]
    assert sorted(map(tuple, pair[pair[:, 0] >= 0].tolist())) == sorted(map(tuple, many.tolist()))
    with pytest.raises(ValueError, match=r"pair \[0, 3\] has a sample without a response token: drop the pair"):
        split_batch(Batch(packed, pair=np.array([[0, 3]])), 1)


def test_the_callers_parameters_outlive_the_first_step():
    mine = params(NARROW)
    state = init_state(Decoder(NARROW), mine, make_optimizer(OptimizerConfig(learning_rate=1e-2)))
    given = init_state(Decoder(NARROW), mine, make_optimizer(OptimizerConfig(learning_rate=1e-2)), copy=False)
    ours = {id(x) for x in jax.tree.leaves(mine)}
    assert not ours & {id(x) for x in jax.tree.leaves(state.params)}
    assert ours == {id(x) for x in jax.tree.leaves(given.params)}


def test_rows_that_do_not_divide_are_refused():
    data = Batch(SAMPLES.pack(row_length=48, num_rows=4))
    with pytest.raises(ValueError, match=r"4 rows do not split into 3 equal parts: call pack\(..., parts=3\)"):
        split_batch(data, 3)


def test_missing_fields_are_named():
    data = Batch(SAMPLES.pack(row_length=48))
    update = make_train_step(Decoder(NARROW), ALGORITHM, make_optimizer(OptimizerConfig()))
    with pytest.raises(ValueError, match=r"the batch needs advantage f\[N\] \(see make_batch\)"):
        update(None, data)
    with pytest.raises(ValueError, match=r"kl_coef=0.5 needs ref_logp f\[N, R\] in the batch \(see make_scorer\)"):
        update(None, data._replace(advantage=np.zeros(COUNT)))


def test_options_that_do_not_go_together_are_refused():
    arguments = (Decoder(NARROW), GRPO, make_optimizer(OptimizerConfig()))
    with pytest.raises(ValueError, match="microbatches must be at least 1, got 0"):
        make_train_step(*arguments, microbatches=0)
    with pytest.raises(ValueError, match="axis_name goes without mesh and microbatches"):
        make_train_step(*arguments, microbatches=2, axis_name="parts")


def test_the_loops_are_right_about_their_derivative():
    """The oracle's own gradient, by central differences."""
    rng = np.random.default_rng(4)
    logp, entropy, *rest = (rng.normal(size=(COUNT, RESPONSE)) for _ in range(5))
    data = {"old_logp": logp + 0.2 * rest[0], "ref_logp": rest[1], "weight": rest[2], "advantage": rest[0][:, 0]}
    _, by_logp, by_entropy = loss_by_hand(logp, entropy, **data)
    for n, r in ((0, 0), (4, 0), (8, 1), (11, 2)):
        moved = np.zeros(logp.shape)
        moved[n, r] = 1e-6
        for derivative, up, down in (
            (by_logp, (logp + moved, entropy), (logp - moved, entropy)),
            (by_entropy, (logp, entropy + moved), (logp, entropy - moved)),
        ):
            slope = (loss_by_hand(*up, **data)[0]["loss"] - loss_by_hand(*down, **data)[0]["loss"]) / 2e-6
            assert derivative[n, r] == pytest.approx(slope, abs=1e-8)
