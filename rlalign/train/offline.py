"""From examples to what a train step consumes, without rollouts: demonstrations, preferences, labels."""

from collections.abc import Callable, Sequence

import numpy as np

from rlalign.algorithms import Algorithm
from rlalign.forest import pack
from rlalign.types import Array, Batch, Demonstration, Packed, Preference

# responses of each kind of example, the first being the better
RESPONSES = {Demonstration: ("response",), Preference: ("chosen", "rejected")}
# what algorithms learn from which
LEARNT_FROM = {"demonstrations": Demonstration, "pairs": Preference, "labels": Preference}


def pack_examples(
    examples: Sequence[Demonstration | Preference],
    *,
    row_length: int,
    parts: int = 1,
    num_rows: int | None = None,
    response_length: int | None = None,
) -> Packed:
    """pack() of the responses of all examples, those of one example next to each other and in one part.

    Args:
      examples: of one kind; the prompt of a preference is stored once for both responses.
      row_length, parts, num_rows, response_length: see pack.

    Returns:
      Packed of N = examples times their responses.

    Raises:
      ValueError: no examples, or what pack refuses.
    """
    if not len(examples):
        raise ValueError("no examples: give at least one")
    fields = RESPONSES[type(examples[0])]
    prompts = [np.asarray(example.prompt) for example in examples]
    return pack(
        [np.concatenate([p, getattr(e, f)]) for p, e in zip(prompts, examples, strict=True) for f in fields],
        row_length=row_length,
        response_start=[len(p) for p in prompts for _ in fields],
        unit=np.repeat(np.arange(len(examples)), len(fields)),
        parts=parts,
        num_rows=num_rows,
        response_length=response_length,
    )


def make_offline_batch(
    algorithm: Algorithm,
    examples: Sequence[Demonstration | Preference],
    *,
    row_length: int = 4096,
    parts: int = 1,
    num_rows: int | None = None,
    response_length: int | None = None,
    reference: Callable[[Packed], np.ndarray] | None = None,
    ref_logp: Array | None = None,
    valid: Array | None = None,
) -> Batch:
    """A batch to learn from without sampling: the prompt of a pair is stored and computed once.

    Args:
      algorithm: an entry of ALGORITHMS with data="demonstrations" (Demonstrations), "pairs" or "labels" (Preferences;
        as labels the chosen response is good and the rejected one bad, and no mismatched ones are made: kto's z is then
        that of these responses themselves).
      examples: M of them.
      row_length, parts, num_rows, response_length: see pack.
      reference: packed -> log-probs f[N, R] of the frozen reference (make_scorer with its parameters); called once,
        where the algorithm needs it.
      ref_logp: f[N, R], the same computed before; in place of `reference`.
      valid: b[M]; examples with False enter nothing.

    Returns:
      Batch of N = M or 2 M samples: the responses of example i from row i * N / M on.

    Raises:
      ValueError: an algorithm that learns from rollouts, examples of another kind, or no reference where it needs one.
    """
    kind = LEARNT_FROM.get(algorithm.data)
    if kind is None:
        raise ValueError(f"make_offline_batch is for {', '.join(LEARNT_FROM)}; this algorithm has {algorithm.data!r}")
    for number, example in enumerate(examples):
        if not isinstance(example, kind):
            raise ValueError(
                f"example {number} is a {type(example).__name__}, and this algorithm learns from {algorithm.data}: "
                f"give {kind.__name__}s"
            )
    packed = pack_examples(
        examples, row_length=row_length, parts=parts, num_rows=num_rows, response_length=response_length
    )
    if algorithm.needs_reference and ref_logp is None:
        if reference is None:
            raise ValueError("this algorithm compares with a reference: give reference=, a scorer of it, or ref_logp=")
        ref_logp = reference(packed)
    keep = np.ones(len(examples), bool) if valid is None else np.asarray(valid)
    each = len(RESPONSES[kind])
    if algorithm.data == "pairs":
        pair = np.arange(2 * len(examples), dtype=np.int32).reshape(-1, 2)
        return Batch(packed, ref_logp=ref_logp, pair=np.where(keep[:, None], pair, -1))
    mask = packed.mask & np.repeat(keep, each)[:, None]
    packed = packed._replace(mask=mask, node=np.where(mask, packed.node, -1))
    if algorithm.data == "demonstrations":
        return Batch(packed, ref_logp=ref_logp)
    return Batch(packed, ref_logp=ref_logp, advantage=np.tile(np.array([1.0, -1.0], np.float32), len(examples)))
