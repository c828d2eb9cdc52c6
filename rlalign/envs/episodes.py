"""Episodes: every live copy answers its prompt, all of them in one batch, until none is left; then rows to learn from.

    task seeds ─reset─▶ observation ─form─▶ prompt ─sample─▶ answer ─parse─▶ action ─step─▶ observation ─▶ ...

A row of the batch is one step of one episode. Rows of a group are comparable: its copies begin alike.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlalign.envs.prompting import Form, Parse, Turn
from rlalign.envs.protocol import End, Observation, Transition
from rlalign.envs.worlds import Copies, Lost
from rlalign.models.decoder import Decoder
from rlalign.rollout import SampleConfig, sample
from rlalign.strings import Allowed, allowed_strings
from rlalign.types import Params, Prompt, Rollouts


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Settings of how episodes are played and made comparable.

    Args:
      copies: episodes of one task, a group.
      max_steps: of an episode.
      max_prompt: tokens; an episode whose next prompt is longer ends there.
      sampling: of an answer, num_samples=1.
      penalty: what an invalid action costs its step (GiGPO's c).
      anchor: what makes two steps of a group comparable: "state", the environment's own anchor; "observation", its text
        alone; "history", the state with the `history` turns before it.
      similarity: None for equal anchors; a threshold in (0, 1] clusters texts, see anchor_ids; anchor="observation".
      history: turns, for anchor="history".

    Raises:
      ValueError: a setting out of range or at odds with another.
    """

    copies: int
    max_steps: int
    max_prompt: int
    sampling: SampleConfig
    penalty: float = 0.1
    anchor: Literal["state", "observation", "history"] = "state"
    similarity: float | None = None
    history: int = 2

    def __post_init__(self):
        for name in ("copies", "max_steps", "max_prompt"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {getattr(self, name)}")
        if self.sampling.num_samples != 1:
            raise ValueError(
                f"sampling.num_samples={self.sampling.num_samples}: a step has one answer; copies={self.copies} is how "
                "many episodes a task has; use num_samples=1"
            )
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"penalty must be >= 0, got {self.penalty}")
        if self.anchor not in ("state", "observation", "history"):
            raise ValueError(f"anchor must be 'state', 'observation' or 'history', got {self.anchor!r}")
        if self.similarity is not None and (self.anchor != "observation" or not 0 < self.similarity <= 1):
            raise ValueError(
                f"similarity={self.similarity} with anchor={self.anchor!r}: it compares texts, in (0, 1]; use "
                "anchor='observation'"
            )
        if self.history < 0:
            raise ValueError(f"history must be >= 0, got {self.history}")


class Episode(NamedTuple):
    """What happened in one copy.

    Attributes:
      group: its task's place among the seeds.
      seed: its task.
      turns: steps; of a lost episode those that were answered.
      end: End.
      reason: of an episode that was lost.
      score: in [0, 1], the environment's own at the end.
      last: what was seen after the last step; None where the environment gave nothing.
    """

    group: int
    seed: int
    turns: tuple[Turn, ...]
    end: End
    reason: str
    score: float
    last: Observation | None

    @property
    def reward(self) -> float:
        """Undiscounted return."""
        return sum(turn.reward for turn in self.turns)


@dataclasses.dataclass
class _Playing:
    """An episode that is not over."""

    observation: Observation
    turns: list[Turn] = dataclasses.field(default_factory=list)
    score: float = 0.0


class _Table:
    """The copies of a play: those that are live, and the episodes of those that have ended."""

    def __init__(self, worlds: Copies, tasks: Sequence[int], config: Episodes):
        self.tasks, self.config, self.count = tasks, config, len(tasks) * config.copies
        if self.count > worlds.copies:
            told = f"{len(tasks)} tasks x {config.copies} copies are {self.count}"
            raise ValueError(f"{told}, the worlds have {worlds.copies}")
        self.live: dict[int, _Playing] = {}
        self.done: dict[int, Episode] = {}
        begun = worlds.reset({copy: tasks[copy // config.copies] for copy in range(self.count)})
        for copy in range(self.count):
            if isinstance(seen := begun[copy], Lost):
                self.end(copy, seen.end, seen.reason)
            else:
                self.live[copy] = _Playing(seen)

    def end(self, copy: int, why: End, reason: str = "") -> None:
        """The copy is not live any more."""
        group, it = copy // self.config.copies, self.live.pop(copy, None)
        turns, score, last = ((), 0.0, None) if it is None else (tuple(it.turns), it.score, it.observation)
        self.done[copy] = Episode(group, self.tasks[group], turns, why, reason, score, last)

    def name(self, copy: int, taken: int, attempt: int) -> int:
        """What the keys of an answer fold."""
        group, number = divmod(copy, self.config.copies)
        again = sum(task == self.tasks[group] for task in self.tasks[:group])
        return zlib.crc32(f"{attempt} {self.tasks[group]} {again} {number} {taken}".encode())

    def prompts(self, form: Form, taken: int) -> dict[int, np.ndarray]:
        """Of live copies; those whose prompt is too long end here."""
        found = {copy: form(it.turns, it.observation) for copy, it in self.live.items()}
        too_long = [copy for copy, prompt in found.items() if len(prompt) > self.config.max_prompt]
        if not taken and too_long and len(too_long) == len(found):
            raise ValueError(
                f"the first prompt of task {self.tasks[too_long[0] // self.config.copies]} has "
                f"{len(found[too_long[0]])} tokens, those of the others are too long too, and max_prompt is "
                f"{self.config.max_prompt}: raise it, or show less"
            )
        for copy in too_long:
            del found[copy]
            self.end(copy, End.TOO_LONG)
        return found

    def settle(self, copy: int, turn: Turn, seen: Transition | Lost, last: bool) -> None:
        """What came of a turn; `last` where the runner allows no further one."""
        if isinstance(seen, Lost):
            return self.end(copy, seen.end, seen.reason)
        it = self.live[copy]
        valid = seen.info.valid if turn.valid is None else turn.valid
        it.turns.append(turn._replace(valid=valid, reward=seen.reward))
        it.observation, it.score = seen.observation, seen.info.score
        if seen.terminated:
            self.end(copy, End.WON if seen.info.won else End.FAILED)
        elif seen.truncated or last:
            self.end(copy, End.TRUNCATED if seen.truncated else End.STEP_LIMIT)


def play(
    decoder: Decoder,
    params: Params,
    worlds: Copies,
    tasks: Sequence[int],
    *,
    form: Form,
    parse: Parse,
    decode: Callable[[np.ndarray], str],
    config: Episodes,
    seed: int,
    step: int,
    attempt: int = 0,
    write: Callable[[str], Iterable[int]] | None = None,
    sampler: Callable[..., Rollouts] = sample,
    mesh: Mesh | None = None,
) -> list[Episode]:
    """config.copies episodes of each task; a copy that has ended is not sampled from any more.

    Args:
      decoder, params, seed, step, mesh, sampler: as in sample; an answer depends on (seed, step, attempt, task, how
        often the task came before in `tasks`, copy, turn) and nothing else.
      worlds: with room for len(tasks) * config.copies copies.
      tasks: task seeds, the groups.
      form: what the policy is shown.
      parse: what its answer does.
      decode: token ids without the end token -> text.
      config: Episodes.
      write: an admissible action -> token ids without the end token. Answers are then drawn from what is admissible
        alone (reject sampling, exactly; see rlalign.strings); None: any text.
      attempt: tells several plays of one step apart.

    Returns:
      Episodes in the order of tasks, the copies of one beside each other. What an environment does to a copy is in its
      `end`, and raises nothing.

    Raises:
      ValueError: too few copies in `worlds`, or no first prompt that fits; with `write` an observation that admits
        nothing.
    """
    table, sampling = _Table(worlds, tasks, config), config.sampling
    for taken in range(config.max_steps):
        prompts = table.prompts(form, taken)
        if not prompts:
            break
        asked = [Prompt(table.name(copy, taken, attempt), prompt) for copy, prompt in prompts.items()]
        # Live copies come in all numbers; programs for the powers of two will do.
        room = (1 << (len(asked) - 1).bit_length(), config.max_prompt)
        how: dict[str, Any] = {"at_least": room} if sampler is sample else {}
        if write is not None:
            seen = [table.live[copy].observation for copy in prompts]
            how["allowed"] = admissible_strings(seen, write, decoder.config.vocab_size, sampling)
        rollouts = sampler(decoder, params, asked, seed=seed, step=step, config=sampling, mesh=mesh, **how)
        turns = {}
        for row, copy in enumerate(prompts):
            seen = table.live[copy].observation
            response, logp, behaviour_logp, stop = _answer(rollouts, row)
            text = decode(response[~np.isin(response, sampling.eos_ids)])
            action, valid = parse(text, seen.admissible)
            how = {"text": text, "action": action, "valid": valid, "reward": 0.0}
            turns[copy] = Turn(seen, prompts[copy], response, logp, behaviour_logp, stop, **how)
        after = worlds.step({copy: turn.action for copy, turn in turns.items()})
        for copy, turn in turns.items():
            table.settle(copy, turn, after[copy], taken + 1 == config.max_steps)
    return [table.done[copy] for copy in range(table.count)]


def admissible_strings(
    seen: Sequence[Observation], write: Callable[[str], Iterable[int]], vocab_size: int, sampling: SampleConfig
) -> Allowed:
    """What each observation admits, as token ids; the first of sampling.eos_ids ends an answer."""
    strings = [[write(action) for action in observation.admissible] for observation in seen]
    return allowed_strings(strings, vocab_size=vocab_size, eos=sampling.eos_ids[0])


def _answer(rollouts: Rollouts, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """response, logp, behaviour_logp and stop of a row."""
    keep = np.asarray(rollouts.mask[row])
    said = (x[row][keep] for x in (rollouts.tokens, rollouts.logp, rollouts.behaviour_logp))
    return *said, int(rollouts.stop[row])
