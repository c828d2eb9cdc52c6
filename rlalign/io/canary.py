"""The contract canary: bugs of a run that no error shows, found in the numbers that each step has anyway.

A loop of rollout, reward and update holds contracts that nothing enforces: the sampler's log-probs are those of the
trainer, both at one temperature and with the newest weights; every sampled token is learnt from and no other; random
keys are used once; the reference stays where it is. A run that breaks one learns worse, or nothing, without an error.
The canary needs no forward of its own: it compares what rollout, batch and update have left on the host. The limits
are our choice; tests/io/test_canary.py plants the bugs.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlalign.types import Batch, Rollouts, StopReason

log = logging.getLogger(__name__)

CAUSES = {  # kind of alarm -> its probable cause
    "temperature": "sampler and trainer divide logits by different temperatures (sampling.temperature, Algorithm's)",
    "numerics": "sampler and trainer compute another model: positions, masks, precision, or weights loaded differently",
    "stale_weights": "the sampler was right before and is behind now: it does not get the newest weights",
    "eos": "responses that stop at an end token lack it, or go on behind one: eos_ids, or the mask cuts it off",
    "padding": "tokens count that nobody sampled, or sampled ones do not: a mask is off",
    "keys_in_group": "samples of a prompt share a random key: fold the sample's number into it",
    "keys_of_steps": "a prompt got the random numbers of its last visit: fold the step into the key",
    "no_signal": "the rewards of nearly every group are all equal: a reward that is constant, too easy or too hard",
    "reference_start": "the reference is not the policy that the run began with: other weights, or another temperature",
    "reference_moves": "the reference follows the policy: it shares its arrays, or is read anew at every step",
}
RATIO_ERROR = 0.05  # largest |pi_trainer / pi_sampler - 1| of a token, where both are float32
MEAN_KL = 0.02  # nats a token between sampler and trainer, in any precision
SURPRISE = 0.05  # by which share the sampler's -log-probs may differ from the trainer's entropy, besides 4 deviations
TOKENS = 512  # on which that is judged
WINDOW = 32  # steps over which chance is given time to even out
NO_SIGNAL = 0.98  # share of groups in a window
START_KL = 1e-3  # nats a token between the reference and the policy at the first update
STILL_KL = 1e-12  # below which it has not been left after a window of updates


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A contract that does not hold, by the numbers of one step.

    Attributes:
      kind: a key of CAUSES.
      seen: what was seen, with its numbers.
    """

    kind: str
    seen: str

    def __str__(self) -> str:
        return f"{self.seen}; probably {CAUSES[self.kind]}"


class Canary:
    """Watches the steps of one run.

    Args:
      eos_ids: tokens that end a response.
      narrow: sampler and trainer compute in less than float32, or in two programs: their mean difference counts alone.
      truncated: samples are drawn with top-k, top-p or greedily.
      begins: the run begins now, so that its policy is its reference.
    """

    def __init__(self, *, eos_ids: Sequence[int], narrow: bool = False, truncated: bool = False, begins: bool = True):
        self.eos_ids, self.narrow, self.truncated = np.asarray(eos_ids, np.int64), narrow, truncated
        self.begins, self.agreed, self.updates = begins, False, 0
        self.surprise = np.zeros(4)  # tokens, -log-probs, their squares, entropies: summed while log-probs differ
        self.first: dict[int, tuple[np.ndarray, float]] = {}  # prompt -> its last first tokens, and their chance
        # What happened and what chance makes of it, in this window: equal samples, equal first tokens, groups.
        self.pairs, self.repeats, self.silent = np.zeros(2), np.zeros(2), np.zeros(2)
        self.steps = 0
        self.told: set[str] = set()

    def __call__(
        self, *, prompt_ids: Sequence[int] | np.ndarray, rollouts: Rollouts, batch: Batch, metrics: Mapping[str, Any]
    ) -> list[Alarm]:
        """The alarms of a step, each kind logged once a run.

        Args:
          prompt_ids: of the prompts that rollouts.prompt counts, the same at each visit.
          rollouts: N samples.
          batch: what they became.
          metrics: of the update: entropy, groups_without_signal, skipped, and where there are, kl, first_ratio_error,
            first_approx_kl (of the first update from this batch), importance_error and sampler_kl (log-probs computed
            anew), tokens_learnt (where one update takes the whole batch).
        """
        found = [*self._log_probs(rollouts, metrics), *self._tokens(rollouts, batch, metrics)]
        found += [*self._keys(prompt_ids, rollouts), *self._signal(len(prompt_ids), metrics), *self._reference(metrics)]
        self.steps += 1
        if self.steps % WINDOW == 0:
            for counts in (self.pairs, self.repeats, self.silent):
                counts[:] = 0
        for alarm in found:
            if alarm.kind not in self.told:
                log.warning("canary: %s", alarm)
                self.told.add(alarm.kind)
        return found

    def _log_probs(self, rollouts: Rollouts, metrics: Mapping[str, Any]):
        """The sampler's log-probs against the trainer's, and why they differ."""
        anew = "sampler_kl" in metrics
        if anew and self.truncated:
            return  # they differ by what truncation leaves out
        mean = abs(metrics["sampler_kl"] if anew else metrics.get("first_approx_kl", 0.0))
        largest = metrics.get("importance_error" if anew else "first_ratio_error", 0.0)
        if not (mean > MEAN_KL or (largest > RATIO_ERROR and not (anew or self.narrow))):
            self.agreed = True
            return
        seen = f"log-probs of sampler and trainer differ by {mean:.2g} nats a token, a ratio by up to {largest:.2g}"
        if self.agreed:
            yield Alarm("stale_weights", seen)
            return
        own = -np.asarray(rollouts.behaviour_logp if anew else rollouts.logp, np.float64)[np.asarray(rollouts.mask)]
        self.surprise += own.size, own.sum(), (own**2).sum(), own.size * float(metrics["entropy"])
        count = self.surprise[0]
        if count < TOKENS:
            return
        _, surprise, square, entropy = self.surprise / count
        deviation = np.sqrt(max(square - surprise**2, 0) / count)
        off = abs(surprise - entropy) > SURPRISE * entropy + 4 * deviation
        seen += f"; the sampler's tokens have {surprise:.2f} nats of surprise, the trainer {entropy:.2f} of entropy"
        yield Alarm("temperature" if off else "numerics", seen)

    def _tokens(self, rollouts: Rollouts, batch: Batch, metrics: Mapping[str, Any]):
        """Ends and padding: what was sampled is what is learnt from."""
        mask, learnt = np.asarray(rollouts.mask, bool), np.asarray(batch.packed.mask, bool)
        length = mask.sum(axis=1)
        is_end = np.zeros(mask.shape, bool)
        for end in self.eos_ids:
            is_end |= np.asarray(rollouts.tokens) == end
        at_last = is_end[np.arange(len(mask)), np.maximum(length - 1, 0)] & (length > 0)
        stopped = np.asarray(rollouts.stop) == StopReason.EOS
        inside = (is_end & mask).sum(axis=1) - at_last
        if bad := int(((stopped != at_last) | (inside > 0)).sum()):
            yield Alarm("eos", f"{bad} of {len(mask)} responses do not end where their end token is")
        holes = mask[:, 1:] & ~mask[:, :-1]
        kept = learnt.any(axis=1)
        other = (learnt != mask)[kept].any(axis=1)
        counted = metrics.get("tokens_learnt")
        if holes.any() or other.any():
            bad = int(holes.any(axis=1).sum() + other.sum())
            yield Alarm("padding", f"the masks of {bad} responses are not those of the tokens that were sampled")
        elif counted is not None and int(counted) != int(learnt.sum()):
            yield Alarm("padding", f"the update counts {int(counted)} tokens, the batch has {int(learnt.sum())}")

    def _keys(self, prompt_ids: Sequence[int] | np.ndarray, rollouts: Rollouts):
        """Random keys that were used twice make samples equal more often than chance does.

        Of n samples with log-probs L of a group, n (n - 1) / 2 mean exp(L) pairs are equal by chance; a first token is
        that of the last visit with a probability of at most the larger of both visits' mean chances (Cauchy-Schwarz).
        """
        mask, owner = np.asarray(rollouts.mask, bool), np.asarray(rollouts.prompt)
        token, logp = np.where(mask, rollouts.tokens, -1), np.asarray(rollouts.behaviour_logp)
        whole, begins = np.exp(np.where(mask, logp, 0).sum(axis=1, dtype=np.float64)), np.exp(logp[:, 0])
        known = _hashes(token)
        for group in range(len(prompt_ids)):
            rows = np.flatnonzero(owner == group)
            if not len(rows):
                continue
            same = np.unique(known[rows], return_counts=True)[1]
            self.pairs += (same * (same - 1) / 2).sum(), len(rows) * (len(rows) - 1) / 2 * whole[rows].mean()
            begin, expected = token[rows, 0], float(begins[rows].mean())
            last = self.first.get(int(prompt_ids[group]))
            if last is not None and len(last[0]) == len(begin):
                self.repeats += (begin == last[0]).sum(), len(begin) * max(expected, last[1])
            self.first[int(prompt_ids[group])] = begin, expected
        for kind, (seen, expected) in (("keys_in_group", self.pairs), ("keys_of_steps", self.repeats)):
            if seen > 20 + 3 * expected:
                what = "pairs of samples" if kind == "keys_in_group" else "first tokens at a prompt's next visit"
                yield Alarm(kind, f"{seen:.0f} {what} are equal, by chance {expected:.1f}")

    def _signal(self, groups: int, metrics: Mapping[str, Any]):
        self.silent += metrics["groups_without_signal"], groups
        silent, all_ = self.silent
        if (self.steps + 1) % WINDOW == 0 and silent > NO_SIGNAL * all_:
            yield Alarm("no_signal", f"{silent:.0f} of the last {all_:.0f} groups have no signal")

    def _reference(self, metrics: Mapping[str, Any]):
        if "kl" not in metrics:
            return
        kl = float(metrics["kl"])
        # Where the log-probs differ, so does the KL, and that has been said.
        if self.begins and self.agreed and self.updates == 0 and metrics.get("first_kl", kl) > START_KL:
            yield Alarm("reference_start", f"the KL to the reference is {kl:.2g} before the first update")
        self.updates += not metrics["skipped"]
        if self.updates >= WINDOW and abs(kl) < STILL_KL:
            yield Alarm("reference_moves", f"the KL to the reference is {kl:.2g} after {self.updates} updates")


def _hashes(token: np.ndarray) -> np.ndarray:
    """u64[N] of the rows of i[N, R]: those of different rows are different but for chances of 2**-64."""
    factor = np.random.default_rng(0).integers(1, 2**64, token.shape[1], dtype=np.uint64) | np.uint64(1)
    return (token.astype(np.uint64) * factor).sum(axis=1, dtype=np.uint64)
