"""Reject sampling over texts, exactly: a response is one of the strings that its prompt allows.

    allowed = allowed_strings([[encode(text) for text in texts] for texts in admissible], vocab_size=V, eos=EOS)
    rollouts = sample(decoder, params, prompts, ..., allowed=allowed)
    index = states(allowed, rollouts)                             # i32[N, R]
    logp, _ = token_logprobs(hidden, head, forest, node, allowed=(allowed.table, index))

Drawing whole responses until one is allowed would give the policy given that its response is allowed. Here each token
is drawn from the policy renormalised over the tokens that some allowed string goes on with: another distribution over
strings, and the one whose log-probs the sampler reports and token_logprobs finds again, so that no ratio is biased.

The strings of all prompts are one automaton: equal ends of strings are one state, whichever prompt they belong to.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.forest import bucket
from rlalign.types import Array, Rollouts


class Allowed(NamedTuple):
    """Which tokens may follow, for each of S states of an automaton.

    Attributes:
      table: b[S, V]. State 0 allows everything: it is where a response is that has ended.
      token: i32[S, C], those allowed, one by one; -1 for none.
      after: i32[S, C], the state that each of them leads to.
      start: i32[B], the state of each prompt's first token.
    """

    table: Array
    token: Array
    after: Array
    start: Array


def allowed_strings(strings: Sequence[Sequence[Iterable[int]]], *, vocab_size: int, eos: int) -> Allowed:
    """The automaton of what each prompt allows.

    Args:
      strings: of each prompt, token ids, without an end; at least one, and none of them empty.
      vocab_size: V.
      eos: the token that ends a string.

    Returns:
      Allowed, NumPy; S and C padded to a bucket, so that calls of many sizes share a program.

    Raises:
      ValueError: a prompt without strings, an empty one, a token outside the vocabulary, or an eos inside a string.
    """
    number: dict[tuple[tuple[int, int], ...], int] = {}
    found: dict[frozenset[tuple[int, ...]], int] = {}
    start = []
    for prompt, own in enumerate(strings):
        whole = frozenset(tuple(int(t) for t in text) for text in own)
        _check(prompt, whole, vocab_size, eos)
        if whole not in found:
            found[whole] = _first_state(number, whole, eos)
        start.append(found[whole])
    states_, arcs_ = bucket(len(number) + 1), bucket(max(map(len, number)))
    table = np.zeros((states_, vocab_size), bool)
    table[0] = True
    token, after = np.full((states_, arcs_), -1, np.int32), np.zeros((states_, arcs_), np.int32)
    for arcs, row in number.items():
        for place, (one, to) in enumerate(arcs):
            token[row, place], after[row, place], table[row, one] = one, to, True
    return Allowed(table, token, after, np.array(start, np.int32))


def _first_state(number: dict[tuple[tuple[int, int], ...], int], strings: frozenset[tuple[int, ...]], eos: int) -> int:
    """The state from which `strings` are read; those that `number`, arcs -> state, has not yet are added to it.

    Equal arcs are one state, so numbering a trie from its leaves gives the smallest automaton.
    """
    trie: list[dict[int, int]] = [{}]  # of each node, token -> node; children lie behind their parents
    for text in sorted(strings):
        node = 0
        for token in text:
            if token not in trie[node]:
                trie[node][token] = len(trie)
                trie.append({})
            node = trie[node][token]
        trie[node][eos] = -1
    state = np.zeros(len(trie) + 1, np.int64)  # the last place, that of an end, stays 0
    for node in reversed(range(len(trie))):
        arcs = tuple((token, int(state[child])) for token, child in sorted(trie[node].items()))
        state[node] = number.setdefault(arcs, len(number) + 1)
    return int(state[0])


def _check(prompt: int, own: frozenset[tuple[int, ...]], vocab_size: int, eos: int) -> None:
    if not own or () in own:
        raise ValueError(f"strings[{prompt}] {'holds an empty string' if own else 'is empty'}: nothing could be said")
    tokens = {token for text in own for token in text}
    if min(tokens) < 0 or max(tokens) >= vocab_size or eos in tokens:
        bad = eos if eos in tokens else min(tokens) if min(tokens) < 0 else max(tokens)
        raise ValueError(
            f"strings[{prompt}] holds token {bad}: not eos ({eos}), which is added, and below vocab_size={vocab_size}"
        )


def check_fits(allowed: Allowed, *, prompts: int, vocab_size: int, eos_ids: Sequence[int], max_tokens: int) -> None:
    """ValueError where a call of `sample` could not say these strings to their ends."""
    if len(allowed.start) != prompts:
        raise ValueError(f"allowed is of {len(allowed.start)} prompts, and there are {prompts}: one start a prompt")
    if allowed.table.shape[1] != vocab_size:
        raise ValueError(f"allowed is of {allowed.table.shape[1]} tokens, the vocabulary has {vocab_size}")
    last = {int(token) for token in np.unique(allowed.token[(allowed.token >= 0) & (allowed.after == 0)])}
    if not last <= set(eos_ids):
        raise ValueError(f"allowed strings end with {sorted(last)}, and sampling with eos_ids={tuple(eos_ids)}")
    if (longest := longest_string(allowed)) > max_tokens:
        raise ValueError(f"max_new_tokens is {max_tokens}, and an allowed string has {longest} tokens with its end")


def longest_string(allowed: Allowed) -> int:
    """Tokens of the longest string, its end included."""
    at, steps = np.unique(allowed.start), 0
    while (at := np.unique(allowed.after[at])).any():
        at, steps = at[at > 0], steps + 1
    return steps + 1


def follow(allowed: Allowed, state: Array, token: Array) -> jax.Array:
    """i32[...]: the states after tokens i32[...]; 0 where a token is not allowed, or ends its string."""
    same = jnp.asarray(allowed.token)[state] == token[..., None]
    return jnp.sum(jnp.where(same, jnp.asarray(allowed.after)[state], 0), axis=-1)


def states(allowed: Allowed, rollouts: Rollouts) -> np.ndarray:
    """i32[N, R]: the state in which each token was drawn, 0 behind the end, for token_logprobs(allowed=...).

    Raises:
      ValueError: a response that is none of its prompt's strings, by its row.
    """
    token, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    now = np.asarray(allowed.start)[np.asarray(rollouts.prompt)]
    out = np.zeros(token.shape, np.int32)
    for place in range(token.shape[1]):
        live = mask[:, place]
        if not (fits := allowed.table[now, token[:, place]] | ~live).all():
            row = int(np.argmin(fits))
            raise ValueError(f"response {row} says token {token[row, place]} at place {place}, which is not allowed")
        out[:, place] = np.where(live, now, 0)
        same = (allowed.token[now] == token[:, place, None]) & live[:, None]
        now = np.where(same, allowed.after[now], 0).sum(axis=1)
    return out
