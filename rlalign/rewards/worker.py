"""The process in which a reward function runs: guard.py starts this file as a script, nothing imports it.

Standard library only, so that a worker starts in milliseconds and its memory is the function's own. The guard and
the worker exchange JSON lines over one socket; nothing is ever unpickled, and the function's prints go nowhere:

    guard -> worker    {"module", "qualname", "file", "path", "memory_limit"}     once
    guard -> worker    [index, completion, example]                              one line an item
    worker -> guard    [index, value or null, reason, retire]                    one line an item; index -1: loaded

A value is a number, or the object {"total": number, term: number, ...}.

`retire` asks the guard for a fresh process: memory ran out, or too many processes were forked.

Loading may import for seconds, so a process that has loaded and runs one thread keeps what it has and serves no item
itself. It answers [-1, true, "", false], and then forks one process after the other, on sockets that it is given:

    guard -> keeper    a byte, and two descriptors: a channel, and the pipe that ends it (see die_with); the byte CLOSED
                       says that the process before closed its channel, so may be ending by itself
    keeper -> guard    [pid, how the process before it ended, as os.waitpid says it, or null for the first]
"""

import contextlib
import fcntl
import importlib
import importlib.util
import json
import math
import os
import reprlib
import resource
import select
import shutil
import signal
import socket
import sys

INSIDE = "RLALIGN_REWARD_WORKER"  # in a worker's environment: its mark, which no other worker has
CLOSED = b"c"
LOADED = -1
TOTAL = "total"  # of a reward's terms the reward
MAX_REASON = 300  # characters of an exception's message
MAX_NAME = 60  # of a term or of an exception's type
MAX_FORKS = 64  # per item
MAX_END = 0.2  # seconds for a process that closed its channel
MAX_ROUNDS = 10  # of looking for processes to kill


class Forks:
    """Counts the processes that one item forks, and refuses the ones that make a fork bomb.

    An audit hook sees every `os.fork` of this interpreter and of the children it forks. Separate programs
    (subprocess) are not counted.
    """

    def __init__(self):
        self.pid = os.getpid()
        self.count = 0

    def __call__(self, event, _):
        if event not in ("os.fork", "os.forkpty"):
            return
        self.count += 1
        if self.count > MAX_FORKS or os.getpid() != self.pid:
            raise RuntimeError(f"a reward may fork {MAX_FORKS} processes, and those may fork none")


def load(module, qualname, file):
    """Returns the function `qualname` of a module, which is found by its name, else by its file.

    A script's functions come by file, under a module name that is not `__main__`: its
    `if __name__ == "__main__":` block does not run.
    """
    found = loaded_module(module, file)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def loaded_module(name, file):
    """Imports by name if that name leads to `file` here (or there is no file), else executes the file."""
    if file is None or same_file(origin(name), file):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def origin(name):
    """The file that `import name` would execute; None if there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    return spec.origin if spec else None


def same_file(first, second):
    """Whether two paths, the first possibly None or "built-in", are one existing file."""
    try:
        return first is not None and os.path.samefile(first, second)
    except OSError:
        return False


def limit_memory(size):
    """Limits address space to `size` bytes more than now, and every file written to `size`; Linux only."""
    if not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    set_limit(resource.RLIMIT_AS, used + size)
    set_limit(resource.RLIMIT_FSIZE, size)


def set_limit(kind, value):
    """Lowers a resource limit to `value`, or to the hard limit where that is lower."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def die_with(life):
    """Lets the kernel end this process group when the guard's end of the pipe `life` closes.

    A signal whose default action is to terminate, so that it also ends a function stuck in C code.
    """
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC)


def marked(mark):
    """Each process whose environment has the mark: its id, and a handle that a later process of that id has not."""
    if sys.platform != "linux":
        return
    entry, names = os.fsencode(f"{INSIDE}={mark}"), []
    with contextlib.suppress(OSError):
        names = os.listdir("/proc")
    for name in filter(str.isdigit, names):
        with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
            handle = os.pidfd_open(int(name))  # read the environment later: at worst this is of one that has ended
            undo.callback(os.close, handle)
            with open(f"/proc/{name}/environ", "rb") as environment:
                found = entry in environment.read().split(b"\0")
            if found:
                yield int(name), handle


def kill_marked(mark, spared=()):
    """Kills every process whose environment has the mark, whatever its group and session, but those spared.

    What a process was started with counts: one started without the mark is not found. Linux only.
    """
    for _ in range(MAX_ROUNDS):  # one may have started another just before it was killed
        found = False
        for process, handle in marked(mark):
            if process not in spared:
                found = True
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        if not found:
            return


def await_end(process):
    """Waits until a process has ended, MAX_END seconds at most; its status waits for os.waitpid. Linux only."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(process)
            try:
                poll = select.poll()
                poll.register(handle, select.POLLIN)
                poll.poll(1000 * MAX_END)
            finally:
                os.close(handle)


def evaluate(function, completion, example):
    """Calls the reward function; returns (value, reason, retire), the value None where there is a reason."""
    try:
        result = function(completion, example)
        value, reason = value_of(result)
    # SystemExit and KeyboardInterrupt too: here they come from the function, and cost it its item only.
    except BaseException as error:  # noqa: BLE001
        return None, f"raised {describe(error, function)}", isinstance(error, MemoryError)
    return value, reason, False


def value_of(result):
    """(a finite float or terms of such, ""), or (None, what is wrong with it); guard and worker both ask."""
    return terms_of(result) if isinstance(result, dict) else number_of(result)


def number_of(result):
    """(a finite float, ""), or (None, what is wrong with it)."""
    text = isinstance(result, str | bytes)  # NumPy's are such, and have __float__
    if text or not (hasattr(type(result), "__float__") or hasattr(type(result), "__index__")):
        return None, f"returned {reprlib.repr(result)}, not a number"
    value = float(result)
    return (value, "") if math.isfinite(value) else (None, f"returned {value}, which is not finite")


def terms_of(result):
    """(name -> finite float, ""), or (None, what is wrong with it)."""
    if TOTAL not in result or not all(isinstance(name, str) for name in result):
        return None, f"returned {reprlib.repr(result)}, terms without {TOTAL!r} or with names that are no texts"
    found = {name: number_of(value) for name, value in result.items()}
    wrong = [f"{reason} ({name[:MAX_NAME]})" for name, (_, reason) in found.items() if reason]
    return (None, wrong[0]) if wrong else ({name: value for name, (value, _) in found.items()}, "")


def describe(error, function=None):
    """One short line: type, message and, where it is known, the line of the function's file that raised."""
    text = type(error).__name__[:MAX_NAME]
    # The message comes from the function's own code, and may itself raise or be huge.
    with contextlib.suppress(Exception):
        message = " ".join(str(error)[:MAX_REASON].split())
        text = f"{text}: {message}" if message else text
    code = getattr(function, "__code__", None)
    line, frame = None, error.__traceback__
    while code and frame:
        if frame.tb_frame.f_code.co_filename == code.co_filename:
            line = frame.tb_lineno
        frame = frame.tb_next
    return f"{text} ({os.path.basename(code.co_filename)}:{line})" if code and line else text


def send(channel, index, value=None, reason="", retire=False):
    """Writes one reply."""
    channel.sendall(json.dumps([index, value, reason, retire]).encode() + b"\n")


def can_fork():
    """Whether a fork of this process is whole: a thread that another holds a lock for would wait for ever."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def go_back(folder):
    """Makes the worker's folder the current one, anew where it was removed."""
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)


def keep(control, mark):
    """Forks a process for each pair of descriptors, after killing the one before; returns its channel, in it alone.

    What has the mark goes with the one before, save this process and those that loading the function started.
    """
    child, folder, found, spared = None, os.getcwd(), set(os.listdir()), set()
    on_end = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # what the module does then is for the forks
    while True:
        asked, descriptors, *_ = socket.recv_fds(control, 1, 2)
        ended = None
        if child is None:
            spared = {os.getpid(), *(process for process, _ in marked(mark))}
        else:
            if asked == CLOSED:
                await_end(child)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)[1]
            kill_marked(mark, spared)
        if not asked:
            os._exit(0)
        go_back(folder)
        for name in set(os.listdir()) - found:  # what the one before wrote
            with contextlib.suppress(OSError):
                shutil.rmtree(name) if os.path.isdir(name) and not os.path.islink(name) else os.unlink(name)
        channel, life = descriptors
        child = os.fork()
        if child == 0:
            control.close()
            os.setpgid(0, 0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if on_end is None else on_end)
            die_with(life)
            return private(channel, life)
        with contextlib.suppress(OSError):  # it has done that itself, and gone
            os.setpgid(child, child)
        os.close(channel)
        os.close(life)
        control.sendall(json.dumps([child, ended]).encode() + b"\n")


def private(channel, life):
    """The channel as a socket; neither is inherited by programs that the function starts."""
    os.set_inheritable(channel, False)
    os.set_inheritable(life, False)
    return socket.socket(fileno=channel)


def serve(channel, life):
    """Loads the function that the first line names, then answers one request after the other until the end."""
    die_with(life)
    folder, mark = os.getcwd(), os.environ[INSIDE]  # before the function's module may change them
    set_limit(resource.RLIMIT_CORE, 0)
    requests = channel.makefile("rb")
    setup = json.loads(requests.readline())
    sys.path[:] = setup["path"]
    try:
        function = load(setup["module"], setup["qualname"], setup["file"])
    except BaseException as error:  # noqa: BLE001
        return send(channel, LOADED, reason=describe(error))
    go_back(folder)
    if can_fork():
        send(channel, LOADED, True)
        channel = keep(channel, mark)
        requests = channel.makefile("rb")
    forks = Forks()
    sys.addaudithook(forks)
    if setup["memory_limit"] is not None:
        limit_memory(setup["memory_limit"])
    send(channel, LOADED)
    for line in requests:
        index, completion, example = json.loads(line)
        forks.count = 0
        go_back(folder)
        value, reason, retire = evaluate(function, completion, example)
        if os.getpid() != forks.pid:  # a child that the function forked and let return
            os._exit(0)
        send(channel, index, value, reason, retire or forks.count > MAX_FORKS)


def main():
    """Serves on the descriptors given as arguments, which the function's own children do not inherit."""
    channel, life = int(sys.argv[1]), int(sys.argv[2])
    serve(private(channel, life), life)


if __name__ == "__main__":
    main()
