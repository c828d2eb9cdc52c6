"""Reward functions that behave and misbehave. Standard library only: workers load this file by its path."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

calls = 0


def length(completion, example):
    return len(completion)


def number(completion, example):
    return example.get("scale", 1.0) * float(completion)


def echo(completion, example):
    """Returns the example's value as it is, after checking the completion."""
    assert completion == example.get("completion", completion)
    return example["value"]


def python(completion, example):
    """Runs the completion as code that sets `value`."""
    space = {"os": os, "sys": sys, "time": time, "signal": signal, "threading": threading}
    exec(completion, space)
    return space["value"]


def surroundings(completion, example):
    """1 if the worker sees nothing of the trainer's environment, place and streams."""
    Path("note.txt").write_text("left behind")
    Path(completion).write_text(f"{os.getcwd()}\n{os.getpid()}\n")
    home = os.environ["HOME"] == os.environ["TMPDIR"] == os.getcwd() != example["cwd"]
    secret = any(name.startswith("SECRET") for name in os.environ)
    streams = sys.stdin.read() == "" and os.path.samestat(os.fstat(1), os.stat(os.devnull))
    main_thread = threading.current_thread() is threading.main_thread()
    apart = os.getpgrp() == os.getpid() != example["pid"] and os.getsid(0) != example["session"]
    return home and not secret and streams and main_thread and apart


def pid(completion, example):
    return os.getpid()


def count(completion, example):
    global calls
    calls += 1
    return calls


def hoard(completion, example, kept=[]):  # noqa: B006
    """Leaks 20 MB a call, and returns the number of leaks so far."""
    kept.append(bytearray(20 << 20))
    return len(kept)


def modules(completion, example):
    """How many modules a worker has loaded that it has no need of."""
    return sum(name.split(".")[0] in ("rlalign", "jax", "numpy", "pickle") for name in sys.modules)


def grandchild(completion, example):
    """Leaves a process behind, hangs, and tells its id in a file."""
    child = subprocess.Popen(["sleep", "60"])
    Path(completion).write_text(str(child.pid))
    time.sleep(60)


def swallow(completion, example):
    while True:
        try:
            while True:
                time.sleep(0.001)
        except BaseException:  # noqa: BLE001
            pass


def stray(completion, example):
    """Writes the completion, as a line, to every socket it can find."""
    if completion == "fine":
        return 1.0
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, completion.encode() + b"\n")
        except OSError:
            continue
    time.sleep(60)


class Grader:
    @staticmethod
    def static(completion, example):
        return 2.0

    def method(self, completion, example):
        return 3.0

    def __call__(self, completion, example):
        return 4.0


nameless = lambda completion, example: 1.0


def make():
    def inner(completion, example):
        return 1.0

    return inner
