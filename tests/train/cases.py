"""A batch that uses every field, and what a step over it must give: dense attention, repeated prompts, plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.algorithms import ALGORITHMS
from rlalign.compat import CompileCounter
from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Decoder
from rlalign.train import OptimizerConfig, init_state, make_optimizer, make_train_step, place_params, split_batch
from rlalign.types import Batch
from tests.tiny import dense_decoder, ragged_groups, random_params

MODEL = ModelConfig(
    vocab_size=16, width=16, layers=2, heads=4, kv_heads=2, head_width=4, mlp_width=24, max_positions=64,
    tied_head=False, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, dtype="float64",
)  # fmt: skip
NARROW = dataclasses.replace(MODEL, dtype="float32")
ALGORITHM = dataclasses.replace(ALGORITHMS["grpo"], kl_coef=0.5, entropy_coef=0.01, temperature=0.8)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.5, weight_decay=0.01, eps=1e-4)

SAMPLES = ragged_groups(0, [(9, (4, 6, 0, 3)), (5, (1, 2, 5)), (7, (6, 6, 2, 1, 3))], vocab=16)
COUNT, RESPONSE, LONGEST = 12, 6, 16


def params(config=MODEL, seed=0):
    return random_params(config, seed=seed)


@functools.cache
def plain():
    """(params, cotangents of logp and entropy) -> (logp, entropy) f[N, R] of the repeated batch, and the gradient."""
    decoder = dense_decoder(MODEL)
    at, mask = SAMPLES.response(RESPONSE)
    sample = np.arange(COUNT)[:, None]

    def score(params):
        forest = SAMPLES.repeated(LONGEST)
        logits = decoder.apply(params, forest) @ decoder.head(params) / ALGORITHM.temperature
        logp = jax.nn.log_softmax(logits, axis=-1)[sample, at - 1]
        chosen = jnp.take_along_axis(logp, forest.token[sample, at][..., None], axis=-1)[..., 0]
        return jnp.where(mask, chosen, 0), jnp.where(mask, -jnp.sum(jnp.exp(logp) * logp, axis=-1), 0)

    @jax.jit
    def run(params, *cotangents):
        out, pull = jax.vjp(score, params)
        return out, pull(cotangents)[0]

    return run


@functools.cache
def fields():
    """Advantage, old and reference log-probs and weight of every sample: some ratios are clipped, none is 1."""
    rng = np.random.default_rng(1)
    zero = np.zeros((COUNT, RESPONSE))
    logp = np.asarray(plain()(params(), zero, zero)[0][0])
    return {
        "advantage": rng.normal(size=COUNT),
        "old_logp": logp + rng.normal(0, 0.3, logp.shape),
        "ref_logp": logp + rng.normal(0, 0.5, logp.shape),
        "weight": rng.uniform(0.5, 1.5, logp.shape),
    }


def batch(parts=1, dtype="float64", num_rows=None, **change) -> Batch:
    packed = SAMPLES.pack(row_length=48, parts=parts, num_rows=num_rows, response_length=RESPONSE)
    arrays = fields() | change
    return Batch(packed, **{k: None if x is None else x.astype(dtype) for k, x in arrays.items()})


def loss_by_hand(logp, entropy, old_logp, advantage, ref_logp, weight):
    """GRPO's loss with KL (k3) and entropy bonus, metrics, and its derivatives by logp and entropy, token by token."""
    _, mask = SAMPLES.response(RESPONSE)
    by_logp, by_entropy = np.zeros(mask.shape), np.zeros(mask.shape)
    live = int(mask.any(axis=1).sum())
    metrics = dict.fromkeys(("loss", "kl", "entropy", "clip_share", "approx_kl", "ratio_error", "tokens"), 0.0)
    tokens = mask.sum()
    for n, r in np.argwhere(mask):
        share = 1 / (live * mask[n].sum())
        ratio, far = np.exp(logp[n, r] - old_logp[n, r]), ref_logp[n, r] - logp[n, r]
        clipped = min(max(ratio, 0.8), 1.2)
        objective = min(ratio * advantage[n], clipped * advantage[n]) * weight[n, r]
        cut = clipped * advantage[n] < ratio * advantage[n]
        kl = np.exp(far) - far - 1
        metrics["loss"] += share * (-objective + ALGORITHM.kl_coef * kl - ALGORITHM.entropy_coef * entropy[n, r])
        by_logp[n, r] = share * (
            ALGORITHM.kl_coef * (1 - np.exp(far)) - (not cut) * ratio * advantage[n] * weight[n, r]
        )
        by_entropy[n, r] = -share * ALGORITHM.entropy_coef
        metrics["kl"] += kl / tokens
        metrics["entropy"] += entropy[n, r] / tokens
        metrics["clip_share"] += cut / tokens
        metrics["approx_kl"] += (ratio - 1 - np.log(ratio)) / tokens
        metrics["ratio_error"] = max(metrics["ratio_error"], abs(ratio - 1))
        metrics["tokens"] += 1
    return metrics, by_logp, by_entropy


@functools.cache
def by_hand(steps=3):
    """Parameters and metrics after each of some steps: the loss in loops, AdamW and the clip from their papers."""
    at, data, zero = params(), fields(), np.zeros((COUNT, RESPONSE))
    first, second = (jax.tree.map(lambda x: np.zeros(x.shape), at) for _ in range(2))
    history = []
    for t in range(steps):
        (logp, entropy), _ = plain()(at, zero, zero)
        metrics, *cotangents = loss_by_hand(np.asarray(logp), np.asarray(entropy), **data)
        _, gradient = plain()(at, *cotangents)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
        shrink = min(1, OPTIMIZER.max_grad_norm / norm)
        gradient = jax.tree.map(lambda g, shrink=shrink: np.asarray(g) * shrink, gradient)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)

        def move(x, m, v, t=t):
            x, m, v = np.asarray(x), m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
            change = m / (np.sqrt(v) + OPTIMIZER.eps) + OPTIMIZER.weight_decay * x
            return x - OPTIMIZER.learning_rate * change

        at = jax.tree.map(move, at, first, second)
        history.append((at, metrics | {"grad_norm": norm, "skipped": 0, "ratio_cut_share": 0}))
    return history


def new_state(config=MODEL, mesh=None):
    decoder, at = Decoder(config), jax.tree.map(jnp.copy, params(config))
    return init_state(decoder, at if mesh is None else place_params(at, mesh), make_optimizer(OPTIMIZER))


@functools.cache
def step(config=MODEL, algorithm=ALGORITHM, mesh=None, microbatches=1):
    return make_train_step(Decoder(config), algorithm, make_optimizer(OPTIMIZER), mesh=mesh, microbatches=microbatches)


def train(data, config=MODEL, steps=3, mesh=None, **options):
    """State and metrics after some steps; all but the first compile nothing."""
    state, history = new_state(config, mesh), []
    counter = CompileCounter()
    for index in range(steps):
        counter.take()
        state, metrics = step(config, mesh=mesh, **options)(state, data)
        history.append(jax.device_get(metrics))
        assert index == 0 or counter.take() == 0
    return state, history


def train_pmap(data, devices, steps=3):
    """The same with jax.pmap, one part a device."""
    update = make_train_step(Decoder(MODEL), ALGORITHM, make_optimizer(OPTIMIZER), axis_name="parts")
    spread = jax.pmap(update, axis_name="parts", devices=jax.devices()[:devices])
    state = jax.tree.map(lambda x: jnp.stack([x] * devices), new_state())
    history = []
    for _ in range(steps):
        state, metrics = spread(state, split_batch(data, devices))
        history.append(jax.device_get(metrics))
    return state, history


def assert_near(got, expected, tolerance):
    """Each leaf, relative to its largest entry."""
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= tolerance * (np.abs(y).max() or 1.0), path


def assert_like_by_hand(params, history, tolerance):
    """Parameters after the last step, and every metric of every step."""
    expected = by_hand()
    assert_near(params, expected[-1][0], tolerance)
    for metrics, (_, by_loops) in zip(history, expected, strict=True):
        assert set(metrics) == set(by_loops)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, by_loops[name], rtol=100 * tolerance, atol=tolerance, err_msg=name)
