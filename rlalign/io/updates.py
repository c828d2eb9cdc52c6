"""One step of any run: its batch in rows, its updates and their metrics, and the seconds of its phases."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from rlalign.forest import NotEnoughRows
from rlalign.train.step import split_batch
from rlalign.types import Batch, TrainState

log = logging.getLogger(__name__)
FIRST = ("ratio_error", "approx_kl", "kl")  # what shows, before anything is learnt, whether the sampler is the trainer


class RunAborted(SystemExit):
    """A run that must not go on; leaves with exit code 3 after saying why."""

    def __init__(self, reason: str):
        print(f"run aborted: {reason}", file=sys.stderr)
        super().__init__(3)
        self.reason = reason


class Clock:
    """Seconds by phase of one step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


class Updates:
    """A train step that fetches its metrics, and aborts the run at too many bad gradients in a row.

    Args:
      update: what make_train_step gives.
      max_bad_steps: so many gradients in a row that are not finite, or whose loss spikes, end the run.
      learning_rate: named in the error.

    Attributes:
      kept: what a continued run is given back: how many of the newest updates, in a row, were bad.
    """

    def __init__(self, update: Callable, *, max_bad_steps: int, learning_rate: float):
        self.update, self.max_bad_steps, self.learning_rate = update, max_bad_steps, learning_rate
        self.kept: dict[str, Any] = {"bad_steps": 0}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer step, and its metrics as floats."""
        state, metrics = self.update(state, batch)
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        spiked = metrics.get("spiked", 0) > 0
        bad = self.kept["bad_steps"] + 1 if spiked or not np.isfinite(metrics["grad_norm"]) else 0
        self.kept["bad_steps"] = bad
        if bad >= self.max_bad_steps:
            what = "were not finite" if not spiked else "came with a loss far above the usual (spike_sigma)"
            raise RunAborted(
                f"{bad} gradients in a row {what}: lower the learning rate "
                f"({self.learning_rate}) or look at the data and rewards; nothing of them was applied"
            )
        return state, metrics


def passes(
    update: Callable, state: TrainState, batch: Batch, *, epochs: int, minibatches: int
) -> tuple[TrainState, dict[str, Any]]:
    """`epochs` passes over a batch in `minibatches` optimizer steps each; metrics are the last's, skips of all.

    What the first of them sees of the policy that sampled is kept as first_ratio_error, first_approx_kl and first_kl.
    """
    parts = [batch]
    if minibatches > 1:
        cut = split_batch(batch, minibatches)
        parts = [jax.tree.map(lambda x, k=k: x[k], cut) for k in range(minibatches)]
    skipped = 0
    metrics: dict[str, Any] = {}
    first: dict[str, Any] = {}
    for _ in range(epochs):
        for part in parts:
            state, metrics = update(state, part)
            first = first or {f"first_{name}": metrics[name] for name in FIRST if name in metrics}
            skipped += int(metrics["skipped"])
    return state, metrics | {"skipped": skipped} | first


def in_rows(pack: Callable[..., Batch], num_rows: int | None) -> Batch:
    """pack(num_rows=...), or, where its samples share too little for so many rows, in the next bucket of rows."""
    try:
        return pack(num_rows=num_rows)
    except NotEnoughRows as error:
        log.warning("a batch of another shape, which compiles once: %s", error)
        return pack(num_rows=None)
