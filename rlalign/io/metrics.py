"""Metrics of a run: one JSON line a step, an optional TensorBoard mirror, and live numbers on the terminal."""

import contextlib
import importlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlalign.io.files import write_atomic

log = logging.getLogger(__name__)
Show = Callable[[Mapping[str, Any]], None]

# What a person watches, in this order: metric -> (label, format).
_SHOWN = {
    "eval_accuracy": ("held-out", "{:.1%}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "reward": ("reward", "{:.3f}"),
    "loss": ("loss", "{:.4f}"),
    "kl": ("kl", "{:.4f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}


class MetricsLog:
    """An append-only file of JSON lines, one a step, in ascending order of "step".

    Every line is strict JSON: NaN and infinities are written as null, scalars of any float dtype as the float64 of the
    same value (so they read back bitwise), arrays as lists. A line is flushed when it is written: it survives a killed
    process, though not a power cut.

    On opening, the file is cut to what a run that restarts at `resume_step` keeps: a torn last line and every line with
    step >= resume_step go, so no step occurs twice. `resume_step=0` starts the file anew. The cut replaces the file
    atomically. Steps before that it lacks, as after a power cut, are counted in a warning.

    Args:
      path: created with its folder where absent.
      resume_step: the first step that will be written.
      tensorboard: a folder for a TensorBoard mirror of the scalars; needs `pip install rlalign[tensorboard]`.

    Raises:
      ValueError: a line before the last is not a JSON object with an integer "step"; names the file and line.
      ImportError: a mirror is asked for and tensorboardX is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume_step: int = 0,
        tensorboard: str | os.PathLike[str] | None = None,
    ):
        self.path = Path(path)
        self._mirror = None if tensorboard is None else _summary_writer(tensorboard, resume_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {row["step"]: line for row, line in _rows(self.path) if row["step"] < resume_step}
        self._last = max(kept, default=-1)
        if len(kept) < resume_step:
            gone = next(step for step in range(resume_step) if step not in kept)
            log.warning(
                "%s lacks %d of %d steps, the first is %d", self.path, resume_step - len(kept), resume_step, gone
            )
        text = "".join(f"{kept[step]}\n" for step in sorted(kept))
        if not self.path.exists() or text.encode() != self.path.read_bytes():
            write_atomic(self.path, text)
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the line of one step.

        Args:
          step: later than the last one written.
          metrics: name -> number, text, None, array, or list of these; device scalars are fetched.

        Raises:
          ValueError: `step` is not after the last one.
          TypeError: a value that JSON has no place for; names it.
        """
        if step <= self._last:
            raise ValueError(f"{self.path}: step {step} after step {self._last}; a step is written once, in order")
        row = {"step": int(step), **{name: _plain(name, value) for name, value in metrics.items() if name != "step"}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._last = int(step)
        if self._mirror is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._mirror.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the file and the mirror."""
        self._file.close()
        if self._mirror is not None:
            self._mirror.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file, in the order of the file; null reads as None, and so does a NaN of another writer.

    Args:
      path: an absent file reads as no lines.

    Returns:
      One dict a line, each with an integer "step". A torn last line, as a killed writer leaves it, is left out.

    Raises:
      ValueError: a line before the last is damaged; names the file and line.
    """
    return [row for row, _ in _rows(Path(path))]


@contextlib.contextmanager
def progress(total: int, start: int = 0, *, every: int = 10, stream: TextIO | None = None) -> Iterator[Show]:
    """Shows how a run goes: a live bar on a terminal, one plain line every `every` steps elsewhere (CI logs).

    Everything goes to stderr, so that the last line on stdout stays the experiment's result.

    Args:
      total: steps of the whole run.
      start: steps done before (a resumed run).
      every: how often a plain line is printed; the first, the last and every evaluation step are always shown.
      stream: stderr unless given.

    Yields:
      A function to call once a step with its metrics; it shows those that a person watches and that are present.
    """
    out = sys.stderr if stream is None else stream
    if not out.isatty():
        yield _plain_lines(total, start, every, out)
        return
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
    # Rich would send prints meant for a pipe on stdout to the terminal: it may redirect only what is a terminal itself.
    with Progress(
        *columns,
        TextColumn("{task.fields[numbers]}"),
        console=Console(file=out),
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:
        task = bar.add_task("train", total=total, completed=start, numbers="")
        watched: dict[str, Any] = {}

        def show(metrics: Mapping[str, Any]) -> None:
            watched.update(metrics)  # the last evaluation stays in sight
            bar.update(task, advance=1, numbers=_numbers(watched))

        yield show


def _plain_lines(total: int, start: int, every: int, stream: TextIO) -> Show:
    done, began = start, time.monotonic()

    def show(metrics: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        if done % every and done not in (start + 1, total) and "eval_accuracy" not in metrics:
            return
        left = (time.monotonic() - began) / (done - start) * (total - done)
        print(
            f"step {done:>{len(str(total))}}/{total}  {_numbers(metrics)}  {_duration(left)} left",
            file=stream,
            flush=True,
        )

    return show


def _numbers(metrics: Mapping[str, Any]) -> str:
    shown = [(label, form, metrics[name]) for name, (label, form) in _SHOWN.items() if metrics.get(name) is not None]
    return "  ".join(f"{label} {form.format(float(value))}" for label, form, value in shown)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    """(row, its text) of every whole line."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except ValueError:  # broken JSON or broken UTF-8
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append((row, line.decode()))
        elif number < len(lines):
            raise ValueError(f'{path}:{number}: not a JSON object with an integer "step"; remove the line to go on')
    return rows


def _plain(name: str, value: Any) -> Any:
    """The JSON value of a metric."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(name, inner) for inner in value]
    if not hasattr(value, "__array__"):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}: a number, text, array or list is wanted")
    array = np.asarray(value)
    if array.dtype.kind not in "biuUS":  # bfloat16 and its like have a kind of their own
        array = array.astype(np.float64)
    return _plain(name, array.tolist())


def _summary_writer(folder: str | os.PathLike[str], resume_step: int) -> Any:
    try:
        module = importlib.import_module("tensorboardX")
    except ImportError as error:
        raise ImportError("a TensorBoard mirror needs tensorboardX: pip install rlalign[tensorboard]") from error
    return module.SummaryWriter(os.fspath(folder), purge_step=resume_step)
