"""The contract canary: bugs of a run that no error shows, found in the numbers that each step has anyway.

A loop of rollout, reward and update holds contracts that nothing enforces: the sampler's log-probs are those of the
trainer, both at one temperature and with the newest weights; every sampled token is learnt from and no other; random
keys are used once; the reference stays where it is. A run that breaks one learns worse, or nothing, without an error.
The canary needs no forward of its own: it compares what rollout, batch and update have left on the host. Numbers are
looked at every step, arrays in the EARLY steps of a run and in every LOOK-th. The limits are our choice;
tests/io/test_canary.py plants the bugs.

`fit` and `fit_agent` watch all of it. `fit_offline` has no rewards and no groups, so none can be without signal, and
its reference cannot move, being log-probs that are kept (iteration.py): it watches the `answers` that it generates, and
what is `learnt` from them.
"""

import dataclasses
import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlalign.rollout.config import SampleConfig
from rlalign.types import Rollouts, StopReason

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
EARLY = 16  # first steps of a run, whose arrays are all looked at
LOOK = 16  # steps from one look at the arrays to the next, later
PREFIX = 64  # tokens of a response by which it is known
WINDOW = 32  # steps, or looks at keys, over which chance is given time to even out
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
      narrow: all is computed in less than float32: of log-probs the mean difference counts alone.
      engine: another program samples: the same of its log-probs.
      truncated: samples are drawn with top-k, top-p or greedily.
      begins: the run begins now, so that its policy is its reference.
    """

    def __init__(
        self,
        *,
        eos_ids: Sequence[int],
        narrow: bool = False,
        engine: bool = False,
        truncated: bool = False,
        begins: bool = True,
    ):
        self.eos_ids, self.truncated = [int(i) for i in eos_ids], truncated
        self.narrow, self.engine = narrow, engine
        self.begins, self.agreed, self.updates = begins, False, 0
        self.surprise = np.zeros(4)  # tokens, -log-probs, their squares, entropies: summed while log-probs differ
        self.first: dict[int, tuple[list[int], float]] = {}  # prompt -> its last first tokens, and their chance
        # What happened and what chance makes of it, in this window: equal samples, equal first tokens, groups.
        self.pairs, self.repeats, self.silent = (0.0, 0.0), (0.0, 0.0), (0, 0)
        self.steps = self.looks = 0
        self.told: set[str] = set()

    def __call__(
        self,
        *,
        step: int,
        prompt_ids: Sequence[int] | np.ndarray,
        rollouts: Rollouts,
        learnt: np.ndarray,
        metrics: Mapping[str, Any],
    ) -> list[Alarm]:
        """The alarms of a step, each kind logged once a run.

        Args:
          step: of the loop; see `looks`.
          prompt_ids: of the prompts that rollouts.prompt counts, the same at each visit.
          rollouts: N samples; those whose prompt is -1 are drawn for a prompt that no other has, and enter no count of
            equal ones.
          learnt: b[N, R], the mask of the batch that they became.
          metrics: of the update: entropy, groups_without_signal, skipped, and where there are, kl, first_ratio_error,
            first_approx_kl (of the first update from this batch), learning_rate, importance_error and sampler_kl
            (log-probs computed anew), tokens_learnt (where one update takes the whole batch).
        """
        found = [*self._log_probs(rollouts, metrics)]
        if looks(step):
            mask, learnt = np.asarray(rollouts.mask, bool), np.asarray(learnt, bool)
            found += [*self._ends(rollouts, mask), *_padding(mask, learnt, metrics)]
            found += self._keys(prompt_ids, rollouts, mask)
        found += [*self._signal(len(prompt_ids), metrics), *self._reference(metrics)]
        self.steps += 1
        if self.steps % WINDOW == 0:
            self.silent = (0, 0)
        return self._told(found)

    def answers(self, *, prompt_ids: Sequence[int], rollouts: Rollouts, logp: np.ndarray | None) -> list[Alarm]:
        """The alarms of answers that fit_offline generates, a block of them at a time.

        Args:
          prompt_ids: one an answer, the same in each iteration.
          rollouts: N answers, one a prompt.
          logp: f[N, R], the reference's log-probs of them at the sampler's temperature; None where there are none.
        """
        mask = np.asarray(rollouts.mask, bool)
        found = [*self._ends(rollouts, mask), *self._keys(prompt_ids, rollouts, mask)]
        if logp is not None and mask.any():
            ratio = (np.asarray(logp, np.float64) - rollouts.logp)[mask]
            error, mean = np.abs(np.expm1(ratio)).max(), np.mean(np.expm1(ratio) - ratio)
            found += self._log_probs(rollouts, {"first_ratio_error": error, "first_approx_kl": mean})
        return self._told(found)

    def learnt(
        self, *, step: int, length: np.ndarray, mask: np.ndarray, metrics: Mapping[str, Any], still: float | None
    ) -> list[Alarm]:
        """The alarms of a step of fit_offline.

        Args:
          step: of the loop.
          length: i[N], tokens of each response.
          mask: b[N, R] of the batch; all False where a response is left out.
          metrics: of the update: loss, tokens, skipped.
          still: what the loss is where the policy is its reference, at the first update of an iteration; else None.
        """
        found: list[Alarm] = []
        if looks(step):
            given = np.arange(mask.shape[1]) < np.asarray(length)[:, None]
            found += _padding(given, np.asarray(mask, bool), {"tokens_learnt": metrics["tokens"]})
        off = 0.0 if still is None or metrics["skipped"] else abs(metrics["loss"] - still)
        if still is not None and off > (SURPRISE if self.narrow else START_KL) * max(abs(still), 1.0):
            seen = f"the loss is {metrics['loss']:.4g} at an iteration's first update, and {still:.4g} at its reference"
            found.append(Alarm("reference_start", seen))
        return self._told(found)

    def _told(self, found: list[Alarm]) -> list[Alarm]:
        for alarm in found:
            if alarm.kind not in self.told:
                log.warning("canary: %s", alarm)
                self.told.add(alarm.kind)
        return found

    def _log_probs(self, rollouts: Rollouts, metrics: Mapping[str, Any]) -> Iterable[Alarm]:
        """The sampler's log-probs against the trainer's, and why they differ."""
        anew = "sampler_kl" in metrics
        if anew and self.truncated:
            return  # they differ by what truncation leaves out
        mean = abs(metrics["sampler_kl"] if anew else metrics.get("first_approx_kl", 0.0))
        largest = metrics.get("importance_error" if anew else "first_ratio_error", 0.0)
        if np.isnan(mean) or not np.asarray(rollouts.mask).any():
            return  # an update that is refused, or nothing to compare
        if not (mean > MEAN_KL or (largest > RATIO_ERROR and not (anew or self.narrow or self.engine))):
            self.agreed = True
            return
        seen = f"log-probs of sampler and trainer differ by {mean:.2g} nats a token, a ratio by up to {largest:.2g}"
        if self.agreed:
            yield Alarm("stale_weights", seen)
            return
        if "entropy" not in metrics:
            yield Alarm("numerics", seen)
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

    def _ends(self, rollouts: Rollouts, mask: np.ndarray) -> Iterable[Alarm]:
        """An end token is the last of its response, and what stopped at one has it."""
        length, tokens = _lengths(mask), np.asarray(rollouts.tokens)
        wrong = (np.asarray(rollouts.stop) == StopReason.EOS) & (length > 0)
        for end in self.eos_ids:
            row, column = np.divmod(np.flatnonzero((tokens == end) & mask), max(mask.shape[1], 1))
            last = column == length[row] - 1
            wrong[row[last]] ^= True  # one that stopped there is right, one that did not is wrong
            wrong[row[~last]] = True
        if bad := int(np.count_nonzero(wrong)):
            yield Alarm("eos", f"{bad} of {len(mask)} responses do not end where their end token is")

    def _keys(self, prompt_ids: Sequence[int] | np.ndarray, rollouts: Rollouts, mask: np.ndarray) -> Iterable[Alarm]:
        """Random keys that were used twice make samples equal more often than chance does.

        Of n samples of a group whose first PREFIX tokens have log-probs L, n (n - 1) / 2 mean exp(L) pairs are equal in
        them by chance; a first token is that of the last visit with a probability of at most the larger of both visits'
        mean chances (Cauchy-Schwarz).
        """
        if self.looks % WINDOW == 0:
            self.pairs = self.repeats = (0.0, 0.0)
        self.looks += 1
        owner = np.asarray(rollouts.prompt)
        rows = np.argsort(owner, kind="stable")[np.count_nonzero(owner < 0) :]
        if not len(rows):
            return
        owner, mask = owner[rows], mask[rows, :PREFIX]
        token = np.where(mask, np.asarray(rollouts.tokens)[rows, :PREFIX], -1)
        logp = np.where(mask, np.asarray(rollouts.behaviour_logp)[rows, :PREFIX], 0)
        size = np.bincount(owner, minlength=len(prompt_ids))
        known = np.sort(_hashes(owner, token))
        same = np.diff(np.flatnonzero(known[1:] != known[:-1]), prepend=-1, append=len(known) - 1)  # runs of equal ones
        chance = np.exp(logp.sum(axis=1, dtype=np.float64))
        pairs, by_chance = self.pairs
        self.pairs = pairs + (same * (same - 1)).sum() / 2, by_chance + ((size[owner] - 1) * chance).sum() / 2
        mean = np.bincount(owner, np.exp(logp[:, 0]), len(size)) / np.maximum(size, 1)
        (repeats, by_chance), begins, end = self.repeats, token[:, 0].tolist(), 0
        for prompt, count, expected in zip(np.asarray(prompt_ids).tolist(), size.tolist(), mean.tolist(), strict=True):
            begin, end = begins[end : end + count], end + count
            last = self.first.get(prompt)
            if last is not None and len(last[0]) == count:
                repeats += sum(map(operator.eq, begin, last[0]))
                by_chance += count * max(expected, last[1])
            self.first[prompt] = begin, expected
        self.repeats = repeats, by_chance
        for kind, (seen, expected) in (("keys_in_group", self.pairs), ("keys_of_steps", self.repeats)):
            if seen > 20 + 3 * expected:
                what = "pairs of samples" if kind == "keys_in_group" else "first tokens at a prompt's next visit"
                yield Alarm(kind, f"{seen:.0f} {what} are equal, by chance {expected:.1f}")

    def _signal(self, groups: int, metrics: Mapping[str, Any]) -> Iterable[Alarm]:
        silent, all_ = self.silent[0] + metrics["groups_without_signal"], self.silent[1] + groups
        self.silent = silent, all_
        if (self.steps + 1) % WINDOW == 0 and silent > NO_SIGNAL * all_:
            yield Alarm("no_signal", f"{silent:.0f} of the last {all_:.0f} groups have no signal")

    def _reference(self, metrics: Mapping[str, Any]) -> Iterable[Alarm]:
        if "kl" not in metrics:
            return
        kl = float(metrics["kl"])
        # Where the log-probs differ, so does the KL, and that has been said.
        if self.begins and self.agreed and self.updates == 0 and metrics.get("first_kl", kl) > START_KL:
            yield Alarm("reference_start", f"the KL to the reference is {kl:.2g} before the first update")
        self.updates += not metrics["skipped"] and metrics.get("learning_rate", 1.0) > 0
        if self.updates >= WINDOW and abs(kl) < STILL_KL:
            yield Alarm("reference_moves", f"the KL to the reference is {kl:.2g} after {self.updates} updates")


def canary_of(sampling: SampleConfig | None, dtype: str, *, begins: bool = False, engine: bool = False) -> Canary:
    """The canary of a run.

    Args:
      sampling: of its answers; None where there are none.
      dtype: of the decoder.
      begins: the run begins now, so that its policy is its reference.
      engine: another program samples.
    """
    return Canary(
        eos_ids=() if sampling is None else sampling.eos_ids,
        narrow=dtype not in ("float32", "float64"),
        engine=engine,
        truncated=sampling is not None and (sampling.top_k is not None or sampling.top_p is not None),
        begins=begins,
    )


def looks(step: int) -> bool:
    """Whether the arrays of a step are looked at: its number alone says so, for runs that are continued."""
    return step < EARLY or step % LOOK == 0


def _lengths(mask: np.ndarray) -> np.ndarray:
    return mask.view(np.uint8).sum(axis=1, dtype=np.uint32)


def _padding(mask: np.ndarray, learnt: np.ndarray, metrics: Mapping[str, Any]) -> Iterable[Alarm]:
    """What was sampled is what is learnt from, or nothing of the response is."""
    bad = np.count_nonzero((mask[:, 1:] > mask[:, :-1]).any(axis=1))  # holes
    bad += np.count_nonzero((learnt != mask).any(axis=1) & learnt.any(axis=1))
    counted = metrics.get("tokens_learnt")
    if bad:
        yield Alarm("padding", f"the masks of {bad} responses are not those of the tokens that were sampled")
    elif counted is not None and int(counted) != (there := np.count_nonzero(learnt)):
        yield Alarm("padding", f"the update counts {int(counted)} tokens, the batch has {there}")


_FACTORS = np.random.default_rng(0).integers(1, 2**64, PREFIX + 1, dtype=np.uint64) | np.uint64(1)


def _hashes(owner: np.ndarray, token: np.ndarray) -> np.ndarray:
    """u64[N] of the rows of i[N, R] and their groups: those of different rows differ but for chances of 2**-64."""
    return token.astype(np.uint64) @ _FACTORS[: token.shape[1]] + owner.astype(np.uint64) * _FACTORS[-1]
