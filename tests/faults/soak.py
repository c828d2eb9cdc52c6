"""A run under random faults beside the same run in peace: it must end in the same bits; what of its time was of use?

    make soak                                          # about an hour on two cores
    python -m tests.faults.soak --steps 2000 --life 20

Each life of the faulty run ends by a fault drawn at random: killed with -9, asked to stop, refused every further byte
by the file system, or killed and then its newest checkpoint damaged (a flipped bit, a file cut short) or its metrics
torn. Prints one JSON line: goodput is the share of the faulty run's time that the peaceful one needed for the same
steps, and steps_again how many were done more than once; alarms (of the canary) and compiled_later (programs after
the first step) are those of the run in peace.
"""

import argparse
import collections
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlalign.io.checkpoint import Checkpoints
from tests.faults.killing import finish, lines, logged, start

SCRIPT = "tests/faults/small.py"
SAME = ("loss", "reward", "kl", "entropy", "grad_norm", "eval_accuracy")
NO_ROOM = ("File too large", "No usable temporary directory")
FAULTS = ("kill", "stop", "full", "flip", "cut", "tear")


def damage(run: Path, fault: str, draw: random.Random) -> bool:
    """Spoils what lies on the disk; False where nothing was there, or nothing else would be left."""
    if fault == "tear":
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 1')
        return True
    with Checkpoints(run / "checkpoints") as checkpoints:
        intact = [step for step in checkpoints.steps() if checkpoints.problem(step) is None]
    if len(intact) < 2:
        return False
    files = [path for path in sorted((run / "checkpoints" / str(intact[-1])).rglob("*")) if path.stat().st_size]
    path = draw.choice([path for path in files if path.is_file()])
    content = bytearray(path.read_bytes())
    if fault == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content if fault == "flip" else content[: len(content) // 2])
    return True


def live(run: Path, flags: dict, cache: Path, fault: str, seconds: float, *, early: bool) -> int | None:
    """One process of the run, until so many seconds after its first step (`early`: after its start), or its own end.

    Returns its exit code where it ended by itself, None where it ended as it must under the fault.
    """
    before, process = lines(run / "metrics.jsonl"), start(SCRIPT, flags, cache)
    while not early and process.poll() is None and lines(run / "metrics.jsonl") in (0, before):
        time.sleep(0.02)
    try:
        process.communicate(timeout=seconds)
        return process.returncode
    except subprocess.TimeoutExpired:
        if fault == "full":
            hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
        else:
            process.send_signal(signal.SIGTERM if fault == "stop" else signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    # Asked to stop before it listens, a process is just gone; without room it says so, or its workers do as they start.
    due = {"stop": (0, -signal.SIGTERM), "full": (1,)}.get(fault, (-signal.SIGKILL,))
    if process.returncode not in due or (fault == "full" and not any(text in said for text in NO_ROOM)):
        raise RuntimeError(f"under the fault {fault} the run ended with {process.returncode}: {said[-3000:]}")
    return None


def newest(run: Path) -> int:
    """The step that the next process will go on from."""
    if not (run / "checkpoints").exists():
        return 0
    with Checkpoints(run / "checkpoints") as checkpoints:
        return max((step for step in checkpoints.steps() if checkpoints.problem(step) is None), default=0)


def soak(folder: Path, *, steps: int, every: int, life: float, seed: int) -> dict:
    """Both runs; raises where the faulty one ends otherwise."""
    cache, draw = folder / "compiled", random.Random(seed)
    flags = {"steps": steps, "every": every}
    begin = time.monotonic()
    want = finish(start(SCRIPT, flags | {"run": folder / "peace"}, cache), seconds=None)
    peace = time.monotonic() - begin
    run, fired, again = folder / "war", collections.Counter(), 0
    begin = time.monotonic()
    while True:
        fault = draw.choice(FAULTS)
        ended = live(run, flags | {"run": run}, cache, fault, draw.uniform(0, 2 * life), early=draw.random() < 0.2)
        if ended is not None:
            break
        reached = lines(run / "metrics.jsonl") - 1
        if fault in ("kill", "stop", "full") or ((run / "metrics.jsonl").exists() and damage(run, fault, draw)):
            fired[fault] += 1
        again += max(reached - newest(run), 0)
        print(f"{time.monotonic() - begin:7.0f} s  step {reached}  {dict(fired)}", file=sys.stderr, flush=True)
    war = time.monotonic() - begin
    if ended != 0:
        raise RuntimeError(f"the run ended with {ended} by itself: run it again in {run}")
    same = logged(run, SAME) == logged(folder / "peace", SAME)
    calm = logged(folder / "peace", ("alarms", "compiles"))[:-1]
    end = finish(start(SCRIPT, flags | {"run": run}, cache), seconds=None)
    return {
        "bitwise": same and end == want,
        "faults": dict(fired),
        "goodput": round(peace / war, 3),
        "steps": steps,
        "steps_again": again,
        "alarms": sum(row["alarms"] for row in calm),
        "compiled_later": sum(row["compiles"] for row in calm[1:]),
        "seconds": round(war, 1),
        "seconds_in_peace": round(peace, 1),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60_000, help="of the run; a step takes some 10 ms")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--life", type=float, default=60.0, help="mean seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlalign-soak-") as folder:
        found = soak(Path(folder), **vars(flags))
    print(json.dumps(found))
    if not found["bitwise"]:
        raise SystemExit("the run under faults did not end in the bits of the run in peace")


if __name__ == "__main__":
    main()
