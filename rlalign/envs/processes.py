"""Copies of an environment in worker processes: for those that are slow, can hang, or bring their process down.

A worker holds many copies and answers one request at a time. When one of its copies hangs, or the process dies, it is
killed and started anew; that copy's episode is lost, and the others are brought back by doing their actions again
from the same seed, which a deterministic environment turns into the same state.
"""

import contextlib
import json
import os
import selectors
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from rlalign.envs.protocol import End, Info, Observation, Transition
from rlalign.envs.worlds import Lost, Make, check_copies
from rlalign.rewards.process import WorkerLost, WorkerProcess, worker_setup
from rlalign.rewards.worker import LOADED

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
LONGEST = 1 << 20  # bytes of an answer
MAX_STARTS = 3  # of a worker in a row that does not load


class _Request(NamedTuple):
    copy: int
    what: str  # "reset", "step" or "replay"
    given: Any
    limit: float  # seconds


class _Past(NamedTuple):
    """What brought a copy where it is."""

    seed: int
    actions: tuple[str, ...]
    last: Observation


class WorkerWorlds:
    """Copies in worker processes, with the methods of Worlds.

    Args:
      make: gives one copy: a class or a function at the top level of a module or script; a script must start its work
        under `if __name__ == "__main__":`, as workers execute it too.
      copies: how many there are at most; copy i lives in worker i % workers.
      workers: processes.
      arguments: of `make`, by name; JSON values.
      step_limit, reset_limit: seconds that one step, or one reset, may take.
      start_limit: seconds that loading `make` and making one copy may take.
      environment: variables that the environment needs besides; of this process's a few are kept (PATH, language).

    Raises:
      ValueError: a number out of range, a `make` that workers cannot find or that raises there; the message says why.
    """

    def __init__(
        self,
        make: Make,
        *,
        copies: int,
        workers: int,
        arguments: Mapping[str, Any] | None = None,
        step_limit: float = 10.0,
        reset_limit: float = 60.0,
        start_limit: float = 120.0,
        environment: Mapping[str, str] | None = None,
    ):
        numbers = {"copies": copies, "workers": workers, "step_limit": step_limit, "reset_limit": reset_limit}
        for name, value in {**numbers, "start_limit": start_limit}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        self.copies = copies
        self.step_limit, self.reset_limit, self.start_limit = step_limit, reset_limit, start_limit
        self.restarts, self._failed = 0, 0
        self.made_from: Mapping[str, Any] = {"make": make, "arguments": dict(arguments or {})}
        self._setup = {**worker_setup(make, None, "environment"), "arguments": dict(arguments or {})}
        self._environment = dict(environment or {})
        self._past: dict[int, _Past] = {}  # of the copies that are running
        self._gone: dict[int, Lost] = {}  # of those that were lost while nobody asked
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerProcess | None] = [None] * min(workers, copies)
        self._queues: list[deque[_Request]] = [deque() for _ in self._workers]
        self._closing = weakref.finalize(self, _close, self._workers, self._selector, os.getpid())
        try:
            for number in range(len(self._workers)):
                self._start(number)
            self._answer({})
        except BaseException:
            self.close()
            raise

    def reset(self, seeds: Mapping[int, int]) -> dict[int, Observation | Lost]:
        """Begin a task in each of the copies; see Worlds.reset."""
        check_copies(seeds, self.copies)
        for copy in seeds:
            self._past.pop(copy, None)
            self._gone.pop(copy, None)
        found = self._ask(_Request(copy, "reset", seed, self.reset_limit) for copy, seed in seeds.items())
        return {copy: found[copy] for copy in seeds}  # workers answer in any order

    def step(self, actions: Mapping[int, str]) -> dict[int, Transition | Lost]:
        """Do something in each of the copies; see Worlds.step."""
        check_copies(actions, self.copies)
        gone = {copy: self._gone.pop(copy) for copy in actions if copy in self._gone}
        idle = [copy for copy in actions if copy not in self._past and copy not in gone]
        if idle:
            raise ValueError(f"copy {idle[0]} has no episode: reset it first; one that was lost cannot go on")
        left = {copy: action for copy, action in actions.items() if copy not in gone}
        found = self._ask(_Request(copy, "step", action, self.step_limit) for copy, action in left.items())
        return {copy: gone[copy] if copy in gone else found[copy] for copy in actions}

    def close(self) -> None:
        """Kill the workers and everything they started; more than once is fine."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _ask(self, requests: Iterable[_Request]) -> dict[int, Any]:
        if not self._closing.alive:
            raise RuntimeError("these WorkerWorlds are closed: use them inside their `with` block")
        for request in requests:
            self._queues[request.copy % len(self._workers)].append(request)
        found: dict[int, Any] = {}
        try:
            self._answer(found)
        except BaseException:  # KeyboardInterrupt: no answer to these requests may reach the next ones
            for number, worker in enumerate(self._workers):
                self._queues[number].clear()
                if worker is not None:
                    self._end(number)
                    self._start(number)
            self._past.clear()
            raise
        return found

    def _answer(self, found: dict[int, Any]) -> None:
        """Until every queue is empty and every worker idle and loaded: send, wait, hear, and replace what is lost."""
        while True:
            busy = False
            for number, queue in enumerate(self._queues):
                worker = self._workers[number]
                assert worker is not None
                if queue and worker.ready and worker.deadline == float("inf"):
                    self._send(worker, queue[0])
                busy |= bool(queue) or not worker.ready
            if not busy:
                return
            before = time.monotonic()
            soonest = min(worker.deadline for worker in self._workers if worker is not None)
            for key, _ in self._selector.select(max(0.0, soonest - before)):
                self._hear(key.data, found)
            for number, worker in enumerate(self._workers):
                if worker is not None and worker.deadline <= before:
                    self._lose(number, found, End.HUNG, "took longer than its limit")

    def _send(self, worker: WorkerProcess, request: _Request) -> None:
        worker.deadline = time.monotonic() + request.limit
        with contextlib.suppress(OSError):  # dead: the end of its channel will tell
            worker.send(json.dumps([request.copy, request.what, request.given]).encode() + b"\n")

    def _hear(self, number: int, found: dict[int, Any]) -> None:
        worker, queue = self._workers[number], self._queues[number]
        assert worker is not None
        try:
            lines = worker.lines(LONGEST)
        except WorkerLost as lost:
            return self._lose(number, found, End.DIED, str(lost))
        for line in lines:
            try:
                copy, value, reason = json.loads(line)
            except (ValueError, TypeError):
                return self._lose(number, found, End.DIED, "wrote to the channel of its worker")
            if copy == LOADED and not worker.ready:
                if reason:
                    return self._lose(number, found, End.RAISED, reason)
                worker.ready = True
            elif queue and queue[0].copy == copy and worker.deadline < float("inf"):
                self._settle(queue.popleft(), value, reason, found)
            else:
                return self._lose(number, found, End.DIED, "wrote to the channel of its worker")
            worker.deadline = float("inf")

    def _settle(self, request: _Request, value: Any, reason: str, found: dict[int, Any]) -> None:
        """Takes an answer, and remembers what brings the copy back to it."""
        copy = request.copy
        if reason:
            return self._forget(request, Lost(End.RAISED, reason), found)
        if request.what == "replay":
            seen = _observation(value[0] if isinstance(value[0], list) else value)
            if seen != self._past[copy].last:
                why = "could not be brought back: its environment answers the same actions with another observation"
                self._forget(request, Lost(End.DIED, why), found)
            return
        if request.what == "reset":
            found[copy] = _observation(value)
            self._past[copy] = _Past(request.given, (), found[copy])
            return
        found[copy] = step = _transition(value)
        past = self._past.pop(copy)
        if not step.terminated and not step.truncated:
            self._past[copy] = _Past(past.seed, (*past.actions, request.given), step.observation)

    def _forget(self, request: _Request, lost: Lost, found: dict[int, Any]) -> None:
        """The copy's episode is lost: said now, or at its next step where nobody is waiting for it."""
        copy, queue = request.copy, self._queues[request.copy % len(self._workers)]
        self._past.pop(copy, None)
        if request.what != "replay":
            found[copy] = lost
        elif waiting := [other for other in queue if other.copy == copy]:
            queue.remove(waiting[0])
            found[copy] = lost
        else:
            self._gone[copy] = lost

    def _lose(self, number: int, found: dict[int, Any], end: End, reason: str) -> None:
        """Replaces a worker; what it was doing is to blame, and the other episodes that it held are done again."""
        worker, queue = self._workers[number], self._queues[number]
        assert worker is not None
        loaded = worker.ready
        blamed = queue.popleft() if queue and loaded and worker.deadline < float("inf") else None
        ending = self._end(number)
        reason = reason or ending
        if loaded:
            self._failed, self.restarts = 0, self.restarts + 1
        else:
            self._failed += 1
            if self._failed >= MAX_STARTS or end is End.RAISED:
                name = f"{self._setup['module']}.{self._setup['qualname']}"
                raise ValueError(f"a worker could not make the environment {name}: {reason}")
        if blamed is not None:
            self._forget(blamed, Lost(end, reason), found)
        again = [request for request in queue if request.what != "replay"]
        queue.clear()
        for copy in [copy for copy in self._past if copy % len(self._workers) == number]:
            past = self._past[copy]
            limit = self.reset_limit + len(past.actions) * self.step_limit
            queue.append(_Request(copy, "replay", [past.seed, *past.actions], limit))
        queue.extend(again)
        self._start(number)

    def _start(self, number: int) -> None:
        setup = {**self._setup, "first": number}  # copy i lives in worker i % workers
        worker = WorkerProcess(setup, self._environment, send_limit=self.start_limit, script=SCRIPT)
        worker.deadline = time.monotonic() + self.start_limit
        self._workers[number] = worker
        self._selector.register(worker.channel, selectors.EVENT_READ, number)

    def _end(self, number: int) -> str:
        worker = self._workers[number]
        assert worker is not None
        self._selector.unregister(worker.channel)
        self._workers[number] = None
        return worker.kill()


def _observation(value: list) -> Observation:
    """From JSON, which has no tuples."""
    text, task, admissible, anchor = value
    return Observation(text, task, tuple(admissible), _hashable(anchor))


def _transition(value: list) -> Transition:
    observation, reward, terminated, truncated, info = value
    return Transition(_observation(observation), float(reward), bool(terminated), bool(truncated), Info(*info))


def _hashable(value: Any) -> Any:
    return tuple(_hashable(part) for part in value) if isinstance(value, list) else value


def _close(workers: list[WorkerProcess | None], selector: selectors.BaseSelector, owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the trainer leaves its parent's workers alone
        for worker in workers:
            if worker is not None:
                worker.kill()
        workers.clear()
        selector.close()
