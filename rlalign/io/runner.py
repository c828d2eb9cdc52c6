"""One step and one evaluation of a run: what `fit` repeats."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlalign import hosts
from rlalign.algorithms import ALGORITHMS, NEEDS, Algorithm, try_out
from rlalign.io.canary import Canary, canary_of
from rlalign.io.config import RunConfig
from rlalign.io.mixture import entries_at_step, reward_by_set
from rlalign.io.rollouts import check_rewards, rollout_metrics, term_means, term_metrics, terms_together
from rlalign.io.updates import Clock, Updates, in_rows, passes
from rlalign.models.decoder import Decoder
from rlalign.rewards import score
from rlalign.rollout import sample
from rlalign.train.batch import make_batch
from rlalign.train.mesh import AnyMesh, row_shards
from rlalign.train.optimizer import make_schedule
from rlalign.train.score import Judge, make_scorer
from rlalign.train.step import make_train_step
from rlalign.types import Batch, Packed, Params, Rewards, Rollouts, StopReason, TrainState

EVAL_SEED = 1 << 20  # added to the seed: evaluation draws keys that training never does


class Runner:
    """The pure parts of a run, compiled once: one training step, one evaluation."""

    def __init__(
        self,
        config,
        algorithm,
        decoder,
        reference,
        prompts,
        eval_prompts,
        *,
        optimizer,
        mesh,
        guard,
        sampler,
        judge,
        decode,
    ):
        self.config, self.algorithm, self.decoder, self.mesh = config, algorithm, decoder, mesh
        self.prompts, self.guard, self.sample, self.judge = prompts, guard, sampler, judge
        self.decode = decode or str
        self.eval_prompts = list(eval_prompts)[: config.eval_prompts]
        update = make_train_step(decoder, algorithm, optimizer, mesh=mesh, microbatches=config.microbatches)
        rate = config.optimizer.learning_rate
        self.update = Updates(update, max_bad_steps=config.max_bad_steps, learning_rate=rate)
        self.schedule = make_schedule(config.optimizer)
        self.score = make_scorer(decoder, temperature=algorithm.temperature, mesh=mesh)
        self.reference = None if reference is None else self._scorer_of(reference)
        self.parts = config.minibatches * config.microbatches * row_shards(mesh)
        self.canary: Canary | None = None  # begins with the first step
        self.kept = self.update.kept

    def _scorer_of(self, reference: Params) -> Callable[[Packed], np.ndarray]:
        """packed -> log-probs of the frozen reference, in config.reference_dtype."""
        dtype = self.config.reference_dtype
        if dtype in (None, self.decoder.config.dtype):
            return functools.partial(self.score, reference)
        narrow = dataclasses.replace(self.decoder, config=dataclasses.replace(self.decoder.config, dtype=dtype))
        score = make_scorer(narrow, temperature=self.algorithm.temperature, mesh=self.mesh)
        return functools.partial(score, jax.tree.map(lambda x: x.astype(dtype), reference))

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """One rollout batch and the updates from it."""
        config, clock = self.config, Clock()
        chosen = entries_at_step(self.prompts, config.prompts_per_step, seed=config.seed, step=step)
        prompts = [self.prompts[i] for i in chosen]
        with clock("rollout"):
            rollouts = self.sample(
                self.decoder,
                state.params,
                prompts,
                seed=config.seed,
                step=step,
                config=config.sampling,
                mesh=self.mesh,
            )
        with clock("reward"):
            rewards = self._judged(prompts, rollouts)
        fields = {}
        if "baseline" in self.algorithm.needs:
            with clock("baseline"):
                greedy = self._greedy_rewards(state.params, prompts, step)
                fields["baseline"] = np.where(greedy.valid, greedy.reward, 0.0).astype(np.float32)
                rewards = without_baseline(rewards, greedy, rollouts.prompt)
        check_rewards(rewards, config.max_invalid_share)
        if "terms" in self.algorithm.needs and not rewards.terms and rewards.valid.any():
            raise ValueError(
                "this algorithm needs the terms of rewards by themselves: let the reward function return them by name, "
                'such as {"accuracy": 1.0, "format": 0.5, "total": 10.5}'
            )
        with clock("pack"):
            old_policy = functools.partial(self.score, state.params) if config.recompute_logp else None
            batch = self._pack(prompts, rollouts, rewards, fields=fields, old_policy=old_policy)
        with clock("update"):
            learning_rate = float(np.asarray(self.schedule(state.step)))
            state, metrics = passes(self.update, state, batch, epochs=config.epochs, minibatches=config.minibatches)
        seconds = sum(clock.seconds.values())
        metrics["learning_rate"] = learning_rate
        metrics |= rollout_metrics(config, prompts, rollouts, rewards, batch)
        metrics |= term_metrics(rewards, rollouts.prompt, len(prompts))
        if config.canary:
            with clock("canary"):
                metrics["alarms"] = self._watch(step, chosen, rollouts, batch, metrics)
        metrics |= reward_by_set(self.prompts, chosen[rollouts.prompt], rewards)
        if self.judge is not None:
            del metrics["accuracy"]  # a judge's numbers have no `success`
        metrics |= {f"seconds_{phase}": value for phase, value in clock.seconds.items()}
        metrics["tokens_per_second"] = metrics["tokens_repeated"] / seconds
        return state, metrics

    def _watch(self, step: int, chosen: np.ndarray, rollouts: Rollouts, batch: Batch, metrics: dict[str, Any]) -> int:
        """How many contracts of the loop do not hold; each is logged once."""
        if self.canary is None:
            self.canary = canary_of(self.config.sampling, self.decoder.config.dtype, begins=step == 0)
        counted = {"tokens_learnt": metrics["tokens"]} if self.config.minibatches == 1 else {}
        seen = {"prompt_ids": chosen, "rollouts": rollouts, "learnt": batch.packed.mask, "metrics": metrics | counted}
        return len(self.canary(step=step, **seen))

    def _greedy_rewards(self, params, prompts, step: int) -> Rewards:
        """Of each prompt's greedy answer (ReMax)."""
        settings = dataclasses.replace(self.config.sampling, num_samples=1, greedy=True)
        rollouts = self.sample(
            self.decoder, params, prompts, seed=self.config.seed, step=step, config=settings, mesh=self.mesh
        )
        return self._judged(prompts, rollouts)

    def _judged(self, prompts, rollouts: Rollouts) -> Rewards:
        """Of training samples: the judge's, where there is one."""
        return self._rewards(prompts, rollouts) if self.judge is None else self._by_judge(prompts, rollouts)

    def _by_judge(self, prompts, rollouts: Rollouts) -> Rewards:
        value = np.asarray(self.judge(prompts, rollouts))
        if value.shape != rollouts.prompt.shape or value.dtype.kind not in "fiu":
            raise ValueError(
                f"the judge gave {value.dtype}{list(value.shape)} for {len(rollouts.prompt)} samples: one number each"
            )
        value = value.astype(np.float64)
        valid = np.isfinite(value)
        why = f": {self.judge.refuses}" if isinstance(self.judge, Judge) else ""
        reason = tuple("" if ok else f"the judge gave {x}{why}" for ok, x in zip(valid, value, strict=True))
        return Rewards(value, valid, reason)

    def _rewards(self, prompts, rollouts: Rollouts) -> Rewards:
        """Of all samples; each process rewards its share of them."""
        count = len(rollouts.prompt)
        mine = score(self.guard, prompts, Rollouts(*(x[hosts.share(count)] for x in rollouts)))
        reward, valid = (hosts.together(x, count) for x in (mine.reward, mine.valid))
        return Rewards(reward, valid, hosts.texts_together(mine.reason, count), terms_together(mine, count))

    def _pack(self, prompts, rollouts: Rollouts, rewards: Rewards, **given) -> Batch:
        """The batch in num_rows rows, or, where its samples share too little for that, in the next bucket of rows."""
        pack = functools.partial(
            make_batch,
            self.algorithm,
            prompts,
            rollouts,
            rewards,
            row_length=self.config.row_length,
            parts=self.parts,
            reference=self.reference,
            **given,
        )
        return in_rows(pack, self.config.num_rows)

    def evaluate(self, state: TrainState, step: int, samples: Path) -> dict[str, float]:
        """One answer to each held-out prompt, with the same keys at every evaluation.

        eval_accuracy and eval_reward by the reward function, eval_term_NAME of its terms, eval_judge a reward model's
        mean: where that rises and the accuracy falls, the policy has learnt what fools the model.
        """
        settings = dataclasses.replace(self.config.sampling, num_samples=1)
        rollouts = self.sample(
            self.decoder,
            state.params,
            self.eval_prompts,
            seed=self.config.seed + EVAL_SEED,
            step=0,
            config=settings,
            mesh=self.mesh,
        )
        found: dict[str, float] = {}
        judged = None
        if isinstance(self.judge, Judge):  # others may compare answers, and here is one a prompt
            judged = self._by_judge(self.eval_prompts, rollouts)
            if judged.valid.any():
                found["eval_judge"] = float(np.mean(judged.reward[judged.valid]))
        if self.guard is None:
            assert judged is not None
            rewards = judged
        else:
            rewards = self._rewards(self.eval_prompts, rollouts)
            right = rewards.valid & (np.nan_to_num(rewards.reward) >= self.config.success)
            reward = float(np.mean(rewards.reward[rewards.valid])) if rewards.valid.any() else float("nan")
            found |= {"eval_accuracy": float(right.mean()), "eval_reward": reward}
            found |= {f"eval_term_{name}": mean for name, mean in term_means(rewards).items()}
        if hosts.first():
            self._show_samples(samples, step, rollouts, rewards)
        return found

    def _show_samples(self, path: Path, step: int, rollouts: Rollouts, rewards: Rewards) -> None:
        with path.open("a", encoding="utf-8") as file:
            for n in range(min(self.config.samples_shown, len(self.eval_prompts))):
                row = {
                    "step": step,
                    "prompt": self.eval_prompts[n].text,
                    "completion": self.decode(rollouts.tokens[n][rollouts.mask[n]].tolist()),
                    "stop": StopReason(int(rollouts.stop[n])).name.lower(),
                    "split": "eval",
                }
                if self.guard is not None:  # a judge's numbers have no right and wrong
                    row["reward"] = float(rewards.reward[n]) if rewards.valid[n] else None
                file.write(json.dumps(row) + "\n")


def check_run(config: RunConfig, decoder: Decoder, prompts, eval_prompts, mesh: AnyMesh | None, sampler=sample) -> None:
    """Refuses, before anything is written or sampled, what would fail later.

    Raises:
      ValueError: no prompts, prompts too long for a row or the model, an end token outside the vocabulary, or rows that
        do not divide into parts; several processes without a mesh over the devices of all.
    """
    everywhere = isinstance(mesh, Mesh) and set(mesh.devices.flat) == set(jax.devices())
    if jax.process_count() > 1 and not everywhere:
        raise ValueError(
            f"{jax.process_count()} processes train as one, on a mesh of all their {jax.device_count()} devices: "
            "fit(..., mesh=make_mesh(...)) with sizes that multiply to that"
        )
    if sampler is not sample and not config.recompute_logp:
        raise ValueError(
            "another sampler's log-probs are not the trainer's: set recompute_logp=True, which computes old log-probs "
            "anew and weighs the difference (Algorithm.correction)"
        )
    for name, some in (("prompts", prompts), ("eval_prompts", eval_prompts)):
        if not len(some):
            raise ValueError(f"{name} is empty: give at least one")
        length = [len(np.asarray(p)) for p in some]
        longest = int(np.argmax(length))
        need = length[longest] + config.sampling.max_new_tokens
        limits = (("row_length", config.row_length), ("the model's max_positions", decoder.config.max_positions))
        for what, limit in limits:
            if need > limit:
                raise ValueError(
                    f"{name}[{longest}] has {length[longest]} tokens, with max_new_tokens="
                    f"{config.sampling.max_new_tokens} that is {need}, and {what} is {limit}: "
                    f"raise {what} to at least {need}, or drop the prompt"
                )
    if config.reference_dtype is not None and decoder.config.lora is not None:
        raise ValueError(
            f"reference_dtype={config.reference_dtype!r} with an adapter: the reference is the model under it, which "
            "takes no memory of its own; leave reference_dtype at None"
        )
    beyond = [i for i in config.sampling.eos_ids if not 0 <= i < decoder.config.vocab_size]
    if beyond:
        raise ValueError(f"sampling.eos_ids holds {beyond[0]}, the vocabulary has {decoder.config.vocab_size}")
    parts = config.minibatches * config.microbatches * row_shards(mesh)
    samples = config.prompts_per_step * config.sampling.num_samples
    if parts > samples:
        raise ValueError(
            f"prompts_per_step={config.prompts_per_step} with num_samples={config.sampling.num_samples} are {samples} "
            f"samples for {parts} parts (minibatches * microbatches * data * fsdp): some would be empty; ask for more"
        )
    if config.num_rows is not None and config.num_rows % parts:
        raise ValueError(
            f"num_rows={config.num_rows} does not divide into {parts} parts (minibatches * microbatches * data * fsdp)"
        )


def without_baseline(rewards: Rewards, greedy: Rewards, prompt: np.ndarray) -> Rewards:
    """Samples whose prompt's greedy answer has no reward are invalid, with its reason."""
    reason = [own or theirs for own, theirs in zip(rewards.reason, (greedy.reason[p] for p in prompt), strict=True)]
    return rewards._replace(valid=rewards.valid & greedy.valid[prompt], reason=tuple(reason))


FOUND = ("mask", "weight", "baseline", "terms")  # what `step` finds by itself


def _one_reward(algorithm: Algorithm) -> bool:
    """Whether one reward an answer is all that the algorithm needs."""
    return algorithm.data == "rollouts" and set(algorithm.needs) <= set(FOUND)


def resolve(config: RunConfig, algorithm: Algorithm) -> Algorithm:
    """The algorithm as this run uses it; refuses what cannot work."""
    named = [key for key, entry in ALGORITHMS.items() if entry is algorithm]
    name = repr(named[0]) if named else "of your own"
    if algorithm.data != "rollouts":
        raise ValueError(
            f"algorithm {name} learns from {algorithm.data}, not from rewards of its own samples: "
            f"use one of {', '.join(k for k, a in ALGORITHMS.items() if _one_reward(a))}"
        )
    if algorithm.grouped and config.sampling.num_samples < 2:
        raise ValueError(
            f"sampling.num_samples={config.sampling.num_samples}: a group of one has no baseline and every advantage "
            "is 0; use at least 2"
        )
    if not _one_reward(algorithm):
        missing = [name for name in algorithm.needs if name not in FOUND]
        raise ValueError(
            f"algorithm {name} needs {missing[0]} {NEEDS[missing[0]]}, which one reward an answer "
            "does not give: write the loop with make_batch(..., fields=...)"
        )
    if config.sampling.temperature != algorithm.temperature:
        raise ValueError(
            f"sampling.temperature={config.sampling.temperature} but the algorithm trains at {algorithm.temperature}: "
            "both sides of the importance ratio need one temperature"
        )
    try_out(algorithm)
    if algorithm.max_length is None:
        algorithm = dataclasses.replace(algorithm, max_length=config.sampling.max_new_tokens)
    return algorithm
