"""Checkpoints that are complete or absent.

    folder/
      120/state/...       the TrainState, written by Orbax (StandardSave): every array, sharded or not
      120/meta/...        a JSON item: configuration, fingerprints of model and prompts, loop step
      120/files.json      every file of the step with its size and CRC-32, written last
      best.json           the step that retention must never delete, with a CRC-32 of what it says

A step is written in a staging folder and appears under its number by one rename, so a kill at any moment leaves either
the whole step or nothing under that number. What is later truncated, lost or changed by a bit is found by comparing
with `files.json` before anything is read: Orbax alone restores a flipped bit in silence. The folder has to be on a file
system with atomic renames, shared by all processes.

A save may go on behind the steps that follow it: the state is copied to the host first, because a step is free to use
its arrays up, and one thread then does what a save in front does. At most one is under way.
"""

import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlalign.checks import differences
from rlalign.hosts import of_first
from rlalign.io.arrays import Arrays
from rlalign.io.files import sync, write_atomic
from rlalign.io.manifest import changed, missing, write_manifest
from rlalign.types import TrainState

log = logging.getLogger(__name__)
BEST = "best.json"
_SAVING, _DELETING = "saving-", "deleting-"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or does not fit the run."""


class ConfigMismatch(ValueError):
    """A run is resumed with another configuration than the one it was started with."""


class DamagedCheckpoint(UserWarning):
    """A checkpoint could not be used and an earlier one is used instead, or the mark of the best one was lost."""


class Checkpoints:
    """The checkpoints of one run, newest `keep` and the best one.

    Every process of a multi-process run makes the same calls; process 0 alone renames and deletes. `steps`, `latest`,
    `problem` and `best_problem` tell of what is on disk now. `check` raises what made a save fail, and waits for none;
    all else waits for a save under way, and raises what made it fail.

    Args:
      folder: created at the first save.
      keep: how many of the newest intact steps stay, besides the best one; at least 1.
      keep_every: multiples of it stay as well; None for none.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3, keep_every: int | None = None):
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to stay")
        self.folder = Path(folder).absolute()
        self.keep, self.keep_every = keep, keep_every
        self._attempts = 0
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[int, Future] | None = None  # the step that is being saved
        self._arrays = Arrays()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        try:
            if error is not None and (second := self._ended()) is not None:  # must not hide the first
                log.error("and a save failed", exc_info=second)
        finally:
            self.close()

    def close(self) -> None:
        """Waits for a save under way, as `wait` does, and frees all threads."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._arrays.close()

    def wait(self) -> None:
        """Returns when no save is under way; raises what made the last one fail, with a note of its step."""
        if (error := self._ended()) is not None:
            raise error

    def check(self) -> None:
        """Raises what made a save fail that has ended; does not wait for one under way. To be called at every step."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def _ended(self) -> BaseException | None:
        """Waits for the save under way; why it failed, which is told once."""
        if self._pending is None:
            return None
        step, future = self._pending
        error = future.exception()
        self._pending = None
        if error is not None:
            error.add_note(f"while step {step} was being saved to {self.folder}, which has {self.steps()}")
        return error

    def steps(self) -> list[int]:
        """The steps that were saved completely, ascending; whether they are still intact is checked by `restore`."""
        if not self.folder.is_dir():
            return []
        # 007 is no step: under the name 7 it would not be found again.
        named = [p for p in self.folder.iterdir() if p.name.isdecimal() and str(int(p.name)) == p.name]
        return sorted(int(p.name) for p in named if p.is_dir())

    def latest(self) -> int | None:
        """The newest saved step, None if there is none."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: TrainState, meta: Mapping[str, Any], *, best: float | None = None, wait: bool = True
    ) -> None:
        """Saves one step; what fails is an error, nothing of it is listed and earlier steps are untouched.

        Args:
          step: the loop step the run would continue at; later than every intact step in the folder.
          state: arrays only, on any sharding, none of size zero (Orbax refuses those).
          meta: JSON values.
          best: marks it as the best one, with this value, once it is saved.
          wait: True returns when the step is on disk. False as soon as the state is copied to the host (one more of it
            in memory until it is written): the step then appears by itself, the caller's arrays are free to be used up,
            and an error comes from the next `check`, `wait`, `save`, `restore`, `best` or `close`. Several processes
            wait anyway: Orbax and we let them meet, and what meets must not do so from two threads at once.

        Raises:
          CheckpointError: an intact checkpoint of this or a later step exists.
          TypeError: `meta` is not JSON.
          OSError, ValueError: the write failed, as Orbax reports it (a full disk, a read-only folder); or an earlier
            one did that was not waited for.
        """
        self.wait()
        newer = [s for s in self.steps() if s >= step and self.problem(s) is None]
        if newer:
            raise CheckpointError(
                f"{self.folder} already has a checkpoint of step {newer[-1]}, and step {step} is not after it: "
                "use a new folder, or remove the later checkpoints"
            )
        record = {"meta": json.loads(json.dumps(dict(meta))), "step": step, "leaves": _leaves(state)}
        if wait or jax.process_count() > 1:
            self._write(step, state, record, best)
            return
        # np.array copies. np.asarray would be a view on CPUs, which keeps the next step from updating in place.
        host = jax.tree.map(np.array, state)
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="rlalign-save")
        self._pending = step, self._thread.submit(self._write, step, host, record, best)

    def _write(self, step: int, state: TrainState, record: dict[str, Any], best: float | None) -> None:
        # A failed save may leave Orbax's threads writing for a moment: no two attempts share a folder, and no two runs.
        # The processes of one run write to one folder, which is named after the first of them.
        self._attempts += 1
        staging = self.folder / f"{_SAVING}{step}-{int(of_first(float(os.getpid())))}-{self._attempts}"
        self._alone(self._clean, "clean")
        try:
            self._arrays.write(staging, state, record)
            self._alone(lambda: self._commit(staging, step), "commit")
        finally:
            if jax.process_index() == 0:
                self._clean()
        self._alone(lambda: self._retain(step), "retain")
        if best is not None:
            self._mark(step, best)

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`. Raises CheckpointError where the step is damaged or absent."""
        self.wait()
        if problem := self.problem(step):
            raise CheckpointError(f"{self.folder / str(step)}: {problem}")
        return self._arrays.record(self.folder / str(step))["meta"]

    def restore(
        self, step: int | None, like: TrainState, *, check: Callable[[dict[str, Any]], object] | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads a step, or, where it is damaged, the newest intact one before it, with a warning that names the damage.

        Args:
          step: None means the newest. The step really read is the second value's "step".
          like: gives the tree, shapes, dtypes and shardings, as arrays or ShapeDtypeStructs; the shardings need not be
            those saved.
          check: called with the saved meta before any array is read, e.g. to call `check_same`.

        Returns:
          (state, meta): arrays bitwise those saved, the tree's types those of `like`; meta has "step" added.

        Raises:
          CheckpointError: no intact step, or one whose arrays differ from `like` in name, shape or dtype.
        """
        self.wait()
        step = self._intact(step)
        record = self._arrays.record(self.folder / str(step))
        if check is not None:
            check(record["meta"])
        _check_leaves(record["leaves"], _leaves(like), self.folder / str(step))
        state = self._arrays.state(self.folder / str(step), like)
        return state, {**record["meta"], "step": record["step"]}

    def mark_best(self, step: int, value: float | None = None) -> None:
        """Keeps `step` from now on whatever retention does; the step marked before loses that. It must be saved."""
        self.wait()
        if step not in self.steps():
            raise CheckpointError(f"step {step} cannot be the best: {self.folder} has {self.steps()}")
        self._mark(step, value)

    def _mark(self, step: int, value: float | None) -> None:
        mark = {"step": step, "value": value}
        text = json.dumps({**mark, "crc32": _checksum(mark)})
        self._alone(lambda: write_atomic(self.folder / BEST, text), "best")

    def best(self) -> int | None:
        """The step marked best, None if none was marked or it is gone; nor, with a warning, if the mark is damaged."""
        self.wait()
        return self._marked()

    def best_problem(self) -> str | None:
        """What is wrong with the mark of the best step; None if it is what was written, or there is none."""
        return self._read_mark()[1]

    def _marked(self) -> int | None:
        step, problem = self._read_mark()
        if problem is not None:  # no reason to end a run: the next step that is better is marked again
            warnings.warn(f"{problem}; no step counts as the best one", DamagedCheckpoint, stacklevel=3)
        return step if step in self.steps() else None

    def _read_mark(self) -> tuple[int | None, str | None]:
        """The step, and the problem; at least one of them is None."""
        path = self.folder / BEST
        try:
            mark = json.loads(path.read_bytes())
            checksum, step = mark.pop("crc32"), int(mark["step"])
        except FileNotFoundError:
            return None, None
        except OSError as error:
            return None, f"{path} cannot be read ({error.strerror or error})"
        except (ValueError, TypeError, AttributeError, LookupError):
            return None, f"{path} is damaged"
        if checksum != _checksum(mark):
            return None, f"{path} is damaged (its CRC-32 differs)"
        return step, None

    def problem(self, step: int) -> str | None:
        """What is wrong with a saved step: files missing, truncated or changed since it was saved, or those of another
        step; None if intact. Files that cannot be read are a problem as well, never an OSError."""
        root = self.folder / str(step)
        if problem := missing(root) or changed(root):
            return problem
        try:
            saved = self._arrays.record(root)["step"]
        except (OSError, ValueError, LookupError, TypeError) as error:  # nothing is listed, and nothing is there
            return f"its record cannot be read ({error})"
        return None if saved == step else f"it is step {saved} (a renamed folder?)"

    def _intact(self, step: int | None) -> int:
        """The newest intact step up to `step`; warns of the damaged ones that it passes over.

        Process 0 looks, and all take its step: checksums read every byte, and two processes must not see two steps.
        """
        if step is None:
            step = self.latest()
        found, damage = -1, []
        if jax.process_index() == 0:
            for candidate in [s for s in reversed(self.steps()) if step is not None and s <= step]:
                problem = self.problem(candidate)
                if problem is None:
                    found = candidate
                    break
                damage.append(f"damaged checkpoint {self.folder / str(candidate)}: {problem}")
        found = int(of_first(float(found)))
        if found < 0:
            raise CheckpointError("\n".join([f"{self.folder} has no checkpoint that can be read", *damage]))
        for text in damage:
            warnings.warn(f"{text}; using step {found} instead", DamagedCheckpoint, stacklevel=3)
        return found

    def _commit(self, staging: Path, step: int) -> None:
        write_manifest(staging)
        target = self.folder / str(step)
        if target.exists():  # a damaged one: an intact one was refused by save
            self._delete(step)
        staging.rename(target)
        sync(self.folder)

    def _retain(self, saved: int) -> None:
        steps = self.steps()
        # `saved` was read back a moment ago. Of the others sizes alone are compared: it may be the only good one.
        stay = {saved, *[s for s in steps if missing(self.folder / str(s)) is None][-self.keep :], self._marked()}
        for step in steps:
            if step not in stay and (self.keep_every is None or step % self.keep_every):
                self._delete(step)

    def _delete(self, step: int) -> None:
        # Renamed first: a kill while files are unlinked must not leave half a step under its number.
        doomed = self.folder / f"{_DELETING}{step}"
        (self.folder / str(step)).rename(doomed)
        shutil.rmtree(doomed)

    def _clean(self) -> None:
        """Removes what kills and failed saves left behind; what resists costs space only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name.startswith((_SAVING, _DELETING)):
                shutil.rmtree(path, ignore_errors=True)

    def _alone(self, action: Callable[[], None], name: str) -> None:
        """Process 0 acts, the others wait for it."""
        if jax.process_index() == 0:
            action()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"rlalign.checkpoint.{name}")


def check_same(saved: Mapping[str, Any], config: Mapping[str, Any], *, allow: Sequence[str] = ()) -> list[str]:
    """Refuses to resume a run with another configuration.

    Args:
      saved: the configuration saved with the checkpoint.
      config: the configuration of this process; compared as JSON, so tuples equal lists.
      allow: dotted names that may differ; a name covers the fields below it.

    Returns:
      The dotted names that differ and are allowed to.

    Raises:
      ConfigMismatch: lists every other difference, with both values and the remedy.

    >>> check_same({"lr": 0.1, "sampling": {"k": 4}}, {"lr": 0.1, "sampling": {"k": 8}}, allow=["sampling"])
    ['sampling.k']
    """
    changed = differences(saved, config)
    refused = [name for name in changed if not any(name == a or name.startswith(f"{a}.") for a in allow)]
    if refused:
        lines = [f"  {name}: saved {changed[name][0]}, now {changed[name][1]}" for name in refused]
        raise ConfigMismatch(
            "the run was started with another configuration:\n"
            + "\n".join(lines)
            + f"\nUse the saved values, a new run folder, or accept the change with allow_change={tuple(refused)}"
        )
    return list(changed)


def _checksum(mark: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(mark).encode())


def _leaves(tree: Any) -> dict[str, str]:
    """Dotted name of every array -> "dtype[shape]"."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{name} is a {type(leaf).__name__}: a state holds arrays only, scalars too")
        named[name] = f"{leaf.dtype}{list(leaf.shape)}"
    return named


def _check_leaves(saved: dict[str, str], wanted: dict[str, str], where: Path, *, show: int = 8) -> None:
    """Orbax would cast, or fail with a page of tree: names, shapes and dtypes are compared first."""
    names = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if names:
        lines = [f"  {n}: saved {saved.get(n, 'absent')}, this run {wanted.get(n, 'absent')}" for n in names[:show]]
        more = [f"  and {len(names) - show} more"] if len(names) > show else []
        raise CheckpointError("\n".join([f"{where} holds another model or optimizer:", *lines, *more]))
