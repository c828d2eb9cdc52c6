"""A run under random faults beside the same run in peace: it must end in the same bits; what of its time was of use?

    make soak                                          # about an hour on two cores
    python -m tests.faults.soak --steps 2000 --life 20

Each life of the faulty run ends by a fault drawn at random: killed with -9, asked to stop, or killed and then its
newest checkpoint damaged (a flipped bit, a file cut short) or its metrics torn. Prints one JSON line: goodput is the
share of the faulty run's time that the peaceful one needed for the same steps.
"""

import argparse
import collections
import json
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from rlalign.io.checkpoint import Checkpoints
from tests.faults.killing import finish, lines, logged, start

SCRIPT = "tests/faults/small.py"
SAME = ("loss", "reward", "kl", "entropy", "grad_norm", "eval_accuracy")
FAULTS = ("kill", "stop", "flip", "cut", "tear")


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


def live(run: Path, flags: dict, cache: Path, fault: str, seconds: float, *, early: bool) -> subprocess.Popen:
    """One process of the run, until so many seconds after its first step (`early`: after its start), or its own end."""
    before, process = lines(run / "metrics.jsonl"), start(SCRIPT, flags, cache)
    while not early and process.poll() is None and lines(run / "metrics.jsonl") in (0, before):
        time.sleep(0.02)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM if fault == "stop" else signal.SIGKILL)
        process.communicate(timeout=120)
    return process


def soak(folder: Path, *, steps: int, every: int, life: float, seed: int) -> dict:
    """Both runs; raises where the faulty one ends otherwise."""
    cache, draw = folder / "compiled", random.Random(seed)
    flags = {"steps": steps, "every": every}
    begin = time.monotonic()
    want = finish(start(SCRIPT, flags | {"run": folder / "peace"}, cache), seconds=None)
    peace = time.monotonic() - begin
    run, fired = folder / "war", collections.Counter()
    begin = time.monotonic()
    while True:
        fault = draw.choice(FAULTS)
        process = live(run, flags | {"run": run}, cache, fault, draw.uniform(0, 2 * life), early=draw.random() < 0.2)
        ended = process.returncode
        if ended == 0 and lines(run / "metrics.jsonl") > steps:
            break
        if ended != (0 if fault == "stop" else -signal.SIGKILL) and not (fault == "stop" and ended == -signal.SIGTERM):
            raise RuntimeError(f"the run ended with {ended} by itself: run it again in {run}")
        if fault in ("kill", "stop") or ((run / "metrics.jsonl").exists() and damage(run, fault, draw)):
            fired[fault] += 1
    war = time.monotonic() - begin
    same = logged(run, SAME) == logged(folder / "peace", SAME)
    again = finish(start(SCRIPT, flags | {"run": run}, cache), seconds=None)
    return {
        "bitwise": same and again == want,
        "faults": dict(fired),
        "goodput": round(peace / war, 3),
        "steps": steps,
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
