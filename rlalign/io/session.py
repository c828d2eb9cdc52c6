"""What every run does around its steps: continue, save, record, watch for a stop, profile."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlalign import hosts
from rlalign.compat import CompileCounter
from rlalign.io.checkpoint import Checkpoints, check_same
from rlalign.io.config import traced_steps
from rlalign.io.files import write_atomic
from rlalign.io.metrics import MetricsLog, progress, read_metrics
from rlalign.models.decoder import Decoder
from rlalign.models.lora import frozen, trained
from rlalign.types import TrainState

log = logging.getLogger(__name__)
# Settings that touch nothing of a run but, for num_rows, the last bits: they may differ when it is continued.
HARMLESS = (
    *("folder", "profile", "steps", "iterations", "num_rows", "reward_workers", "keep", "checkpoint_every"),
    *("keep_params", "samples_shown", "groups_shown", "canary"),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      state: after the last step.
      accuracy: step -> eval_accuracy after that many steps: the share of held-out answers that were right.
      best_step: where that was highest.
      folder: with metrics.jsonl, checkpoints/ and report.html.
    """

    state: TrainState
    accuracy: dict[int, float]
    best_step: int
    folder: Path


def result(state: TrainState, folder: Path) -> Result:
    """What the folder tells of a run that is done."""
    curve = accuracy_curve(folder)
    return Result(state, curve, max(curve, key=lambda s: (curve[s], -s), default=int(state.step)), folder)


def train_steps(
    config: Any,
    run: Any,
    state: TrainState,
    *,
    total: int,
    saved: Mapping[str, Any],
    decoder: Decoder,
    allow_change: Sequence[str],
    iteration: int | None = None,
) -> TrainState:
    """From the newest checkpoint, or from `state`, to the last step: evaluate, save, step, record.

    Args:
      config: with folder, eval_every, checkpoint_every, keep and profile.
      run: has step(state, step) -> (state, metrics); evaluate(state, step, samples file) -> metrics, whose
        "eval_accuracy" decides which checkpoint is the best; and `kept`, a dict that each checkpoint carries and a
        continued run gets back.
      state: to begin with; a run that is continued lets go of it.
      total: steps of the run.
      saved: what a run must keep to be continued.
      decoder: for the report.
      allow_change: see fit.
      iteration: after so many steps each the state is evaluated, saved, and never removed; None where the run is one
        iteration, of which the newest states are enough.

    Raises:
      ValueError: another process runs in the folder, its run has more steps than this one, or its checkpoints are gone.
    """
    folder = Path(config.folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone_in(folder))
        asked = stack.enter_context(asked_to_stop())  # until the last save is written
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep=config.keep, keep_every=iteration))
        state, found = resume(checkpoints, state, saved, allow_change)
        start = found["step"]
        hosts.check_same_everywhere({"step": start})
        if start > total:
            raise ValueError(f"the run in {folder} has done {start} steps, this one asks for {total}: ask for as many")
        run.kept |= {name: found[name] for name in run.kept if name in found}
        compiles, highest = CompileCounter(), _highest(checkpoints, folder, start)
        record = stack.enter_context(recorder(folder, total, start, about_run(saved, decoder)))
        trace = stack.enter_context(profiler(folder / "profile", traced_steps(config.profile)))
        for step in range(start, total + 1):
            begin = time.perf_counter()
            metrics: dict[str, Any] = {}
            checkpoints.check()
            ends = step % (iteration or total) == 0
            if ends or step % config.eval_every == 0:
                metrics |= run.evaluate(state, step, folder / "samples.jsonl")
            accuracy, stop = metrics.get("eval_accuracy", -1.0), hosts.agree(bool(asked))
            if accuracy > highest or ends or step % config.checkpoint_every == 0 or stop:
                meta, best = {"config": saved, **run.kept}, accuracy if accuracy > highest else None
                metrics["seconds_save"] = save_step(checkpoints, step, state, meta, best=best)
            highest = max(highest, accuracy)
            if stop:
                checkpoints.wait()
                raise SystemExit(0)
            trace(step)
            if step < total:
                state, trained = run.step(state, step)
                metrics |= trained
            metrics |= {"seconds": time.perf_counter() - begin, "compiles": compiles.take()}
            record(step, metrics)
    if hosts.agree(bool(asked)):  # while the last save was written
        raise SystemExit(0)
    return state


def resume(
    checkpoints: Checkpoints, state: TrainState, saved: Mapping[str, Any], allow_change: Sequence[str]
) -> tuple[TrainState, dict[str, Any]]:
    """The newest intact state and its meta, if it belongs to this run; the given one and step 0 where there is none."""
    if not hosts.agree(checkpoints.latest() is not None):
        _check_nothing_lost(checkpoints.folder.parent)
        return state, {"step": 0}
    check = lambda meta: check_same(meta["config"], saved, allow=(*HARMLESS, *allow_change))
    return restore(checkpoints, None, state, check=check)


def restore(
    checkpoints: Checkpoints, step: int | None, state: TrainState, *, check: Callable | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """Checkpoints.restore of a whole state: of an adapted model the adapter alone is saved."""
    found, meta = checkpoints.restore(step, state._replace(params=trained(state.params)), check=check)
    return found._replace(params={**frozen(state.params), **found.params}), meta


def save_step(
    checkpoints: Checkpoints, step: int, state: TrainState, meta: Mapping[str, Any], *, best: float | None
) -> float:
    """Save the step, unless a run that was killed here did, and mark it where its accuracy is the best so far.

    The save goes on behind the next steps; checkpoints.check raises what it fails with. Returns for how many seconds
    the run stood still.
    """
    begin = time.perf_counter()
    # Absent, or damaged. Asked together: a file system may show a folder to one host before another, and only the first
    # need read all of it.
    if hosts.agree(hosts.first() and checkpoints.problem(step) is not None):
        checkpoints.save(step, state._replace(params=trained(state.params)), meta, best=best, wait=False)
    elif best is not None:
        checkpoints.mark_best(step, best)
    return time.perf_counter() - begin


@contextlib.contextmanager
def recorder(
    folder: Path, steps: int, start: int, about: Mapping[str, Any]
) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """A function that writes and shows the metrics of a step; among several processes the first one's alone."""
    if not hosts.first():
        yield lambda step, metrics: None
        return
    write_atomic(folder / "config.json", json.dumps(about, indent=1))
    for name in ("samples.jsonl", "episodes.jsonl"):
        _keep_samples_before(folder / name, start)
    with MetricsLog(folder / "metrics.jsonl", resume_step=start) as log, progress(steps, start) as show:

        def record(step: int, metrics: dict[str, Any]) -> None:
            log.write(step, metrics)
            if step < steps:
                show(metrics)

        yield record


def about_run(config: Mapping[str, Any], decoder: Decoder) -> dict:
    """The configuration and what it ran on, for the report."""
    size = jax.eval_shape(decoder.init, 0)
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(size))
    return {
        **config,
        "model": f"{decoder.config.layers} layers, width {decoder.config.width}, {parameters:,} parameters",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
    }


def accuracy_curve(folder: Path) -> dict[int, float]:
    """step -> eval_accuracy, from the metrics written so far."""
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row["eval_accuracy"] for row in rows if isinstance(row.get("eval_accuracy"), int | float)}


def best_before(folder: Path, step: int) -> tuple[int, float]:
    """The step with the highest accuracy before this one, and that accuracy; -1 and -1 where there is none.

    Later ones come again, and with them their saves.
    """
    curve = {at: value for at, value in accuracy_curve(folder).items() if at < step}
    best = max(curve, key=lambda at: (curve[at], -at), default=-1)
    return best, curve.get(best, -1.0)


def _highest(checkpoints: Checkpoints, folder: Path, step: int) -> float:
    """The highest accuracy before a step; its checkpoint is marked as the best again, where the mark was lost."""
    best, highest = (hosts.of_first(float(value)) for value in best_before(folder, step))
    if hosts.agree(hosts.first() and checkpoints.best() is None and best in checkpoints.steps()):
        checkpoints.mark_best(int(best), highest)
    return highest


def had_checkpoints(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run with these metrics wrote one: a save waits for the one before, so the first of two was done."""
    return sum(row.get("seconds_save") is not None for row in rows) > 1


def _check_nothing_lost(folder: Path) -> None:
    """Refuses to begin anew, in silence, a run that had checkpoints: its metrics would be written over."""
    rows = read_metrics(folder / "metrics.jsonl")
    if hosts.agree(hosts.first() and had_checkpoints(rows)):
        raise ValueError(
            f"{folder} has metrics up to step {rows[-1]['step'] if rows else '?'} and no checkpoint, though some were "
            "saved: put checkpoints/ back, use another folder, or remove metrics.jsonl to begin anew here"
        )
    if rows:
        log.warning("%s: killed before its first checkpoint was written, the run begins anew", folder)


def _keep_samples_before(path: Path, step: int) -> None:
    """Drop the samples of steps that will be done again, and lines that are damaged: they are for show alone."""
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] < step:
                kept.append(line + b"\n")
    if path.exists():
        write_atomic(path, b"".join(kept).decode(errors="replace"))


@contextlib.contextmanager
def profiler(folder: Path, steps: range) -> Iterator[Callable[[int], None]]:
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
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else runs in the folder meanwhile: two runs would remove each other's files.

    The system lets go of the lock when the process that holds it ends, however it does, and whatever it has forked.

    Raises:
      ValueError: another run is there; names its process.
    """
    owner = None
    with contextlib.ExitStack() as stack:
        if hosts.first():
            file = stack.enter_context((folder / ".running").open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = (folder / ".running").read_text()
            except OSError as error:  # some network file systems have no locks
                log.warning("%s cannot be locked (%s): take care that no other run uses it", folder, error)
            else:
                (folder / ".running").write_text(f"process {os.getpid()} of {socket.gethostname()}")
        if hosts.agree(owner is not None):
            raise ValueError(
                f"another run is in {folder}: wait for {owner or 'it'}, end it and what it forked, or "
                "use another folder"
            )
        yield


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
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
