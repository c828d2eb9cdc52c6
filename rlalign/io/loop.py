"""fit: the loop of the README plus checkpoints, metrics and a report; short enough to copy.

    prompts -> rollout -> reward -> advantage -> pack -> train_step -> checkpoint, metrics, report

Every random choice is a function of (seed, step), so a run that is killed and started again ends in the same bits.
"""

import contextlib
import dataclasses
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlalign.algorithms import ALGORITHMS, Algorithm
from rlalign.compat import CompileCounter
from rlalign.io.checkpoint import Checkpoints, check_same
from rlalign.io.config import RunConfig
from rlalign.io.data import prompts_at_step
from rlalign.io.files import write_atomic
from rlalign.io.metrics import MetricsLog, progress, read_metrics
from rlalign.io.report import write_report
from rlalign.models.decoder import Decoder
from rlalign.rewards import RewardGuard, score
from rlalign.rollout import sample
from rlalign.train.batch import make_batch
from rlalign.train.mesh import row_shards
from rlalign.train.optimizer import make_optimizer, make_schedule
from rlalign.train.step import init_state, make_scorer, make_train_step, split_batch
from rlalign.types import Batch, Params, Prompt, Rewards, Rollouts, StopReason, TrainState

log = logging.getLogger(__name__)
EVAL_SEED = 1 << 20  # added to the seed: evaluation draws keys that training never does


class RunAborted(SystemExit):
    """A run that must not go on; leaves with exit code 3 after saying why."""

    def __init__(self, reason: str):
        print(f"run aborted: {reason}", file=sys.stderr)
        super().__init__(3)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      state: after the last step.
      accuracy: step -> share of held-out answers that were right, of the policy after that many steps.
      best_step: where that was highest.
      folder: with metrics.jsonl, checkpoints/ and report.html.
    """

    state: TrainState
    accuracy: dict[int, float]
    best_step: int
    folder: Path


class Clock:
    """Seconds by phase of one step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


def fit(
    config: RunConfig,
    *,
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
    reward: Callable[[Any, dict], float],
    decode: Callable[[list[int]], str] | None = None,
    algorithm: Algorithm | None = None,
    mesh: Mesh | None = None,
) -> Result:
    """Train a policy by reinforcement learning; continue the run in config.folder if there is one.

    Args:
      config: the run.
      decoder, params: the policy to begin with; also the frozen reference, where the algorithm has a KL.
      prompts: to train on, each once an epoch.
      eval_prompts: held out; evaluated with seeds of their own, before, between and after.
      reward: (completion, example) -> number, a plain top-level function, run in killable worker processes.
      decode: token ids -> text; None hands the ids to the reward.
      algorithm: in place of ALGORITHMS[config.algorithm].
      mesh: see make_mesh; `params` must lie on it.

    Returns:
      Result.

    Raises:
      ValueError: settings that do not go together, before anything is sampled.
      RunAborted: too many invalid rewards in a step, or non-finite gradients in a row.
    """
    algorithm = _resolve(config, algorithm or ALGORITHMS[config.algorithm])
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    optimizer = make_optimizer(config.optimizer)
    with contextlib.ExitStack() as stack:
        guard = stack.enter_context(
            RewardGuard(reward, workers=config.reward_workers, time_limit=config.reward_limit, decode=decode)
        )
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep=config.keep))
        # A copy: the step donates its state, and the caller's parameters stay as the reference.
        state = init_state(decoder, jax.tree.map(lambda x: x.copy(), params), optimizer)
        start = 0
        if checkpoints.latest() is not None:
            check = lambda meta: check_same(meta["config"], saved, allow=("folder", "profile"))
            state, meta = checkpoints.restore(None, state, check=check)
            start = meta["step"]
        run = _Run(config, algorithm, decoder, params, prompts, eval_prompts, guard, mesh, optimizer)
        write_atomic(folder / "config.json", json.dumps(_about(saved, decoder), indent=1))
        _keep_samples_before(folder / "samples.jsonl", start)
        metrics_log = stack.enter_context(MetricsLog(folder / "metrics.jsonl", resume_step=start))
        show = stack.enter_context(progress(config.steps, start))
        stop = stack.enter_context(_asked_to_stop())
        compiles = CompileCounter()
        for step in range(start, config.steps + 1):
            begin = time.perf_counter()
            metrics: dict[str, Any] = {}
            if step % config.eval_every == 0 or step == config.steps:
                metrics |= run.evaluate(state, step, folder / "samples.jsonl")
            best = metrics.get("eval_accuracy", -1) > _best(folder / "metrics.jsonl")
            if best or step % config.checkpoint_every == 0 or step == config.steps or stop:
                if checkpoints.latest() != step:
                    checkpoints.save(step, state, {"config": saved})
                if best:
                    checkpoints.mark_best(step, metrics["eval_accuracy"])
            if stop:
                raise SystemExit(0)
            if step < config.steps:
                with _trace(folder, step, config):
                    state, trained = run.step(state, step)
                metrics |= trained
            metrics |= {"seconds": time.perf_counter() - begin, "compiles": compiles.take()}
            metrics_log.write(step, metrics)
            if step < config.steps:
                show(metrics)
    write_report(folder)
    accuracy = _accuracy(folder / "metrics.jsonl")
    return Result(state, accuracy, max(accuracy, key=lambda s: (accuracy[s], -s)), folder)


class _Run:
    """The pure parts of a run, compiled once: one training step, one evaluation."""

    def __init__(self, config, algorithm, decoder, reference, prompts, eval_prompts, guard, mesh, optimizer):
        self.config, self.algorithm, self.decoder, self.mesh = config, algorithm, decoder, mesh
        self.prompts, self.guard = prompts, guard
        self.eval_prompts = list(eval_prompts)[: config.eval_prompts]
        self.update = make_train_step(decoder, algorithm, optimizer, mesh=mesh, microbatches=config.microbatches)
        self.schedule = make_schedule(config.optimizer)
        self.reference = reference if algorithm.kl_coef > 0 else None
        self.score = make_scorer(decoder, temperature=algorithm.temperature, mesh=mesh)
        self.parts = config.minibatches * config.microbatches * row_shards(mesh)
        self.bad_steps = 0

    def step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """One rollout batch and the updates from it."""
        config, clock = self.config, Clock()
        chosen = prompts_at_step(len(self.prompts), config.prompts_per_step, seed=config.seed, step=step)
        prompts = [self.prompts[i] for i in chosen]
        with clock("rollout"):
            rollouts = sample(
                self.decoder,
                state.params,
                prompts,
                seed=config.seed,
                step=step,
                config=config.sampling,
                mesh=self.mesh,
            )
        with clock("reward"):
            rewards = score(self.guard, prompts, rollouts)
        self._check_rewards(rewards)
        with clock("pack"):
            batch = make_batch(
                self.algorithm,
                prompts,
                rollouts,
                rewards,
                row_length=config.row_length,
                parts=self.parts,
                num_rows=config.num_rows,
            )
            if self.reference is not None:
                batch = batch._replace(ref_logp=self.score(self.reference, batch.packed))
        with clock("update"):
            learning_rate = float(self.schedule(state.step))
            state, metrics = self._updates(state, batch)
        seconds = sum(clock.seconds.values())
        metrics |= rollout_metrics(config, prompts, rollouts, rewards, batch)
        metrics |= {f"seconds_{phase}": value for phase, value in clock.seconds.items()}
        metrics["tokens_per_second"] = metrics["tokens_repeated"] / seconds
        metrics["learning_rate"] = learning_rate
        return state, metrics

    def _updates(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
        """config.epochs passes in config.minibatches optimizer steps each; metrics are those of the last."""
        cut = self.config.minibatches
        parts = [batch] if cut == 1 else _minibatches(batch, cut)
        skipped = 0
        metrics: dict[str, Any] = {}
        for _ in range(self.config.epochs):
            for part in parts:
                state, metrics = self.update(state, part)
                metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
                skipped += int(metrics["skipped"])
                self.bad_steps = self.bad_steps + 1 if not np.isfinite(metrics["grad_norm"]) else 0
                if self.bad_steps >= self.config.max_bad_steps:
                    raise RunAborted(
                        f"{self.bad_steps} gradients in a row were not finite: lower the learning rate "
                        f"({self.config.optimizer.learning_rate}) or look at the rewards; nothing of them was applied"
                    )
        return state, metrics | {"skipped": skipped}

    def _check_rewards(self, rewards: Rewards) -> None:
        invalid = ~rewards.valid
        if not invalid.any():
            return
        first = next(reason for reason in rewards.reason if reason)
        log.warning("%d of %d rewards are invalid, the first: %s", invalid.sum(), invalid.size, first)
        if invalid.mean() > self.config.max_invalid_share:
            raise RunAborted(
                f"{invalid.sum()} of {invalid.size} rewards of a step are invalid, more than max_invalid_share="
                f"{self.config.max_invalid_share}; the first: {first}"
            )

    def evaluate(self, state: TrainState, step: int, samples: Path) -> dict[str, float]:
        """One answer to each held-out prompt, with the same keys at every evaluation."""
        settings = dataclasses.replace(self.config.sampling, num_samples=1)
        rollouts = sample(
            self.decoder,
            state.params,
            self.eval_prompts,
            seed=self.config.seed + EVAL_SEED,
            step=0,
            config=settings,
            mesh=self.mesh,
        )
        rewards = score(self.guard, self.eval_prompts, rollouts)
        right = rewards.valid & (np.nan_to_num(rewards.reward) >= self.config.success)
        self._show_samples(samples, step, rollouts, rewards)
        reward = float(np.mean(rewards.reward[rewards.valid])) if rewards.valid.any() else float("nan")
        return {"eval_accuracy": float(right.mean()), "eval_reward": reward}

    def _show_samples(self, path: Path, step: int, rollouts: Rollouts, rewards: Rewards) -> None:
        decode = self.guard.decode or str
        with path.open("a", encoding="utf-8") as file:
            for n in range(min(self.config.samples_shown, len(self.eval_prompts))):
                row = {
                    "step": step,
                    "prompt": self.eval_prompts[n].text,
                    "completion": decode(rollouts.tokens[n][rollouts.mask[n]].tolist()),
                    "reward": float(rewards.reward[n]) if rewards.valid[n] else None,
                    "stop": StopReason(int(rollouts.stop[n])).name.lower(),
                    "split": "eval",
                }
                file.write(json.dumps(row) + "\n")


def rollout_metrics(config: RunConfig, prompts, rollouts: Rollouts, rewards: Rewards, batch: Batch) -> dict[str, float]:
    """What a person watches of one rollout batch; shares in [0, 1], lengths and counts in tokens."""
    valid, mask = rewards.valid, np.asarray(rollouts.mask)
    reward = np.where(valid, np.nan_to_num(rewards.reward), 0.0)
    length = mask.sum(axis=1)
    prompt_length = np.array([len(np.asarray(p)) for p in prompts])
    signal = np.zeros(len(prompts), bool)
    np.logical_or.at(signal, rollouts.prompt, np.asarray(batch.advantage) != 0)
    count = max(int(valid.sum()), 1)
    return {
        "reward": float(reward.sum() / count),
        "accuracy": float((valid & (reward >= config.success)).sum() / count),
        "invalid_rewards": int((~valid).sum()),
        "groups_without_signal": int((~signal).sum()),
        "response_length": float(length.mean()),
        "truncated_share": float(np.mean(rollouts.stop == StopReason.MAX_TOKENS)),
        "tokens_stored": int(np.sum(np.asarray(batch.packed.forest.visible_until) > 0)),
        "tokens_repeated": int(np.sum(prompt_length[rollouts.prompt] + length)),
    }


def _resolve(config: RunConfig, algorithm: Algorithm) -> Algorithm:
    """The algorithm as this run uses it; refuses what cannot work."""
    if algorithm.data != "rollouts":
        raise ValueError(
            f"algorithm {config.algorithm!r} learns from {algorithm.data}, not from rewards of its own samples: "
            f"use one of {', '.join(k for k, a in ALGORITHMS.items() if a.data == 'rollouts')}"
        )
    if config.sampling.temperature != algorithm.temperature:
        raise ValueError(
            f"sampling.temperature={config.sampling.temperature} but the algorithm trains at {algorithm.temperature}: "
            "both sides of the importance ratio need one temperature"
        )
    if algorithm.max_length is None:
        algorithm = dataclasses.replace(algorithm, max_length=config.sampling.max_new_tokens)
    return algorithm


def _minibatches(batch: Batch, count: int) -> list[Batch]:
    parts = split_batch(batch, count)
    return [jax.tree.map(lambda x, k=k: x[k], parts) for k in range(count)]


def _about(config: dict, decoder: Decoder) -> dict:
    """The configuration and what it ran on, for the report."""
    size = jax.eval_shape(decoder.init, 0)
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(size))
    return {
        **config,
        "model": f"{decoder.config.layers} layers, width {decoder.config.width}, {parameters:,} parameters",
        "decoder": dataclasses.asdict(decoder.config),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
    }


def _accuracy(path: Path) -> dict[int, float]:
    return {row["step"]: row["eval_accuracy"] for row in read_metrics(path) if "eval_accuracy" in row}


def _best(path: Path) -> float:
    return max(_accuracy(path).values(), default=-1.0)


def _keep_samples_before(path: Path, step: int) -> None:
    """Drop the samples of steps that will be done again."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] < step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


@contextlib.contextmanager
def _trace(folder: Path, step: int, config: RunConfig) -> Iterator[None]:
    steps = config.profile_range()
    if steps and step == steps[0]:
        jax.profiler.start_trace(str(folder / "profile"))
    yield
    if steps and step == steps[-1]:
        jax.profiler.stop_trace()


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that SIGTERM makes non-empty: the loop saves at the next step boundary and leaves with exit code 0."""
    asked: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    except ValueError:  # not the main thread: whoever owns it handles signals
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
