"""One worker as its owner sees it: how its function is named, how it is started, heard and killed."""

import collections
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from rlalign.rewards.worker import CLOSED, INSIDE, LOADED, await_end, kill_marked, value_of

SCRIPT = str(Path(__file__).with_name("worker.py"))
SCRIPT_MODULE = "__reward_script__"  # the name under which a worker executes the user's script
KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
GIVEN = {
    "PYTHONHASHSEED": "0",  # the order of a set is the same in every worker and every run
    "JAX_PLATFORMS": "cpu",  # the accelerator and the cores belong to the trainer
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
STRAY = "wrote to the channel of its worker"
FORK_LIMIT = 5.0  # seconds
MAX_LINE = 1 << 16  # bytes of a reply; an honest one has some hundreds


class Reply(NamedTuple):
    """One line from a worker: index -1 says that the function is loaded, or with a reason that it is not.

    The value True of a loaded one: it serves nothing itself, see WorkerProcess.fork.
    """

    index: int
    value: float | dict[str, float] | None
    reason: str
    retire: bool


class WorkerLost(Exception):
    """The worker closed its channel (no message), or wrote something else than replies to it (message)."""


def worker_setup(function: Callable, memory_limit_gib: float | None, what: str = "reward") -> dict[str, Any]:
    """The first line that a worker reads: where its function is, and its limit; `what` it is goes into errors.

    Raises:
      ValueError: see locate.
      RuntimeError: called in a worker, by a script that does its work when it is only imported.
    """
    if os.environ.get(INSIDE):
        raise RuntimeError("a worker must not start workers of its own")
    return {
        **locate(function, what),
        "path": [os.path.abspath(entry) for entry in sys.path],
        "memory_limit": None if memory_limit_gib is None else int(memory_limit_gib * 2**30),
    }


def locate(function: Callable, what: str = "reward") -> dict[str, str | None]:
    """Names a function so that another process finds it.

    Args:
      function: defined with `def` (or `class`) at the top level of a module or of the script that runs.
      what: it is, for the errors.
    Returns:
      {"module", "qualname", "file"}, the file None where the module has none.
    Raises:
      ValueError: a lambda, closure, method, partial or other object, or a function typed in at a prompt.
    """
    module_name = getattr(function, "__module__", None) or "?"
    qualname = getattr(function, "__qualname__", None) or type(function).__qualname__
    remedy = "it runs in other processes, which must find it: def it at the top level of a .py file"
    if "<lambda>" in qualname:
        raise ValueError(f"the {what} {qualname} in {module_name} is a lambda; {remedy}")
    if "<locals>" in qualname:
        raise ValueError(f"the {what} {qualname} in {module_name} is a closure, defined inside a function; {remedy}")
    module = found = sys.modules.get(module_name)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is not function:
        raise ValueError(f"the {what} {function!r} is not what the name {module_name}.{qualname} leads to; {remedy}")
    file = getattr(module, "__file__", None)
    spec = getattr(module, "__spec__", None)
    if module_name == "__main__":
        if file is None:
            raise ValueError(f"the {what} {qualname} was typed into an interactive session; {remedy} and import it")
        module_name = spec.name if spec is not None else SCRIPT_MODULE  # a spec: started by python -m
    return {"module": module_name, "qualname": qualname, "file": os.path.abspath(file) if file else None}


class WorkerProcess:
    """A running worker, its channel, and the items it was given, of which it works on the first.

    Attributes:
      items: indices sent and not yet answered, in order.
      ready: whether the function is loaded, and what loaded it serves.
      forks: whether `fork` can replace what serves.
      deadline: when the first item, or the loading, has taken too long (time.monotonic).
      channel: to what serves.
    """

    def __init__(
        self, setup: Mapping[str, Any], environment: Mapping[str, str], *, send_limit: float, script: str = SCRIPT
    ):
        self.items: collections.deque[int] = collections.deque()
        self.ready = self.forks = False
        self.deadline = float("inf")
        self._control: socket.socket | None = None  # to the process that forks what serves
        self._server: int | None = None  # the id of that, and of its group
        self._own = contextlib.ExitStack()  # this server's channel and pipe
        self._partial = b""
        self._closed = False  # the channel, from the other end
        with contextlib.ExitStack() as undo:
            self._folder = tempfile.mkdtemp(prefix="reward-")
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self.channel, theirs = socket.socketpair()
            undo.callback(self.channel.close)
            # Never written to: the kernel kills the worker when the last writer, this process, is gone.
            life, self._life = os.pipe()
            undo.callback(os.close, self._life)
            with theirs, os.fdopen(life):
                self._process = subprocess.Popen(
                    [sys.executable, "-P", script, str(theirs.fileno()), str(life)],
                    pass_fds=(theirs.fileno(), life),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=self._folder,
                    env=self._environment(environment),
                    start_new_session=True,
                )
            undo.callback(self._end)
            undo.callback(lambda: self._own.close())
            self._send_limit = send_limit
            self.channel.settimeout(send_limit)
            with contextlib.suppress(OSError):  # dead already: the first receive says so
                self.send(json.dumps(dict(setup)).encode() + b"\n")
            self._undo = undo.pop_all()

    def _environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        given = GIVEN | {"HOME": self._folder, "TMPDIR": self._folder} | dict(extra)
        return kept | given | {INSIDE: self._folder}

    def send(self, data: bytes) -> None:
        """Writes to the channel; OSError if the worker is gone or does not read."""
        self.channel.sendall(data)

    def receive(self) -> list[Reply]:
        """Reads the replies that have arrived; WorkerLost if that is the end, or no reply."""
        return [_parse(line) for line in self.lines(MAX_LINE)]

    def lines(self, longest: int) -> list[bytes]:
        """Reads the lines that have arrived; WorkerLost if that is the end, or one longer than `longest` bytes."""
        try:
            data = self.channel.recv(MAX_LINE)
        except OSError:
            data = b""
        if not data:
            self._closed = True
            raise WorkerLost
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > longest:
            raise WorkerLost(STRAY)
        return lines

    def fork(self) -> str:
        """Replaces what serves by a fork of the process that has loaded the function, in milliseconds.

        The one before is killed with every process of its group or with its mark (worker.kill_marked). The new one
        answers that it is loaded, as the first did; `channel` is another one.

        Returns:
          How the one before ended, "" where this is the first.
        Raises:
          OSError: no fork came back in FORK_LIMIT seconds (the first: in as many as loading may take); the worker is of
            no use any more.
        """
        self._control = self._control or self.channel
        before, self._own = self._own, contextlib.ExitStack()
        with before:  # until the one before has ended: to close its pipe is to kill it
            self.channel, theirs = socket.socketpair()
            self._own.callback(self.channel.close)
            self.channel.settimeout(self._send_limit)
            life, held = os.pipe()
            self._own.callback(os.close, held)
            self._control.settimeout(self._send_limit if self._server is None else FORK_LIMIT)
            with theirs, os.fdopen(life):
                socket.send_fds(self._control, [CLOSED if self._closed else b"."], [theirs.fileno(), life])
            self.ready, self._closed, self._partial, line = False, False, b"", b""
            while not line.endswith(b"\n"):
                if not (more := self._control.recv(MAX_LINE)):
                    raise ConnectionResetError("the process that forks is gone")
                line += more
        self._server, ended = json.loads(line)
        return "" if ended is None else _ending(os.waitstatus_to_exitcode(ended))

    def kill(self) -> str:
        """Ends the worker and every process of its groups or with its mark, removes its folder, says how it ended."""
        self._undo.close()
        return "its worker was lost" if self._server is not None else _ending(self._process.returncode)

    def _end(self) -> None:
        if self._closed and self._server is None:
            await_end(self._process.pid)
        # The id of a server that is gone may be another's by now, but a session keeps its number while its leader,
        # who is waited for below, is there.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._server is not None and os.getsid(self._server) == self._process.pid:
                os.killpg(self._server, signal.SIGKILL)
        # Before the wait: until then the dead leader's id cannot belong to anybody else's group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the kernel must not hold us
            self._process.wait(timeout=10)
        kill_marked(self._folder)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its worker was killed by {_signal_name(-code)}"
    return f"its worker exited with status {code}"


def _parse(line: bytes) -> Reply:
    try:
        index, value, reason, retire = json.loads(line)
        if not reason and index != LOADED:
            # Again: the function may have changed what the worker calls finite.
            value, reason = cast("tuple[Any, str]", value_of(value))
        return Reply(int(index), None if reason else value, str(reason), bool(retire))
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise WorkerLost(STRAY) from None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
