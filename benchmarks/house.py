"""Steps a second of the embedded House in one process, resets included: python benchmarks/house.py

A policy that chooses among what is admissible plays each task in `--copies`, as GiGPO does. Of the levels, the slowest
one's steps a second are reported. `grouped` is the share of steps whose anchor another step of the same task has too,
and `prompt_words` the 95 % quantile of the words of a task, its last two observations and actions, the observation
and what is admissible. Prints one JSON line.
"""

import argparse
import collections
import json
import random
import resource
import statistics
import time
from collections.abc import Iterator

from rlalign.envs.house import LEVELS, House
from rlalign.envs.protocol import Observation
from rlalign.envs.words import words

Step = tuple[Observation, str, float]  # what was seen, what was done, its reward


def play(room: House, seed: int, draw: random.Random) -> Iterator[Step]:
    """One episode of choices among what is admissible."""
    seen, ended = room.reset(seed), False
    while not ended:
        action = seen.admissible[int(draw.random() * len(seen.admissible))]
        after, reward, terminated, truncated, _ = room.step(action)
        yield seen, action, reward
        seen, ended = after, terminated or truncated


def prompt_words(episode: list[Step]) -> list[int]:
    """Words of the prompt of each step."""
    count = lambda *texts: sum(len(words(text)) for text in texts)
    turns = [count(seen.text, action) for seen, action, _ in episode]
    now = [count(seen.task, seen.text, ", ".join(seen.admissible)) for seen, _, _ in episode]
    return [sum(turns[max(0, i - 2) : i]) + words_now for i, words_now in enumerate(now)]


def measure(level: int, *, tasks: int, copies: int) -> dict:
    """A level's row: what it costs, and what the anchors and texts are like."""
    rooms, draw = [House(**LEVELS[level]) for _ in range(copies)], random.Random(0)
    wall, cpu = time.perf_counter(), time.process_time()
    steps = sum(1 for seed in range(tasks) for room in rooms for _ in play(room, seed, draw))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    draw = random.Random(0)  # the same once more, kept
    groups = [[list(play(room, seed, draw)) for room in rooms] for seed in range(tasks)]
    episodes = [episode for group in groups for episode in group]
    anchors = [collections.Counter(seen.anchor for episode in group for seen, _, _ in episode) for group in groups]
    lengths = [length for episode in episodes for length in prompt_words(episode)]
    return {
        "level": level,
        "steps": steps,
        "seconds": round(wall, 4),
        "cpu_seconds": round(cpu, 4),
        "steps_per_second": round(steps / wall),
        "steps_per_cpu_second": round(steps / cpu),
        "won": round(statistics.mean(episode[-1][2] > 0 for episode in episodes), 4),
        "grouped": round(sum(n for counts in anchors for n in counts.values() if n > 1) / steps, 3),
        "prompt_words": round(statistics.quantiles(lengths, n=20)[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=150, help="of each level")
    parser.add_argument("--copies", type=int, default=8, help="of each task")
    flags = parser.parse_args()
    rows = [measure(level, tasks=flags.tasks, copies=flags.copies) for level in LEVELS]
    print(
        json.dumps(
            {
                "benchmark": "house",
                "seconds": round(sum(row["seconds"] for row in rows), 4),
                "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 4),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
                "steps_per_second": min(row["steps_per_second"] for row in rows),
                "steps_per_cpu_second": min(row["steps_per_cpu_second"] for row in rows),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
