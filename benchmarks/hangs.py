"""What rewards that hang cost: python benchmarks/hangs.py

A batch in which some rewards never end, scored by one worker and by two (as in `fit`), whose module is this script,
which imports JAX: loading it takes seconds. `over_limit[workers][hangs]`: seconds beyond `time_limit` times the hangs
that one worker has to sit through, the median of `repeats`. Prints one JSON line.
"""

import dataclasses
import json
import math
import statistics
import time
from typing import Any

import problem
import tyro

from rlalign.rewards import RewardGuard


@dataclasses.dataclass(frozen=True)
class Hangs:
    """Settings of the benchmark.

    Args:
      limit: seconds that a reward may take.
      items: of a batch.
      repeats: batches, whose median counts.
    """

    limit: float = 2.0
    items: int = 64
    repeats: int = 3


def reward(completion: str, example: dict) -> float:
    """Without end where it is asked for."""
    while completion == "hang":
        pass
    return float(len(completion)) + example["more"]


def over_limit(workers: int, hangs: int, flags: Hangs) -> float:
    """Seconds beyond the limits until a batch with so many hangs is scored, all others kept."""
    examples = [{"more": 1.0}] * flags.items
    texts = ["hang" if i % (flags.items // hangs) == 1 else "fine" for i in range(flags.items)]
    found = []
    with RewardGuard(reward, workers=workers, time_limit=flags.limit) as guard:
        guard(["fine"] * flags.items, examples)  # the workers are there
        for _ in range(flags.repeats):
            begin = time.perf_counter()
            rewards = guard(texts, examples)
            found.append(time.perf_counter() - begin - flags.limit * math.ceil(hangs / workers))
            assert rewards.valid.sum() == flags.items - hangs, rewards
    return round(statistics.median(found), 3)


def main(flags: Hangs) -> dict[str, Any]:
    """All figures."""
    begin, cpu = time.perf_counter(), problem.cpu_seconds()
    over = {workers: {hangs: over_limit(workers, hangs, flags) for hangs in (1, 4)} for workers in (1, 2)}
    return {
        "benchmark": "hangs",
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(problem.cpu_seconds() - cpu, 1),
        "peak_gib": round(problem.peak_gib(), 2),
        **dataclasses.asdict(flags),
        "over_limit": over,
        **problem.machine(),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Hangs))))
