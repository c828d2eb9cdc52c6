"""One injector for all faults of a run: fail_at(point, step) does something there, once, and counts that it did.

    with fail_at("save", 4, act=refuse) as fault:
        ...
    assert fault.fired == 1

A point is a place of the loop, a step the one that is then going on; None is whichever comes first.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# point -> (what is called there, whether it has been done when the fault comes)
POINTS = {
    "rollout": ("rlalign.rollout.sampler:_collect", False),  # all tokens drawn, none of them on the host
    "reward": ("rlalign.io.runner:score", False),
    "pack": ("rlalign.io.runner:make_batch", True),
    "update": ("rlalign.io.updates:Updates.__call__", True),
    "batch": ("rlalign.io.runner:passes", False),  # what the update will be of: act gets its arguments
    "evaluate": ("rlalign.io.runner:Runner._show_samples", True),
    "save": ("rlalign.io.checkpoint:Checkpoints._commit", False),  # the arrays are written, no manifest, no number
    "commit": ("rlalign.io.checkpoint:sync", False),  # renamed, and not yet safe from a power cut
    "retain": ("rlalign.io.checkpoint:Checkpoints._delete", False),
    "restore": ("rlalign.io.session:restore", True),
    "metrics": ("rlalign.io.metrics:MetricsLog.write", False),
    "report": ("rlalign.io.loop:write_report", False),
}
# What is told its step, and passes it on to what happens inside.
STEPPED = (
    "rlalign.io.runner:Runner.step",
    "rlalign.io.runner:Runner.evaluate",
    "rlalign.io.checkpoint:Checkpoints._write",  # in the thread that saves
    "rlalign.io.metrics:MetricsLog.write",
)
Act = Callable[[Any], Any]


@dataclasses.dataclass
class Fault:
    """What was injected, and how often it happened."""

    point: str
    step: int | None
    fired: int = 0


@contextlib.contextmanager
def fail_at(point: str, step: int | None, act: Act, *, times: int = 1) -> Iterator[Fault]:
    """Does `act` at a point of a step.

    Args:
      point: one of POINTS.
      step: of the loop; None for any.
      act: gets what the call returned where the fault comes after it, else a dict of its arguments; may raise, never
        return, or return what the call is to return instead; before a call, arguments that it is to be given instead.
      times: how often, from that step on.
    """
    target, after = POINTS[point]
    fault, thread = Fault(point, step), threading.local()

    def call(function, *args, **given):
        bound = inspect.signature(function).bind(*args, **given)
        own = bound.arguments["step"] if target in STEPPED else getattr(thread, "step", None)
        due = fault.fired < times and (step is None or (own is not None and own >= step))
        if not due:
            return function(*args, **given)
        if after:
            found = function(*args, **given)
            fault.fired += 1
            other = act(found)
            return found if other is None else other
        fault.fired += 1
        bound.arguments.update(act(dict(bound.arguments)) or {})
        return function(*bound.args, **bound.kwargs)

    def remember(function, *args, **given):
        before = getattr(thread, "step", None)
        thread.step = inspect.signature(function).bind(*args, **given).arguments["step"]
        try:
            return function(*args, **given)
        finally:
            thread.step = before

    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(target, call))
        for name in STEPPED:
            if name != target:
                stack.enter_context(_replaced(name, remember))
        yield fault


@contextlib.contextmanager
def _replaced(target: str, call: Callable) -> Iterator[None]:
    """module:name or module:Class.name is called through `call` for a while."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    @functools.wraps(function)
    def replacement(*args, **given):
        return call(function, *args, **given)

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, function)


def die(told: Path, *, number: int = signal.SIGKILL) -> Act:
    """Sends a signal to the process itself; a byte of `told` is the counter that outlives it."""

    def act(at: Any) -> None:
        if isinstance(at, dict) and "metrics" in at:  # half of the line is written
            log = at["self"]
            log._file.write(f'{{"step": {at["step"]}, "lo')
            log._file.flush()
        with told.open("ab") as file:
            file.write(b".")
            os.fsync(file.fileno())
        os.kill(os.getpid(), number)

    return act


def refuse(_: Any) -> None:
    """As a file system does that has become read-only."""
    raise OSError(30, "Read-only file system")
