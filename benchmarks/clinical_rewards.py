"""Rewards a second of CRPO's rules on one core: python benchmarks/clinical_rewards.py

Completions of `--characters` characters, half of them well-formed, to questions of 800 characters; 5 answers each.
`per_second` is the slower mode's, `adversarial_seconds` the slowest of some texts of a megabyte. Prints one JSON
line.
"""

import argparse
import json
import random
import resource
import time

from rlalign.rewards.clinical import crpo_reward

SAID = (
    "fever rash cough with stiff neck purpura this patient from pulse 120 temperature 39.5 platelets 90 and the "
    "meningitis suggests likely because option diagnosis blood pressure severe acute chronic therapy is a of to in"
)
WORDS = SAID.split()
HARD = {
    "open boxes": "\\boxed{" * 150_000,
    "tags": "<dx>" * 250_000,
    "nearly a copy": "<dx>System 1 System 2 fever neck "
    + "ab " * 250_000
    + "</dx><conclusion>fever neck "
    + "ab " * 125_000
    + "b</conclusion>",
}


def text(draw: random.Random, characters: int) -> str:
    """So many characters of clinical words."""
    words: list[str] = []
    while sum(map(len, words)) + len(words) < characters:
        words += draw.choices(WORDS, k=16)
    return " ".join(words)[:characters]


def completion(draw: random.Random, characters: int) -> str:
    """Well-formed every other time."""
    dx, told = text(draw, characters * 2 // 3), text(draw, characters // 4)
    if draw.random() < 0.5:
        return f"<dx>System 1: {dx[: len(dx) // 2]} System 2: {dx}"[:characters]
    half = len(dx) // 2
    return f"<dx>System 1: {dx[:half]} System 2: {dx[half:]}</dx><conclusion>{told}</conclusion> \\boxed{{B}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--characters", type=int, default=1500)
    flags = parser.parse_args()
    draw = random.Random(0)
    questions = [text(draw, 800) for _ in range(flags.count // 5)]
    texts = [completion(draw, flags.characters) for _ in range(flags.count)]
    wall, cpu = time.perf_counter(), time.process_time()
    rates = {}
    for mode in ("paper", "paper_code"):
        begin = time.process_time()
        for number, one in enumerate(texts):
            crpo_reward(one, "B", questions[number // 5 % len(questions)], mode=mode)
        rates[mode] = round(flags.count / (time.process_time() - begin))
    hard = {}
    for name, one in HARD.items():
        begin = time.process_time()
        crpo_reward(one, "B", "fever neck")
        hard[name] = round(time.process_time() - begin, 3)
    print(
        json.dumps(
            {
                "benchmark": "clinical_rewards",
                "seconds": round(time.perf_counter() - wall, 3),
                "cpu_seconds": round(time.process_time() - cpu, 3),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
                "characters": flags.characters,
                "per_second": min(rates.values()),
                "by_mode": rates,
                "adversarial_seconds": max(hard.values()),
            }
        )
    )


if __name__ == "__main__":
    main()
