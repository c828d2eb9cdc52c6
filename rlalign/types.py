"""The axis alphabet and the pytrees that travel along the arrows of the loop.

    prompts -> rollout -> reward -> advantage -> pack -> train_step -> checkpoint, metrics, report

Axes, everywhere in the library:

    N  samples (responses)        B  rows of a batch         H  query heads       V  vocabulary
    R  response tokens            T  tokens in a row         K  key/value heads   W  model width
    G  samples a prompt           P  prompt tokens           D  head width        M  samples of one part, or pairs

Every pytree here is immutable data without behaviour; arrays may be NumPy (host side) or JAX.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # a jax.Array or np.ndarray; importing jax takes seconds, and reward workers need only these types
Params = Any  # a nested dict of arrays: what Decoder.init returns and Decoder.apply takes
Conversation = str | Sequence[Mapping[str, str]]  # one text, or messages: [{"role": "user", "content": "..."}, ...]


class TokenForest(NamedTuple):
    """A set of token sequences in which each shared prefix is stored once.

    Rows hold trees in depth-first order, so the descendants of column `j` are exactly the columns
    `j < i < visible_until[j]`, and one int per key is the whole attention mask:

        key j is visible to query i  <=>  j <= i < visible_until[j]

    Padding: token 0, position 0, parent -1, visible_until 0.

    Attributes:
      token: i32[B, T], vocabulary ids.
      position: i32[B, T], distance from the root: what rotary embeddings see.
      parent: i32[B, T], column of the predecessor in the same row; -1 at a root.
      visible_until: i32[B, T], one past the column of the last descendant.
    """

    token: Array
    position: Array
    parent: Array
    visible_until: Array


class Packed(NamedTuple):
    """A forest and the place in it of every response token.

    Attributes:
      forest: TokenForest of [B, T].
      node: i32[N, R], `row * T + column` of each response token; -1 where masked.
      mask: b[N, R], True at the response tokens that count.
    """

    forest: TokenForest
    node: Array
    mask: Array


class Batch(NamedTuple):
    """What a train step consumes. Absent fields are None.

    Attributes:
      packed: Packed of N samples.
      advantage: f[N] or f[N, R].
      old_logp: f[N, R], log-probs under the policy that sampled, at the training temperature; None means on-policy.
      ref_logp: f[N, R], log-probs under the frozen reference policy.
      weight: f[N, R] or f[N], stop-gradient importance correction.
      pair: i32[M, 2], samples (real or chosen, generated or rejected); -1 is padding.
      allowed: (table b[S, V], state i32[N, R]): log-probs are renormalised over the tokens that table[state] allows;
        see rlalign.strings.
    """

    packed: Packed
    advantage: Array | None = None
    old_logp: Array | None = None
    ref_logp: Array | None = None
    weight: Array | None = None
    pair: Array | None = None
    allowed: tuple[Array, Array] | None = None


class StopReason(enum.IntEnum):
    """Why a response ended."""

    EOS = 0
    MAX_TOKENS = 1


class Rollouts(NamedTuple):
    """Sampled responses, `num_samples` a prompt, those of prompt i at rows i * G to (i + 1) * G.

    Attributes:
      tokens: i32[N, R], the end-of-sequence token included; 0 after the end.
      mask: b[N, R], True up to and including the end-of-sequence token.
      logp: f32[N, R], log-prob at the training temperature, untruncated: what old_logp uses.
      behaviour_logp: f32[N, R], log-prob under what was really sampled from (top-k, top-p, greedy): for the
        importance correction only.
      stop: i32[N], a StopReason.
      prompt: i32[N], index into the list of prompts.
    """

    tokens: Array
    mask: Array
    logp: Array
    behaviour_logp: Array
    stop: Array
    prompt: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt and whatever its reward needs to know; `np.asarray(prompt)` is its tokens.

    Attributes:
      id: stable identity; random keys fold it, so that a sample does not depend on the place in the batch.
      tokens: i32[P], never empty.
      text: what `tokens` encode.
      example: the record it came from (JSON values), handed to the reward function as it is.
    """

    id: int
    tokens: np.ndarray
    text: str = ""
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.tokens, dtype=dtype) if copy else np.asarray(self.tokens, dtype=dtype)


class Encoding(NamedTuple):
    """How prompts and responses become tokens, for sampling and for training alike: two functions.

    Attributes:
      prompt: text or messages -> i32[P], what a response is sampled after.
      response: (that prompt, the answer's text) -> i32[R], what the model is to write, the end token included.
    """

    prompt: Callable[[Any], np.ndarray]  # a Conversation; one of your own may take texts alone
    response: Callable[[Any, str], np.ndarray]


class Demonstration(NamedTuple):
    """A response to imitate.

    Attributes:
      prompt: what it answers.
      response: i32[R], the end token included.
    """

    prompt: Prompt
    response: np.ndarray


class Preference(NamedTuple):
    """Two responses to one prompt, of which the first is the better.

    Attributes:
      prompt: what they answer.
      chosen, rejected: i32[R], the end token included.
    """

    prompt: Prompt
    chosen: np.ndarray
    rejected: np.ndarray


class Rewards(NamedTuple):
    """One reward a sample.

    Attributes:
      reward: f64[N]; NaN where invalid.
      valid: b[N], False where the reward function raised, hung, died or returned no finite number.
      reason: tuple of N strings, empty where valid.
      terms: name -> f64[N], NaN where invalid, where the reward function returned its terms beside the total.
    """

    reward: np.ndarray
    valid: np.ndarray
    reason: tuple[str, ...]
    terms: Mapping[str, np.ndarray] | None = None


class TrainState(NamedTuple):
    """Everything that a train step changes.

    Attributes:
      params: the decoder's parameters.
      opt_state: the optimizer's state.
      step: i32[], updates applied.
      skipped: i32[], updates refused because the gradient was not finite or nothing counted.
    """

    params: Params
    opt_state: Any
    step: Array
    skipped: Array
