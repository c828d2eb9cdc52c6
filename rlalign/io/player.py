"""One step and one evaluation of a run of agents: what `fit_agent` repeats; the counterpart of Runner."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlalign import hosts
from rlalign.algorithms import Algorithm
from rlalign.envs.episodes import Episode, play
from rlalign.envs.protocol import End
from rlalign.envs.rows import Rows, advantage_parts, episode_batch, group_metrics, rows_of
from rlalign.envs.worlds import Copies
from rlalign.io.canary import Canary, canary_of
from rlalign.io.config import AgentConfig
from rlalign.io.mixture import entries_at_step
from rlalign.io.runner import EVAL_SEED
from rlalign.io.updates import Clock, RunAborted, Updates, in_rows, passes
from rlalign.models.decoder import Decoder
from rlalign.train.mesh import row_shards
from rlalign.train.optimizer import make_schedule
from rlalign.train.score import make_scorer
from rlalign.train.step import make_train_step
from rlalign.types import Batch, Params, Rollouts, StopReason, TrainState


class Player:
    """The parts of a run, compiled once: one training step, one evaluation."""

    def __init__(
        self,
        config: AgentConfig,
        algorithm: Algorithm,
        decoder: Decoder,
        reference: Params | None,
        worlds: Copies,
        tasks: Sequence[int],
        eval_tasks: Sequence[int],
        *,
        optimizer: Any,
        mesh: Mesh | None,
        write: Callable[[str], Iterable[int]] | None,
        **how: Any,
    ):
        self.config, self.algorithm, self.decoder, self.worlds = config, algorithm, decoder, worlds
        self.tasks, self.eval_tasks = list(tasks), list(eval_tasks)[: config.eval_tasks]
        self.play = functools.partial(play, decoder, worlds=worlds, mesh=mesh, write=write, **how)
        self.rows = functools.partial(
            rows_of, config=config.episodes, write=write, vocab_size=decoder.config.vocab_size
        )
        update = make_train_step(decoder, algorithm, optimizer, mesh=mesh, microbatches=config.microbatches)
        rate = config.optimizer.learning_rate
        self.update = Updates(update, max_bad_steps=config.max_bad_steps, learning_rate=rate)
        self.schedule = make_schedule(config.optimizer)
        # As many at a time as an update sees: a batch of long episodes is thousands of prompts.
        cut = config.minibatches * config.microbatches
        score = make_scorer(decoder, temperature=algorithm.temperature, mesh=mesh, microbatches=cut)
        self.reference = None if reference is None else functools.partial(score, reference)
        self.parts = cut * row_shards(mesh)
        self.canary: Canary | None = None  # begins with the first step
        self.kept = self.update.kept
        self.shown: list[dict[str, Any]] = []  # the newest training episodes, for the next evaluation's page

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """One batch of episodes and the updates from it."""
        config, clock = self.config, Clock()
        with clock("rollout"):
            episodes, played = self._episodes(state.params, step)
        self._check_lost(played)
        with clock("group"):
            rows = self.rows(episodes)
            about = group_metrics(self.algorithm, rows)
        with clock("pack"):
            pack = functools.partial(
                episode_batch,
                self.algorithm,
                rows,
                row_length=config.row_length,
                parts=self.parts,
                reference=self.reference,
            )
            batch = in_rows(pack, config.num_rows)
        with clock("update"):
            learning_rate = float(np.asarray(self.schedule(state.step)))
            state, metrics = passes(self.update, state, batch, epochs=config.epochs, minibatches=config.minibatches)
        metrics["learning_rate"] = learning_rate
        metrics |= episode_metrics(episodes, rows, batch) | about | played_metrics(played)
        metrics["tokens_per_second"] = metrics["tokens_repeated"] / sum(clock.seconds.values())
        if config.canary:
            with clock("canary"):
                metrics["alarms"] = self._watch(step, episodes, rows, batch, metrics)
        metrics |= {f"seconds_{phase}": value for phase, value in clock.seconds.items()}
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            few = [episode for episode in episodes if episode.group < config.groups_shown]
            parts = {"advantage": np.asarray(batch.advantage), **advantage_parts(self.algorithm, rows)}
            self.shown = records(few, step, "train", rows, parts)
        return state, metrics

    def _watch(self, step: int, episodes: Sequence[Episode], rows: Rows, batch: Batch, metrics: dict[str, Any]) -> int:
        """How many contracts of the loop do not hold. Equal prompts are only sure to come at first turns."""
        if self.canary is None:
            self.canary = canary_of(self.config.episodes.sampling, self.decoder.config.dtype, begins=step == 0)
        live = slice(rows.count)
        owner = np.where(rows.step[live] == 0, rows.group[live], -1)
        seeds = {episode.group: episode.seed for episode in episodes}
        counted = {"tokens_learnt": metrics["tokens"]} if self.config.minibatches == 1 else {}
        found = self.canary(
            step=step,
            prompt_ids=[seeds[group] for group in range(len(seeds))],
            rollouts=Rollouts(*(x[live] for x in rows.rollouts))._replace(prompt=owner),
            learnt=np.asarray(batch.packed.mask)[live],
            metrics=metrics | counted,
        )
        return len(found)

    def _episodes(self, params: Params, step: int) -> tuple[list[Episode], list[Episode]]:
        """A batch of groups, those without signal replaced while there are tries; and all episodes that were played."""
        config = self.config
        wanted = config.tasks_per_step
        chosen = entries_at_step(self.tasks, wanted, seed=config.seed, step=step)
        kept: list[list[Episode]] = []
        spare: list[list[Episode]] = []
        played: list[Episode] = []
        for attempt in range(config.resample + 1):
            if attempt:  # any others, drawn with a seed of their own
                chosen = np.random.default_rng((config.seed, step, attempt)).integers(
                    len(self.tasks), size=wanted - len(kept)
                )
            tasks = [self.tasks[i] for i in chosen]
            how = {"config": config.episodes, "seed": config.seed, "step": step, "attempt": attempt}
            episodes = self.play(params, tasks=tasks, **how)
            played += episodes
            copies = config.episodes.copies
            for group in (episodes[i : i + copies] for i in range(0, len(episodes), copies)):
                (kept if has_signal(group) else spare).append(group)
            if len(kept) == wanted:
                break
        groups = [*kept, *spare][:wanted]
        return [episode._replace(group=number) for number, group in enumerate(groups) for episode in group], played

    def _check_lost(self, episodes: Sequence[Episode]) -> None:
        lost = [episode for episode in episodes if episode.end.lost]
        if len(lost) > self.config.max_lost_share * len(episodes):
            raise RunAborted(
                f"{len(lost)} of {len(episodes)} episodes of a step were lost to their environments, more than "
                f"max_lost_share={self.config.max_lost_share}; the first: {lost[0].end.name}, {lost[0].reason}"
            )

    def evaluate(self, state: TrainState, step: int, samples: Path) -> dict[str, float]:
        """One episode of each held-out task, with the same keys at every evaluation."""
        config = self.config
        sampling = config.episodes.sampling
        if config.eval_temperature is not None:
            sampling = dataclasses.replace(sampling, temperature=config.eval_temperature)
        one = dataclasses.replace(config.episodes, copies=1, sampling=sampling)
        episodes: list[Episode] = []
        for first in range(0, len(self.eval_tasks), self.worlds.copies):
            some = self.eval_tasks[first : first + self.worlds.copies]
            found = self.play(state.params, tasks=some, config=one, seed=config.seed + EVAL_SEED, step=0)
            episodes += [episode._replace(group=first + episode.group) for episode in found]
        if hosts.first():
            rows = self.shown + records(episodes[: config.groups_shown * config.episodes.copies], step, "held-out")
            with (samples.parent / "episodes.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        self.shown = []
        there = [episode for episode in episodes if not episode.end.lost]
        return {
            "eval_accuracy": float(np.mean([episode.end is End.WON for episode in there])) if there else 0.0,
            "eval_score": float(np.mean([episode.score for episode in there])) if there else 0.0,
            "eval_episode_steps": float(np.mean([len(episode.turns) for episode in there])) if there else 0.0,
            "eval_lost": len(episodes) - len(there),
        }


def has_signal(group: Sequence[Episode]) -> bool:
    """Whether the episodes of a task scored differently, lost ones left out."""
    return len({episode.reward for episode in group if not episode.end.lost}) > 1


def episode_metrics(episodes: Sequence[Episode], rows: Rows, batch: Batch) -> dict[str, float]:
    """What a person watches of a batch of episodes, lost ones left out; shares in [0, 1], lengths and counts in tokens.

    accuracy is the share of episodes that were won; tokens_repeated counts every step with its whole prompt,
    tokens_stored what the forest holds, those of lost episodes in both.
    """
    there = [episode for episode in episodes if not episode.end.lost]
    turns = [turn for episode in there for turn in episode.turns]
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0
    live = rows.rewards.valid
    length = np.asarray(rows.rollouts.mask)[live].sum(axis=1)
    return {
        "accuracy": mean([episode.end is End.WON for episode in there]),
        "reward": mean([episode.reward for episode in there]),
        "score": mean([episode.score for episode in there]),
        "episode_steps": mean([len(episode.turns) for episode in there]),
        "invalid_actions": mean([not turn.valid for turn in turns]),
        "episodes_too_long": sum(episode.end is End.TOO_LONG for episode in there),
        "groups_without_signal": sum(not has_signal(group) for group in groups.values()),
        "prompt_length": mean([len(turn.prompt) for turn in turns]),
        "response_length": mean(length),
        "truncated_share": mean(rows.rollouts.stop[live] == StopReason.MAX_TOKENS),
        "tokens_stored": int(np.sum(np.asarray(batch.packed.forest.visible_until) > 0)),
        "tokens_repeated": sum(len(prompt.tokens) for prompt in rows.prompts[: rows.count])
        + int(np.sum(rows.rollouts.mask)),
    }


def played_metrics(played: Sequence[Episode]) -> dict[str, int]:
    """Of all episodes of a step, those that others took the place of too: how many, lost ones, and actions in all."""
    return {
        "episodes_played": len(played),
        "episodes_lost": sum(episode.end.lost for episode in played),
        "environment_steps": sum(len(episode.turns) for episode in played),
    }


def records(
    episodes: Sequence[Episode],
    step: int,
    split: str,
    rows: Rows | None = None,
    parts: dict[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Episodes as lines of episodes.jsonl, with the anchors and advantages of their rows where there are."""
    place: dict[tuple[int, int], int] = {}
    if rows is not None:
        place = {(int(t), int(s)): i for i, (t, s) in enumerate(zip(rows.trajectory, rows.step, strict=True))}
    out, copy = [], Counter()
    for number, episode in enumerate(episodes):
        turns = []
        for t, turn in enumerate(episode.turns):
            row = place.get((number, t)) if rows is not None else None
            of = {name: None if row is None else float(part[row]) for name, part in (parts or {}).items()}
            turns.append(
                {
                    "observation": turn.observation.text,
                    "admissible": list(turn.observation.admissible),
                    "answer": turn.text,
                    "action": turn.action,
                    "valid": bool(turn.valid),
                    "reward": turn.reward,
                    "anchor": None if rows is None or row is None else int(rows.anchor[row]),
                    "tokens": len(turn.prompt) + len(turn.response),
                    "advantage": None,
                    "episode": None,
                    "step": None,
                    **of,
                }
            )
        about = {"step": step, "split": split, "group": episode.group, "seed": episode.seed}
        about |= {"copy": copy[episode.group], "end": episode.end.name, "reason": episode.reason}
        about |= {"score": episode.score, "return": episode.reward, "turns": turns}
        first = episode.turns[0].observation if episode.turns else episode.last
        about |= {"task": first.task if first else "", "last": episode.last.text if episode.last else None}
        out.append(about)
        copy[episode.group] += 1
    return out
