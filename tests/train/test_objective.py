"""The loss of a batch of pairs or labels: the gradient of the whole however it is split, and what is missing."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlalign.algorithms import ALGORITHMS
from rlalign.forest import pack
from rlalign.train import init_state, make_train_step, split_batch
from rlalign.types import Batch
from tests import oracles

VOCAB, PAIRS = 5, 6


class Tabular:
    """A decoder of one logit row a token of the vocabulary: log-probs depend on the parent's token only."""

    config = types.SimpleNamespace(logit_softcap=None, reward_head=False)

    def apply(self, params, forest):
        return params["logits"][forest.token]

    def head(self, params):
        return jnp.eye(VOCAB, dtype=params["logits"].dtype)


@functools.cache
def batch(parts, labels=False):
    """Pairs of answers to one prompt each; one pair has an empty slot behind it, one answer is in two pairs."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, 3) for _ in range(PAIRS)]
    sequences = [np.concatenate([prompts[n // 2], rng.integers(0, VOCAB, 1 + n % 3)]) for n in range(2 * PAIRS)]
    unit = np.arange(2 * PAIRS) // 2
    packed = pack(sequences, row_length=16, response_start=[3] * len(sequences), unit=unit, parts=parts)
    pair = np.array([[2 * m, 2 * m + 1] for m in range(PAIRS)] + [[1, 0], [-1, -1]], np.int32)
    ref = -np.abs(rng.normal(size=packed.mask.shape))
    label = np.where(np.arange(2 * PAIRS) % 3 == 0, -1.0, 1.0)
    label[4] = 0.0  # a response to estimate the KL from only
    return Batch(packed, ref_logp=ref, pair=pair, advantage=label if labels else None)


@functools.cache
def logits():
    return np.random.default_rng(1).normal(size=(VOCAB, VOCAB))


def scored(z, packed):
    """logp f[N, R], token by token."""
    out = np.zeros(packed.mask.shape)
    token, parent = packed.forest.token, packed.forest.parent
    for n, t in np.argwhere(packed.mask):
        row, column = divmod(int(packed.node[n, t]), token.shape[1])
        row_of = z[token[row, parent[row, column]]]
        out[n, t] = row_of[token[row, column]] - np.log(np.exp(row_of).sum())
    return out


def stepped(name, given, **options):
    """Parameters after one step of plain gradient descent, and its metrics."""
    optimizer = optax.sgd(1.0)
    state = init_state(Tabular(), {"logits": jnp.asarray(logits())}, optimizer)
    state, metrics = make_train_step(Tabular(), ALGORITHMS[name], optimizer, **options)(state, given)
    return np.asarray(state.params["logits"]), metrics


@pytest.mark.parametrize("name", ["dpo", "simpo", "gsil_lsif"])
def test_pairs_in_parts_give_the_gradient_of_the_whole(x64, name):
    def truth(z, given):
        case = {"logp": scored(z, given.packed), "ref_logp": given.ref_logp, "mask": given.packed.mask}
        return oracles.ORACLES[name](case | {"pair": given.pair})

    want = oracles.numerical_gradient(lambda z: truth(z, batch(1)), logits())
    assert np.abs(want).max() > 1e-3
    figures = []
    for parts in (1, 2):
        moved, metrics = stepped(name, batch(parts), microbatches=parts)
        found = {k: float(v) for k, v in metrics.items() if k in ("accuracy", "margin", "logit_generated")}
        figures.append(found)
        np.testing.assert_allclose(logits() - moved, want, rtol=1e-6, atol=1e-8)
        assert float(metrics["loss"]) == pytest.approx(truth(logits(), batch(1)), rel=1e-10)
    assert figures[0] == pytest.approx(figures[1])  # means over pairs, whatever the parts


def test_pairs_under_pmap_give_the_gradient_of_the_whole(x64):
    whole, _ = stepped("dpo", batch(1))
    optimizer = optax.sgd(1.0)
    state = init_state(Tabular(), {"logits": jnp.asarray(logits())}, optimizer)
    step = make_train_step(Tabular(), ALGORITHMS["dpo"], optimizer, axis_name="parts")
    run = jax.pmap(step, axis_name="parts", in_axes=(None, 0), devices=jax.devices()[:2])
    state, _ = run(state, split_batch(batch(2), 2))
    for device in range(2):
        np.testing.assert_allclose(state.params["logits"][device], whole, rtol=1e-10)


def test_labels_take_the_kl_from_responses_to_other_prompts(x64):
    given = batch(1, labels=True)

    def truth(z, at):
        mask = given.packed.mask
        score = oracles.sequence_logratio(scored(z, given.packed), given.ref_logp, mask)
        frozen = oracles.sequence_logratio(scored(at, given.packed), given.ref_logp, mask)
        other = [frozen[b] for _, b in given.pair if b >= 0]
        label = given.advantage
        return oracles.kto(score, label > 0, beta=0.1, kl_logratio=other, valid=label != 0)[0]

    want = oracles.numerical_gradient(lambda z: truth(z, logits()), logits())
    moved, metrics = stepped("kto", given)
    np.testing.assert_allclose(logits() - moved, want, rtol=1e-6, atol=1e-8)
    assert float(metrics["loss"]) == pytest.approx(truth(logits(), logits()), rel=1e-10)


MISSING = [
    ("dpo", "pair", r"learns from pairs: the batch needs pair i32\[M, 2\], the better sample first"),
    ("dpo", "ref_logp", r"data='pairs' needs ref_logp f\[N, R\] in the batch \(see make_scorer\)"),
    ("kto", "advantage", r"learns from labels: the batch needs advantage f\[N\], > 0 where good, < 0 where bad"),
    ("kto", "ref_logp", r"data='labels' needs ref_logp f\[N, R\] in the batch"),
]


BAD = [
    ({"advantage": np.array([np.nan] * 12)}, r"label 0 \(Batch.advantage\) is nan: 1 is good, -1 bad, 0 is left out"),
    ({"advantage": np.arange(12) % 2 * 1.0}, r"labels \(Batch.advantage\) are 0 and above: a bad response is -1"),
    ({"advantage": np.ones(20)}, r"advantage is .*\[20\], expected f\[N\]\|f\[N, R\] with N=12"),
    ({"pair": np.zeros((2, 3), np.int32)}, r"pair has shape \(2, 3\), expected i32\[M, 2\]"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_fields_that_do_not_fit_are_named(change, text):
    with pytest.raises(ValueError, match=text):
        stepped("kto", batch(1, labels=True)._replace(**change))


@pytest.mark.parametrize(("name", "field", "text"), MISSING)
def test_missing_fields_are_named(name, field, text):
    with pytest.raises(ValueError, match=text):
        stepped(name, batch(1, labels=True)._replace(**{field: None}))
