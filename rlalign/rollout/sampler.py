"""Sample responses: prefill once a prompt, decode all samples of a group against one prefix cache.

A sample depends on (seed, step, prompt id, sample) and nothing else: its key is folded from them, so it is the same
whatever the order and size of the batch or the number of devices.
"""

import collections
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlalign.forest import bucket
from rlalign.hosts import fetch, put
from rlalign.models.decoder import Decoder
from rlalign.rollout.cache import Prefix, Suffix, attend_decode, attend_prefill, empty_prefix, empty_suffix
from rlalign.rollout.config import SampleConfig
from rlalign.strings import Allowed, check_fits, follow
from rlalign.train.mesh import ROWS, AnyMesh, gather_embedding, gather_params, row_shards, shard_decoder
from rlalign.types import Params, Prompt, Rollouts, StopReason, TokenForest

SHORTEST_PROMPT = 8  # prompts are padded to a bucket of at least this many tokens


class _Progress(NamedTuple):
    """What the decoding loop carries; arrays [B, G, R] unless noted."""

    step: jax.Array  # i32[], tokens written
    alive: jax.Array  # b[B, G]
    state: jax.Array  # i32[B, G], of the strings that are allowed
    suffix: Suffix
    token: jax.Array
    mask: jax.Array
    logp: jax.Array
    behaviour_logp: jax.Array


def truncated(logits: jax.Array, config: SampleConfig) -> jax.Array:
    """Logits f[..., V] with those outside top_k and top_p at -inf; chosen by place, because a compiler may compute a
    value that is compared with a threshold twice, rounded otherwise, and then no token reaches it."""

    def only(index, kept):
        mask = jnp.put_along_axis(jnp.zeros(logits.shape, bool), index, kept, axis=-1, inplace=False)
        return jnp.where(mask, logits, -jnp.inf)

    if config.top_k is not None and config.top_k < logits.shape[-1]:
        index = jax.lax.top_k(logits, config.top_k)[1]
        logits = only(index, jnp.ones(index.shape, bool))
    if config.top_p is not None and config.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        prob = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        logits = only(order, jnp.cumsum(prob, axis=-1) - prob < config.top_p)  # the mass before it has not reached p
    return logits


def _choose(
    config: SampleConfig, allowed: Allowed | None, logits: jax.Array, keys: jax.Array, state: _Progress
) -> _Progress:
    """Draw the token of column `step` from logits f[B, G, V] and write it with its log-probs."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    logits = logits.astype(wide) / config.temperature
    if allowed is not None:
        logits = jnp.where(allowed.table[state.state], logits, -jnp.inf)
    logp = jax.nn.log_softmax(logits, axis=-1)
    if config.greedy:
        token, behaviour = jnp.argmax(logits, axis=-1), None
    else:
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, state.step)
        behaviour = truncated(logp, config)
        token = jax.vmap(jax.vmap(jax.random.categorical))(keys, behaviour)
        behaviour = jax.nn.log_softmax(behaviour, axis=-1)
    token = token.astype(jnp.int32)

    def at_token(x):
        if x is None:  # greedy: the likeliest token has probability 1
            return jnp.zeros(token.shape, wide)
        return jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0]

    def put(column, value):
        value = jnp.where(state.alive, value, jnp.zeros((), column.dtype)).astype(column.dtype)
        return jax.lax.dynamic_update_slice_in_dim(column, value[..., None], state.step, axis=2)

    ended = jnp.zeros(token.shape, bool)
    for eos in config.eos_ids:
        ended |= token == eos
    return state._replace(
        step=state.step + 1,
        alive=state.alive & ~ended,
        state=state.state if allowed is None else follow(allowed, state.state, token),
        token=put(state.token, token),
        mask=put(state.mask, state.alive),
        logp=put(state.logp, at_token(logp)),
        behaviour_logp=put(state.behaviour_logp, at_token(behaviour)),
    )


def _prefill(decoder: Decoder, params: Params, token: jax.Array, length: jax.Array) -> tuple[Prefix, jax.Array]:
    """Caches of prompts i32[B, P] and the hidden state f[B, W] of each one's last token."""
    prompts, width = token.shape
    column = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], token.shape)
    inside = column < length[:, None]
    forest = TokenForest(token, column, column - 1, jnp.where(inside, length[:, None], 0))
    cache = empty_prefix(decoder.config, prompts, width)
    hidden, cache = decoder.run(params, token, column, attend_prefill(decoder.attend(forest)), cache)
    return cache, jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(decoder, config, mesh, params, token, length, real, ids, seed, step, allowed) -> _Progress:
    """All responses to prompts i32[B, P]; rows with real False are padding and never start."""
    params = (gather_params if config.gather_weights else gather_embedding)(params, mesh)
    head, samples, size = decoder.head(params), config.num_samples, config.max_new_tokens
    prompts = token.shape[0]
    wide = jnp.promote_types(decoder.config.dtype, jnp.float32)
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(
        lambda i: jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, i)))(jnp.arange(samples))
    )(ids)
    prefix, last = _prefill(decoder, params, token, length)

    c = decoder.config
    attention = functools.partial(decoder.decode, scale=c.attention_scale, softcap=c.attention_softcap)

    def score(hidden):
        logits = jnp.matmul(hidden, head, preferred_element_type=wide)
        return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

    shape = prompts, samples

    def empty(dtype):
        return jnp.zeros((*shape, size), dtype)

    state = _Progress(
        step=jnp.zeros((), jnp.int32),
        alive=jnp.broadcast_to(real[:, None], shape),
        state=jnp.broadcast_to((jnp.zeros_like(ids, jnp.int32) if allowed is None else allowed.start)[:, None], shape),
        suffix=empty_suffix(decoder.config, prompts, samples, size),
        token=empty(jnp.int32),
        mask=empty(bool),
        logp=empty(wide),
        behaviour_logp=empty(wide),
    )
    first = jnp.broadcast_to(score(last)[:, None, :], (*shape, head.shape[1]))

    def decode(state: _Progress) -> _Progress:
        newest = state.step - 1
        previous = jax.lax.dynamic_index_in_dim(state.token, newest, axis=2, keepdims=False)
        position = jnp.broadcast_to((length + newest)[:, None], previous.shape)
        attend = attend_decode(attention, c, prefix, length, newest)
        hidden, suffix = decoder.run(params, previous, position, attend, state.suffix)
        return _choose(config, allowed, score(hidden), keys, state._replace(suffix=suffix))

    def unfinished(state: _Progress):
        return (state.step < size) & jnp.any(state.alive)

    done = jax.lax.while_loop(unfinished, decode, _choose(config, allowed, first, keys, state))
    return done._replace(suffix=None)  # nobody reads the cache again


def check_prompts(prompts: Sequence, vocab: int) -> list[np.ndarray]:
    """The prompts' tokens; ValueError names what is empty or outside the vocabulary."""
    if not len(prompts):
        raise ValueError("sample needs at least one prompt")
    tokens = [np.asarray(p) for p in prompts]
    for i, p in enumerate(tokens):
        if p.ndim != 1 or p.size == 0 or p.dtype.kind not in "iu":
            raise ValueError(
                f"prompt {i} must be a non-empty 1-D integer array, got {p.dtype}{list(p.shape)}: "
                "drop it, or begin it with a BOS token"
            )
        if p.min() < 0 or p.max() >= vocab:
            raise ValueError(
                f"prompt {i} holds token {p.min() if p.min() < 0 else p.max()}, the vocabulary has {vocab}"
            )
    return tokens


def own_ids(prompts: Sequence) -> list[int]:
    """Prompt.id or the place in the list; a prompt that occurs again (a step over an epoch's end) gets another."""
    seen: collections.Counter[int] = collections.Counter()
    ids = []
    for i, p in enumerate(prompts):
        own = int(p.id) if isinstance(p, Prompt) else i
        ids.append(own + seen[own] * 0x9E3779B1)  # an odd multiplier: no two occurrences agree modulo 2**32
        seen[own] += 1
    return ids


def prompt_buckets(prompts: int, longest: int, mesh: AnyMesh | None) -> tuple[int, int]:
    """(B, P): the shape that so many prompts of at most `longest` tokens are padded to."""
    shards = row_shards(mesh)
    return bucket(-(-prompts // shards)) * shards, bucket(max(SHORTEST_PROMPT, longest))


def trace_sample(
    decoder: Decoder, params: Params, *, prompts: int, longest: int, config: SampleConfig, mesh: Mesh | None = None
) -> jax.stages.Traced:
    """What `sample` would compile for so many prompts of at most `longest` tokens.

    Args:
      decoder: the model.
      params: its parameters, or their shapes with shardings; none of the mesh's devices are needed.
      prompts, longest: how many, and their tokens.
      config, mesh: as in sample.
    """
    count, width = prompt_buckets(prompts, longest, mesh)
    place = None if mesh is None else NamedSharding(mesh, P(ROWS))
    kinds = {(count, width): np.int32, (count,): np.int32}
    token, length = (jax.ShapeDtypeStruct(shape, kind, sharding=place) for shape, kind in kinds.items())
    real, ids = (jax.ShapeDtypeStruct((count,), kind, sharding=place) for kind in (np.bool_, np.uint32))
    return _generate.trace(shard_decoder(decoder, mesh), config, mesh, params, token, length, real, ids, 0, 0, None)


def sample(
    decoder: Decoder,
    params: Params,
    prompts: Sequence,
    *,
    seed: int,
    step: int,
    config: SampleConfig,
    prompt_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    at_least: tuple[int, int] = (1, 1),
    allowed: Allowed | None = None,
) -> Rollouts:
    """config.num_samples responses to each prompt.

    Args:
      decoder: the model.
      params: its parameters, on `mesh` if one is given.
      prompts: Prompts, or 1-D integer arrays; padded to a bucket of lengths and of numbers, compiled once each.
      seed, step: folded into every key; never use a (seed, step) twice with the same prompt.
      config: what to draw from.
      prompt_ids: identities that keys fold; None takes Prompt.id, or the place in the list for arrays.
      mesh: prompts are cut over data and fsdp.
      at_least: (prompts, tokens of the longest) to compile for where there are fewer: calls of many sizes then share
        a program.
      allowed: of allowed_strings, a start a prompt: each response is one of its prompt's strings, tokens are drawn from
        the policy renormalised over what may follow, and so are logp and behaviour_logp.

    Returns:
      Rollouts of N = len(prompts) * num_samples NumPy rows, R = max_new_tokens.

    Raises:
      ValueError: an empty prompt or a token outside the vocabulary, by its index; `allowed` of other prompts, another
        vocabulary or without an end in config.eos_ids, or a string that max_new_tokens cuts.
    """
    tokens = check_prompts(prompts, decoder.config.vocab_size)
    if prompt_ids is None:
        prompt_ids = own_ids(prompts)
    if len(prompt_ids) != len(prompts):
        raise ValueError(f"prompt_ids has {len(prompt_ids)} entries for {len(prompts)} prompts")
    count, width = prompt_buckets(max(len(tokens), at_least[0]), max(*map(len, tokens), at_least[1]), mesh)
    token, length = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    ids, real = np.zeros(count, np.uint32), np.arange(count) < len(tokens)
    for i, p in enumerate(tokens):
        token[i, : len(p)], length[i], ids[i] = p, len(p), int(prompt_ids[i]) % 2**32
    if allowed is not None:
        sizes = {"prompts": len(tokens), "vocab_size": decoder.config.vocab_size}
        check_fits(allowed, **sizes, eos_ids=config.eos_ids, max_tokens=config.max_new_tokens)
        allowed = allowed._replace(start=np.pad(allowed.start, (0, count - len(tokens))))
    arrays = (token, length, real, ids)
    if mesh is not None:
        rows, everywhere = NamedSharding(mesh, P(ROWS)), NamedSharding(mesh, P())
        arrays = tuple(put(x, rows) for x in arrays)
        if allowed is not None:
            places = Allowed(everywhere, everywhere, everywhere, rows)
            allowed = Allowed(*(put(x, place) for x, place in zip(allowed, places, strict=True)))
    done = _generate(shard_decoder(decoder, mesh), config, mesh, params, *arrays, seed, step, allowed)
    return _collect(fetch(done), len(tokens), config)


def _collect(done: _Progress, prompts: int, config: SampleConfig) -> Rollouts:
    def rows(x):
        return x[:prompts].reshape(prompts * config.num_samples, *x.shape[2:])

    stop = np.where(rows(done.alive), StopReason.MAX_TOKENS, StopReason.EOS).astype(np.int32)
    prompt = np.repeat(np.arange(prompts, dtype=np.int32), config.num_samples)
    return Rollouts(rows(done.token), rows(done.mask), rows(done.logp), rows(done.behaviour_logp), stop, prompt)
