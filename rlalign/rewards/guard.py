"""Runs a reward function in processes that can be killed, so that no completion can stop the training.

A reward function reads text that a model made up: sooner or later one completion sends it into an endless loop, an
enormous allocation or a crash. Here that costs the completion its reward, with a reason, and nothing else. It is a
protection against accidents, not a security sandbox: a worker runs as the same user, with the same files and network.
"""

import collections
import operator
import os
import selectors
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from rlalign.rewards.items import Decode, Items
from rlalign.rewards.process import STRAY, WorkerLost, WorkerProcess, worker_setup
from rlalign.rewards.worker import LOADED, describe
from rlalign.types import Prompt, Rewards, Rollouts

WINDOW = 8  # items a worker holds at most, so that a short one need not wait for the trainer
WINDOW_BYTES = 1 << 15  # what fits a socket's buffer for sure: a worker that is busy does not read
MAX_LOST = 3  # workers lost one after the other, before any answered


class RewardGuard:
    """A reward function in long-lived worker processes: `guard(completions, examples)` returns Rewards.

        def exact(completion, example):
            return float(completion.strip() == example["answer"])

        with RewardGuard(exact, workers=4, time_limit=2.0) as guard:
            rewards = guard(["4", "5"], [{"answer": "4"}, {"answer": "4"}])     # reward [1, 0]

    A function may return its terms by name, {"accuracy": 1.0, "format": 0.5, "total": 10.5}: "total" is the reward, the
    others are in Rewards.terms.

    An item whose call hangs, raises, exits, crashes, runs out of memory, or returns anything but finite numbers
    becomes invalid, with a reason; all others keep their rewards. After a hang or a crash the worker is killed with
    every process it started, and replaced while the others go on: by a fork of the process that has loaded the
    function, in milliseconds, or, where loading it left threads (and outside Linux), by one that loads it again. A call
    never raises because of what the function does; a hang costs one worker `time_limit` seconds. What a worker prints
    is dropped.

    An item may fork 64 processes, and those none; programs that it starts (subprocess) are not counted. The processes
    that a worker started are known by their process group and, on Linux, by their environment. One that left the group
    escapes where it was also started with another environment, or outside Linux, or when this process is itself killed
    rather than closes the guard.

    A worker has a temporary directory as its working directory and HOME, an environment of PATH, the language and
    `environment`, one thread for linear algebra and no accelerator. The function runs in its main thread, whichever
    thread calls the guard, and each item in the worker's directory. It may change its module's globals: each worker has
    its own. What an item leaves behind in the process (globals, patched modules, threads) or in the directory meets the
    next ones, until the worker is replaced. Not a security sandbox.

    Args:
      function: `(completion: str | list[int], example: dict) -> float`, or terms by name, defined with def at the top
        level of a module or script. A script must start its work under `if __name__ == "__main__":`, as workers execute
        it too.
      workers: processes, > 0.
      time_limit: seconds of wall time a call may take, > 0, loading not counted.
      memory_limit_gib: GiB by which a worker's address space may grow after loading, and the size limit of a file
        that it writes; None for no limit. Linux only. Each process that the function starts may grow as much again.
      decode: list of token ids -> str, applied in this process to completions that are not str; None hands ids on.
      environment: variables that the function needs besides.
      start_limit: seconds that loading the function may take, > 0.
    Raises:
      ValueError: an argument out of range, or a function that workers cannot load; the message has the remedy.
    """

    def __init__(
        self,
        function: Callable[[Any, dict], Any],
        *,
        workers: int = 2,
        time_limit: float = 2.0,
        memory_limit_gib: float | None = 1.0,
        decode: Decode | None = None,
        environment: Mapping[str, str] | None = None,
        start_limit: float = 120.0,
    ):
        limits = {"workers": workers, "time_limit": time_limit, "start_limit": start_limit}
        if memory_limit_gib is not None:
            limits["memory_limit_gib"] = memory_limit_gib
        for name, value in limits.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        self.time_limit, self.start_limit, self.decode = float(time_limit), float(start_limit), decode
        self._count = operator.index(workers)
        self._setup, self._environment = worker_setup(function, memory_limit_gib), dict(environment or {})
        self._lock = threading.Lock()
        self._lost, self._why = 0, ""
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerProcess] = []
        self._closing = weakref.finalize(self, _close, self._workers, self._selector, os.getpid())
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def __call__(
        self,
        completions: Sequence[str | Sequence[int] | np.ndarray],
        examples: Sequence[Mapping[str, Any]],
        *,
        decode: Decode | None = None,
    ) -> Rewards:
        """Rewards of N completions.

        Args:
          completions: N texts or lists of token ids.
          examples: N mappings of JSON values; the function gets each as a dict.
          decode: in place of the guard's own. Where it raises, the item is invalid.
        Returns:
          Rewards of N.
        Raises:
          ValueError: lengths differ, or an example is not JSON.
          RuntimeError: the guard is closed.
        """
        batch = Items(completions, examples, decode or self.decode)
        with self._lock:
            if not self._closing.alive:
                raise RuntimeError("this RewardGuard is closed: call it inside its `with` block")
            try:
                self._run(batch)
            except BaseException:  # KeyboardInterrupt: no answer of this batch may reach the next one
                for worker in [worker for worker in self._workers if worker.items]:
                    self._discard(worker)
                raise
        return batch.rewards()

    def close(self) -> None:
        """Kills the workers and removes their folders, as garbage collection and exit do; more than once is fine."""
        with self._lock:
            self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _load(self) -> None:
        """Starts the workers and returns when the first has loaded the function; the others may be about to."""
        self._top_up()
        nothing = Items((), (), None)
        while not any(worker.ready for worker in self._workers):
            if not self._lost:
                self._listen(nothing)
            if self._lost:
                name = f"{self._setup['module']}.{self._setup['qualname']}"
                raise ValueError(
                    f"a worker could not load the reward {name} ({self._setup['file']}): {self._why}; its module must "
                    "be importable in a fresh process, and a script must work under `if __name__ == '__main__':` only"
                )

    def _run(self, batch: Items) -> None:
        self._lost = 0
        while batch.left:
            self._top_up()
            if not self._workers:
                return batch.refuse(f"no reward worker could be started: {self._why}")
            for worker in [worker for worker in self._workers if worker.ready]:
                self._feed(worker, batch)
            self._listen(batch)
        self._top_up()  # a replacement loads while the trainer trains

    def _top_up(self) -> None:
        while len(self._workers) < self._count and self._lost < MAX_LOST:
            try:
                worker = WorkerProcess(self._setup, self._environment, send_limit=self.start_limit)
            except OSError as error:  # no memory or no process left, for now
                self._lost, self._why = self._lost + 1, describe(error)
                continue
            worker.deadline = time.monotonic() + self.start_limit
            self._workers.append(worker)
            self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def _feed(self, worker: WorkerProcess, batch: Items) -> None:
        """Sends items up to the worker's share; the share shrinks with the batch, so that nobody waits at its end."""
        share = min(WINDOW, max(1, len(batch.pending) // (2 * self._count)))
        size = sum(len(batch.lines[index]) for index in worker.items)
        taken: list[int] = []
        while batch.pending and len(worker.items) + len(taken) < share:
            size += len(batch.lines[batch.pending[0]])
            if size > WINDOW_BYTES and (worker.items or taken):
                break
            taken.append(batch.pending.popleft())
        if not taken:
            return
        idle = not worker.items
        worker.items.extend(taken)  # before they go: an interrupt in between must find them here
        try:
            worker.send(b"".join(batch.lines[index] for index in taken))
        except OSError:  # dead: while idle, or over an item that it had, as the end of its channel will tell
            if idle:
                self._lose(worker, batch, blame=False)
            return
        if idle:
            worker.deadline = time.monotonic() + self.time_limit

    def _listen(self, batch: Items) -> None:
        """Waits for answers or for the next deadline, and acts on them."""
        before = time.monotonic()
        soonest = min((worker.deadline for worker in self._workers), default=before)
        timeout = None if soonest == float("inf") else max(0.0, soonest - before)
        for key, _ in self._selector.select(timeout):
            self._hear(key.data, batch)
        # Late as of `before`: one whose answer lay there while this process was busy has been heard by now.
        for worker in [worker for worker in self._workers if worker.deadline <= before]:
            limit = self.time_limit if worker.ready else self.start_limit
            self._lose(worker, batch, f"took longer than {limit} s")

    def _hear(self, worker: WorkerProcess, batch: Items) -> None:
        try:
            replies = worker.receive()
        except WorkerLost as lost:
            return self._lose(worker, batch, str(lost))
        for index, value, reason, retire in replies:
            if index == LOADED and not worker.ready and not reason:
                if value and not worker.forks:
                    worker.forks = True
                    self._renew(worker)
                    self._lost += worker not in self._workers
                    return
                worker.ready = True
            elif worker.items and index == worker.items[0]:
                batch.settle(worker.items.popleft(), value, reason)
                self._lost = 0
            else:
                return self._lose(worker, batch, reason or STRAY)
            if retire:
                return self._lose(worker, batch, reason, blame=False)
        worker.deadline = time.monotonic() + self.time_limit if worker.items else float("inf")

    def _lose(self, worker: WorkerProcess, batch: Items, reason: str = "", *, blame: bool = True) -> None:
        """Ends what serves; its first item is to blame, so invalid, and its others wait for the next one."""
        left, worker.items = worker.items, collections.deque()
        again = worker.forks and worker.ready and self._lost < MAX_LOST
        ending = self._renew(worker) if again else self._discard(worker)
        if blame and left:
            batch.settle(left.popleft(), None, reason or ending)
        else:
            self._lost, self._why = self._lost + 1, reason or ending
        batch.pending.extendleft(reversed(left))

    def _renew(self, worker: WorkerProcess) -> str:
        """Another fork of the function as it was loaded; the whole worker goes where there is none."""
        self._selector.unregister(worker.channel)
        try:
            ending = worker.fork()
        except BaseException as error:
            self._workers.remove(worker)
            worker.kill()
            if not isinstance(error, OSError | ValueError):  # an interrupt
                raise
            self._why = f"no fork of it came back: {describe(error)}"
            return f"its worker was lost, and {self._why}"
        worker.deadline = time.monotonic() + self.start_limit
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)
        return ending

    def _discard(self, worker: WorkerProcess) -> str:
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        return worker.kill()


def score(
    reward: RewardGuard | Callable[[Any, dict], Any],
    prompts: Sequence[Prompt | np.ndarray | Sequence[int]],
    rollouts: Rollouts,
    *,
    decode: Decode | None = None,
    workers: int = 2,
    time_limit: float = 2.0,
) -> Rewards:
    """Rewards of a batch of rollouts: sample n gets `reward(completion_n, example of prompts[rollouts.prompt[n]])`.

    The completion is `tokens[n][mask[n]]`, decoded if there is a `decode`, else a list of ints.

    Args:
      reward: a RewardGuard, whose workers stay; or a plain function, for which workers start and end with this call
        (some tenths of a second, more if its module imports much).
      prompts: Prompts, whose `example` the function gets, or token ids, with which it gets {}.
      rollouts: of N samples.
      decode: list of token ids -> str; None: the guard's own.
      workers, time_limit: see RewardGuard; a given guard keeps its own.
    Returns:
      Rewards of N.
    Raises:
      ValueError: see RewardGuard; also a sample of a prompt that is not there.
    """
    if not isinstance(reward, RewardGuard):
        with RewardGuard(reward, workers=workers, time_limit=time_limit, decode=decode) as guard:
            return score(guard, prompts, rollouts)
    tokens, mask, owner = (np.asarray(field) for field in (rollouts.tokens, rollouts.mask, rollouts.prompt))
    outside = owner[(owner < 0) | (owner >= len(prompts))]
    if outside.size:
        raise ValueError(f"rollouts.prompt has {outside[0]}, but there are {len(prompts)} prompts")
    examples = [getattr(prompt, "example", {}) for prompt in prompts]
    completions = [row[kept] for row, kept in zip(tokens, mask.astype(bool), strict=True)]
    return reward(completions, [examples[index] for index in owner], decode=decode)


def _close(workers: list[WorkerProcess], selector: selectors.BaseSelector, owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the trainer leaves its parent's workers alone
        for worker in workers:
            worker.kill()
        workers.clear()
        selector.close()
