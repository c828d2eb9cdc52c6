"""Starts a script in a process of its own, waits for something it does, kills it, and reads what it said."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).parents[2]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
# What one process compiled the next one loads, and LLVM leaves it as it is: starting is most of the time here.
QUICK = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]


def start(script: str, flags: Mapping[str, object], cache: pathlib.Path) -> subprocess.Popen:
    """A script of the repository with these flags."""
    command = [sys.executable, str(ROOT / script)]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, **cached, "XLA_FLAGS": " ".join(QUICK), "JAX_PLATFORMS": "cpu", "PYTHONPATH": PATH}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, *, seconds: float | None = 300) -> dict:
    """The result of a process that ends well."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def ends_with(process: subprocess.Popen, code: int) -> None:
    """Waits for a process that ends by itself."""
    err = process.communicate(timeout=300)[1]
    assert process.returncode == code, err[-3000:]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    """Returns as soon as it did, while the process runs."""
    while not happened():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    """With -9, while it runs."""
    process.kill()
    process.communicate()
    assert process.returncode == -9, "the run ended before it was killed"


def kill_somewhere(process: subprocess.Popen, run: pathlib.Path, draw: random.Random, *, seconds: float = 6.0) -> bool:
    """With -9 at a random moment: of starting and restoring, or a few steps later. False where the run ended before."""
    if draw.random() < 0.5:
        before, more = lines(run / "metrics.jsonl"), draw.randint(1, 3)
        moved = lambda: lines(run / "metrics.jsonl") not in range(before + more) or process.poll() is not None
        deadline = time.monotonic() + 10 * seconds
        while not moved() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
    else:
        time.sleep(draw.random() * seconds)
    process.kill()
    process.communicate()
    return process.returncode == -9


def lines(path: pathlib.Path) -> int:
    """How many whole lines a file has, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def logged(run: pathlib.Path, names: tuple[str, ...]) -> list[dict]:
    """These metrics of every step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row.get(key) for key in ("step", *names)} for row in rows]
