"""fit: the loop of the README plus checkpoints, metrics and a report; short enough to copy.

    prompts -> rollout -> reward -> advantage -> pack -> train_step -> checkpoint, metrics, report

Every random choice is a function of (seed, step), so a run that is killed and started again ends in the same bits.
"""

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlalign import hosts
from rlalign.algorithms import ALGORITHMS, Algorithm
from rlalign.compat import CompileCounter
from rlalign.io.checkpoint import Checkpoints, check_same
from rlalign.io.config import RunConfig
from rlalign.io.files import write_atomic
from rlalign.io.identity import everywhere, run_identity
from rlalign.io.metrics import MetricsLog, progress, read_metrics
from rlalign.io.report import write_report
from rlalign.io.runner import Runner, check_run, resolve
from rlalign.models.decoder import Decoder
from rlalign.models.lora import frozen, trained, without_lora
from rlalign.rewards import RewardGuard
from rlalign.rollout import sample
from rlalign.train.optimizer import make_optimizer
from rlalign.train.step import init_state
from rlalign.types import Params, Prompt, Rollouts, TrainState

# Settings that touch nothing of a run but, for num_rows, the last bits: they may differ when it is continued.
HARMLESS = ("folder", "profile", "steps", "num_rows", "reward_workers", "keep", "checkpoint_every", "samples_shown")
HARMLESS += ("keep_params",)
Sampler = Callable[..., Rollouts]
Judging = Callable[[Sequence[Prompt], Rollouts], np.ndarray]


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
    sampler: Sampler = sample,
    judge: Judging | None = None,
    mesh: Mesh | None = None,
    allow_change: Sequence[str] = (),
) -> Result:
    """Train a policy by reinforcement learning; continue the run in config.folder if there is one.

    Args:
      config: the run.
      decoder, params: the policy to begin with; also the frozen reference, where the algorithm has a KL. With
        config.keep_params=False the run uses the arrays up.
      prompts: to train on, each once an epoch; or several sets of them, mixed by weights (`mix`).
      eval_prompts: held out; evaluated with seeds of their own, before, between and after.
      reward: (completion, example) -> number, a plain top-level function, run in killable worker processes.
      decode: token ids -> text; None hands the ids to the reward.
      algorithm: in place of ALGORITHMS[config.algorithm].
      sampler: what answers prompts, called as `sample` is: an outside engine (engine_sampler), or one of your own. Its
        log-probs are not the trainer's, so config.recompute_logp must be set.
      judge: rewards of training samples in place of `reward`, which then counts the held-out answers alone: a reward
        model (make_judge), or a function of your own, (prompts, rollouts) -> f[N], NaN where there is none. Of several
        processes each calls it, and each must get the same.
      mesh: see make_mesh; `params` must lie on it.
      allow_change: dotted names of settings that may differ from those that the run in config.folder was started with.
        What does not touch the numbers (HARMLESS) always may.

    Returns:
      Result.

    Raises:
      ValueError: settings that do not go together, before anything is sampled or written; ConfigMismatch where the run
        in config.folder was started with other settings, another model, algorithm, reference or other prompts.
      RunAborted: too many invalid rewards in a step, or non-finite gradients in a row.
    """
    algorithm = resolve(config, algorithm or ALGORITHMS[config.algorithm])
    check_run(config, decoder, prompts, eval_prompts, mesh, sampler)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    reference = without_lora(params) if algorithm.needs_reference else None
    known = run_identity(decoder, algorithm, params, prompts, judge)
    saved = json.loads(json.dumps(dataclasses.asdict(config) | known))
    hosts.check_same_everywhere(saved | everywhere(prompts, eval_prompts, mesh))
    hosts.check_shared(folder)
    optimizer = make_optimizer(config.optimizer)
    with hosts.failing_together(f"{folder} has checkpoints"), contextlib.ExitStack() as stack:
        guard = stack.enter_context(
            RewardGuard(reward, workers=config.reward_workers, time_limit=config.reward_limit, decode=decode)
        )
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep=config.keep))
        # A reference of the policy's own dtype is the caller's arrays: the first step must not use them up.
        shared = reference is not None and config.reference_dtype in (None, decoder.config.dtype)
        fresh = init_state(decoder, params, optimizer, copy=config.keep_params or shared)
        state, start = _resume(checkpoints, fresh, saved, allow_change)
        del fresh  # a resumed run needs it no more
        how = {"optimizer": optimizer, "mesh": mesh, "guard": guard, "sampler": sampler, "judge": judge}
        run = Runner(config, algorithm, decoder, reference, prompts, eval_prompts, **how)
        compiles, highest = CompileCounter(), hosts.of_first(_best(folder / "metrics.jsonl"))
        record = stack.enter_context(_record(config, start, _about(saved, decoder)))
        asked = stack.enter_context(_asked_to_stop())
        trace = stack.enter_context(_profiler(folder / "profile", config.profile_range()))
        for step in range(start, config.steps + 1):
            begin = time.perf_counter()
            metrics: dict[str, Any] = {}
            if step % config.eval_every == 0 or step == config.steps:
                metrics |= run.evaluate(state, step, folder / "samples.jsonl")
            accuracy, stop = metrics.get("eval_accuracy", -1.0), hosts.agree(bool(asked))
            if accuracy > highest or step % config.checkpoint_every == 0 or step == config.steps or stop:
                _save(checkpoints, step, state, saved, best=accuracy if accuracy > highest else None)
            highest = max(highest, accuracy)
            if stop:
                raise SystemExit(0)
            trace(step)
            if step < config.steps:
                state, trained = run.step(state, step)
                metrics |= trained
            metrics |= {"seconds": time.perf_counter() - begin, "compiles": compiles.take()}
            record(step, metrics)
    if hosts.first():
        write_report(folder)
    hosts.wait_for_all("report")
    curve = _accuracy(folder / "metrics.jsonl")
    return Result(state, curve, max(curve, key=lambda s: (curve[s], -s)), folder)


def _resume(
    checkpoints: Checkpoints, state: TrainState, saved: dict, allow_change: Sequence[str]
) -> tuple[TrainState, int]:
    """The newest intact state and its step, if it belongs to this run; the given one and 0 if there is none."""
    if checkpoints.latest() is None:
        return state, 0
    check = lambda meta: check_same(meta["config"], saved, allow=(*HARMLESS, *allow_change))
    # Of an adapted model the adapter alone is saved.
    found, meta = checkpoints.restore(None, state._replace(params=trained(state.params)), check=check)
    return found._replace(params={**frozen(state.params), **found.params}), meta["step"]


def _save(checkpoints: Checkpoints, step: int, state: TrainState, saved: dict, *, best: float | None) -> None:
    """Save the step, unless a run that was killed here did, and mark it where its accuracy is the best so far."""
    # Absent, or damaged. Asked together: a file system may show a folder to one host before another.
    if hosts.agree(checkpoints.problem(step) is not None):
        checkpoints.save(step, state._replace(params=trained(state.params)), {"config": saved})
    if best is not None:
        checkpoints.mark_best(step, best)


@contextlib.contextmanager
def _record(config: RunConfig, start: int, about: dict) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """A function that writes and shows the metrics of a step; among several processes the first one's alone."""
    if not hosts.first():
        yield lambda step, metrics: None
        return
    folder = Path(config.folder)
    write_atomic(folder / "config.json", json.dumps(about, indent=1))
    _keep_samples_before(folder / "samples.jsonl", start)
    with MetricsLog(folder / "metrics.jsonl", resume_step=start) as log, progress(config.steps, start) as show:

        def record(step: int, metrics: dict[str, Any]) -> None:
            log.write(step, metrics)
            if step < config.steps:
                show(metrics)

        yield record


def _about(config: dict, decoder: Decoder) -> dict:
    """The configuration and what it ran on, for the report."""
    size = jax.eval_shape(decoder.init, 0)
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(size))
    return {
        **config,
        "model": f"{decoder.config.layers} layers, width {decoder.config.width}, {parameters:,} parameters",
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
def _profiler(folder: Path, steps: range) -> Iterator[Callable[[int], None]]:
    """A function to call at the beginning of every step; the trace is written at the end of `steps`, or of the run."""
    running = False

    def at(step: int) -> None:
        nonlocal running
        if (step in steps) != running:
            if running:
                jax.profiler.stop_trace()
            else:
                jax.profiler.start_trace(str(folder))
            running = not running

    try:
        yield at
    finally:
        if running:
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
