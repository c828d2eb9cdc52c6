"""The train step: a pure function (state, batch) -> (state, metrics), compiled once per shape.

    batch --split--> [microbatches, shards, ...] --scan--> sum of gradients --optimizer--> state

Denominators are those of the whole batch, so any split gives the gradient of the whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlalign.algorithms import Algorithm, try_out
from rlalign.checks import expect
from rlalign.forest import bucket, split
from rlalign.hosts import put
from rlalign.models.decoder import Decoder
from rlalign.models.lora import frozen, trained
from rlalign.train.mesh import (
    ROWS,
    keep_sharding,
    place_params,
    row_shards,
    shard_decoder,
)
from rlalign.train.objective import batch_count, batch_loss, part_share
from rlalign.train.optimizer import with_master_weights
from rlalign.types import Batch, Params, TrainState

Metrics = dict[str, jax.Array]
MAXIMA = frozenset({"ratio_error"})  # metrics that parts combine by their maximum; the others by a mean over tokens


def init_state(
    decoder: Decoder, params: Params, optimizer: optax.GradientTransformation, *, copy: bool = True
) -> TrainState:
    """The state before the first step; on a mesh, the optimizer's moments are sharded like their parameters.

    Args:
      decoder: the model.
      params: its parameters; bfloat16 and float16 ones get a float32 copy in the optimizer's state. Of an adapted model
        (add_lora) the adapter alone gets optimizer state and is copied: the rest is shared with the caller's.
      optimizer: the one that make_train_step gets.
      copy: False saves the memory of a second copy; the first step then deletes the caller's `params`, because it
        donates its state.
    """
    del decoder
    optimizer = with_master_weights(optimizer)
    if copy:
        params = {**frozen(params), **jax.tree.map(jnp.copy, trained(params))}
    # Two zeros: the step donates the state, and no buffer can be donated twice.
    state = TrainState(params, optimizer.init(trained(params)), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    mesh = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)  # a tracer has none
    return place_params(state, mesh) if isinstance(mesh, Mesh) else state


def split_batch(batch: Batch, parts: int) -> Batch:
    """Every field cut into parts with a leading [parts] axis (forest.split); padding slots have mask False.

    Raises:
      ValueError: rows that do not divide, a pair whose samples lie in different parts, or one with an empty response.
    """
    packed, sample = split(batch.packed, parts)
    live = sample >= 0

    def part(x):
        if x is None:
            return None
        x = np.asarray(x)[sample]
        return np.where(live.reshape(live.shape + (1,) * (x.ndim - 2)), x, 0)

    fields = {name: part(getattr(batch, name)) for name in ("advantage", "old_logp", "ref_logp", "weight")}
    allowed = None
    if batch.allowed is not None:  # every part has the whole table
        table, state = batch.allowed
        allowed = np.broadcast_to(np.asarray(table), (parts, *table.shape)), part(state)
    return Batch(packed, **fields, pair=_split_pairs(batch.pair, sample), allowed=allowed)


def _split_pairs(pair, sample: np.ndarray):
    """Pairs of each part by local index, i32[parts, M, 2], -1 where there is none."""
    if pair is None:
        return None
    count = max(int(sample.max()), int(np.max(pair))) + 1
    part, slot = np.full(count, -1), np.full(count, -1)
    where = np.argwhere(sample >= 0)
    part[sample[sample >= 0]], slot[sample[sample >= 0]] = where[:, 0], where[:, 1]
    pair = np.asarray(pair)
    pair = pair[(pair >= 0).all(axis=1)]
    home = part[pair]
    if (home < 0).any():
        bad = int(np.flatnonzero((home < 0).any(axis=1))[0])
        raise ValueError(f"pair {pair[bad].tolist()} has a sample without a response token: drop the pair")
    if (home[:, 0] != home[:, 1]).any():
        bad = int(np.flatnonzero(home[:, 0] != home[:, 1])[0])
        raise ValueError(f"pair {pair[bad].tolist()} lies in two parts: give both samples one `unit` in pack")
    most = int(np.bincount(home[:, 0], minlength=1).max()) if len(home) else 0
    out = np.full((sample.shape[0], max(bucket(most), sample.shape[1]), 2), -1, np.int32)
    for k in range(sample.shape[0]):
        mine = slot[pair[home[:, 0] == k]]
        out[k, : len(mine)] = mine
    return out


def _gradient(loss, params, batch: Batch, axis_name: str | None, mesh: Mesh | None, algorithm: Algorithm):
    """Gradient and metrics summed over microbatches [microbatches, S, ...], and over axis_name."""
    mask = batch.packed.mask

    def total(x):
        return jax.lax.psum(x, axis_name) if axis_name else x

    denominator = total(batch_count(algorithm, batch))
    tokens = jnp.maximum(total(jnp.sum(mask)), 1)

    def part(micro: Batch):
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, micro, denominator)
        share = part_share(algorithm, micro, tokens, denominator)
        combine = {k: v if k in MAXIMA or k == "loss" else v * share for k, v in metrics.items()}
        wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradient)
        return keep_sharding(wide, mesh), combine  # cut before it is summed: the head's alone is 2 GiB of a 7B model

    def add(carry, micro):
        gradient, metrics = part(micro)
        summed = {k: jnp.maximum(carry[1][k], v) if k in MAXIMA else carry[1][k] + v for k, v in metrics.items()}
        return (jax.tree.map(jnp.add, carry[0], gradient), summed), None

    first = jax.tree.map(lambda x: x[0], batch)
    if mask.shape[0] == 1:
        gradient, metrics = part(first)
    else:  # metrics that are combined by their maximum are not negative, so all sums begin at 0
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, first))
        (gradient, metrics), _ = jax.lax.scan(add, (keep_sharding(start[0], mesh), start[1]), batch)
    if axis_name:
        metrics = {k: jax.lax.pmax(v, axis_name) if k in MAXIMA else total(v) for k, v in metrics.items()}
    return total(gradient), metrics | {"tokens": total(jnp.sum(mask))}


def _update(
    loss, optimizer, axis_name, mesh: Mesh | None, algorithm: Algorithm, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One optimizer step; a gradient that is not finite, or exactly zero, leaves parameters and moments as they are.

    So does a loss that the optimizer marks as a spike (watch_loss).
    """
    gradient, metrics = _gradient(loss, state.params, batch, axis_name, mesh, algorithm)
    norm = optax.tree.norm(gradient)
    # A zero gradient holds no information, but Adam's moments would decay and move the parameters all the same.
    good = jnp.isfinite(norm) & (norm > 0)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, loss=metrics["loss"])
    spiked = optax.tree.get(opt_state, "spiked")
    if spiked is not None:
        good, metrics = good & ~spiked, metrics | {"spiked": spiked.astype(jnp.int32)}
    new = (optax.apply_updates(state.params, updates), opt_state)
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (state.params, state.opt_state))
    taken = good.astype(jnp.int32)
    metrics = metrics | {"grad_norm": norm, "skipped": 1 - taken}
    return TrainState(params, opt_state, state.step + taken, state.skipped + 1 - taken), metrics


def make_train_step(
    decoder: Decoder,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step of one algorithm: forest forward, log-probs, loss, gradient, optimizer.

    Args:
      decoder: the model.
      algorithm: an entry of ALGORITHMS, or yours.
      optimizer: any optax transformation.
      mesh: rows go over data and fsdp, heads and columns over tensor; the state must lie on it.
      microbatches: the gradient is accumulated over this many parts of the rows, in order.
      axis_name: for jax.pmap or shard_map: the returned function is then plain and traceable, takes one part a device
        (split_batch), and sums over this axis.

    Returns:
      step(state, batch) -> (state, metrics). Without axis_name it is compiled, splits the batch itself (rows must be
      packed in microbatches * data * fsdp parts) and donates the state: do not use the old one again. A gradient that
      is not finite or exactly zero leaves parameters and optimizer state bitwise unchanged and counts in `skipped`.
      Metrics are device scalars: loss, grad_norm, entropy, tokens, skipped, kl if used, and those of the loss.

    Raises:
      ValueError: options that do not go together; at the first batch: fields that the algorithm needs and are missing.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches}")
    if axis_name is not None and (mesh is not None or microbatches > 1):
        raise ValueError("axis_name goes without mesh and microbatches: split the batch over the devices instead")
    if (algorithm.score == "reward") != decoder.config.reward_head:
        has = "has" if decoder.config.reward_head else "lacks"
        raise ValueError(
            f"algorithm.score={algorithm.score!r}, and the model {has} a reward head: bradley_terry trains what "
            "add_reward_head gives, and nothing else does"
        )
    model = shard_decoder(decoder, mesh)
    optimizer = with_master_weights(optimizer)

    def loss(params, batch, denominator):
        return batch_loss(model, algorithm, mesh, params, batch, denominator)

    def update(state, rest, batch):
        whole = lambda params, *others: loss({**rest, **params}, *others)
        state, metrics = _update(whole, optimizer, axis_name, mesh, algorithm, state, batch)
        return keep_sharding(state, mesh), metrics

    try_out(algorithm)

    def part_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_fields(algorithm, batch)
        arranged = jax.tree.map(lambda x: x[None, None], batch)  # one microbatch of one shard
        return _on_trained(update, state, arranged)

    if axis_name is not None:
        return part_step
    return _CompiledStep(algorithm, microbatches, mesh, jax.jit(update, donate_argnums=0))


@dataclasses.dataclass(frozen=True)
class _CompiledStep:
    """A train step that splits its batch on the host and runs compiled; `lower` gives what would run."""

    algorithm: Algorithm
    microbatches: int
    mesh: Mesh | None
    update: Any

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_fields(self.algorithm, batch)
        return _on_trained(self.update, state, arrange(batch, self.microbatches, self.mesh))

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """What would be compiled, of a state of arrays or of their shapes; needs none of the mesh's devices."""
        _check_fields(self.algorithm, batch)
        slim, rest = _without_frozen(state)
        place = None if self.mesh is None else NamedSharding(self.mesh, P(None, ROWS))
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=place)
        return self.update.trace(slim, rest, jax.tree.map(shape, _cut(batch, self.microbatches, self.mesh)))

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """For compile-time analysis: step.lower(state, batch).compile().memory_analysis()."""
        return self.trace(state, batch).lower()


def _without_frozen(state: TrainState) -> tuple[TrainState, Params]:
    """The state with what is trained alone, and the frozen parameters: the step donates the first, never the second."""
    return state._replace(params=trained(state.params)), frozen(state.params)


def _on_trained(update, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    slim, rest = _without_frozen(state)
    new, metrics = update(slim, rest, batch)
    return new._replace(params={**rest, **new.params}), metrics


def _check_fields(algorithm: Algorithm, batch: Batch) -> None:
    token = "f[N, R]"
    sizes = expect(
        mask=(batch.packed.mask, "b[N, R]"),
        node=(batch.packed.node, "i[N, R]"),
        advantage=(batch.advantage, f"f[N]|{token}"),
        old_logp=(batch.old_logp, token),
        ref_logp=(batch.ref_logp, token),
        weight=(batch.weight, f"f[N]|{token}"),
        pair=(batch.pair, "i[M, P]"),
    )
    if batch.allowed is not None:
        table, state = batch.allowed
        expect(bind=sizes, allowed_table=(table, "b[S, V]"), allowed_state=(state, "i[N, R]"))
    if batch.pair is not None and batch.pair.shape[1] != 2:
        raise ValueError(f"pair has shape {batch.pair.shape}, expected i32[M, 2]")
    if algorithm.data == "labels" and isinstance(batch.advantage, np.ndarray):
        _check_labels(batch.advantage)
    if algorithm.data == "rollouts" and batch.advantage is None:
        raise ValueError("this algorithm learns from rewards: the batch needs advantage f[N] (see make_batch)")
    if algorithm.data == "labels" and batch.advantage is None:
        raise ValueError(
            "this algorithm learns from labels: the batch needs advantage f[N], > 0 where good, < 0 where bad"
        )
    if algorithm.data == "pairs" and batch.pair is None:
        raise ValueError("this algorithm learns from pairs: the batch needs pair i32[M, 2], the better sample first")
    if algorithm.needs_reference and batch.ref_logp is None:
        why = f"kl_coef={algorithm.kl_coef}" if algorithm.kl_coef > 0 else f"data={algorithm.data!r}"
        raise ValueError(f"{why} needs ref_logp f[N, R] in the batch (see make_scorer)")


def _check_labels(label: np.ndarray) -> None:
    if not np.isfinite(label).all():
        row = int(np.flatnonzero(~np.isfinite(label))[0])
        raise ValueError(f"label {row} (Batch.advantage) is {label[row]}: 1 is good, -1 bad, 0 is left out")
    if (label == 0).any() and not (label < 0).any():
        raise ValueError("labels (Batch.advantage) are 0 and above: a bad response is -1, 0 is left out")


def _cut(batch: Batch, microbatches: int, mesh: Mesh | None) -> Batch:
    """Fields cut into [microbatches, shards, ...], on the host."""
    shards = row_shards(mesh)
    parts = split_batch(batch, microbatches * shards)
    return jax.tree.map(lambda x: x.reshape(microbatches, shards, *x.shape[1:]), parts)


def arrange(batch: Batch, microbatches: int, mesh: Mesh | None) -> Batch:
    """Fields cut into [microbatches, shards, ...] and, on a mesh, put where the step wants them."""
    arranged = _cut(batch, microbatches, mesh)
    if mesh is None:
        return arranged
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, P(None, ROWS))), arranged)
