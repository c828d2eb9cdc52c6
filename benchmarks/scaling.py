"""Two tables of what sharing costs and saves: python benchmarks/scaling.py

1. Seconds of one update at 1, 2, 4 and 8 groups: linear in unique tokens.
2. The largest group (a power of two) whose update fits a fixed memory, shared and repeated, from the compiled
   program's own account of its arguments and temporaries; nothing of that size is run.

Prints the tables on stderr and one JSON line.
"""

import dataclasses
import json
import sys

import problem
import tyro
from update import timed

import rlalign as ra


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Settings of the benchmark.

    Args:
      prompt, response, samples: a group of the first table.
      repeats: timed updates; the median counts.
      memory_gib: of the second table, whose groups have prompts of `long_prompt` and responses of `long_response`.
    """

    prompt: int = 512
    response: int = 64
    samples: int = 8
    repeats: int = 3
    memory_gib: float = 4.0
    long_prompt: int = 2048
    long_response: int = 128


def update_gib(shape: problem.Shape, row_length: int) -> float:
    """GiB that one compiled update holds: arguments and temporaries."""
    decoder = ra.Decoder(problem.MODEL)
    optimizer = ra.make_optimizer(ra.OptimizerConfig(learning_rate=1e-4))
    step = ra.make_train_step(decoder, ra.ALGORITHMS["grpo"], optimizer)
    state = ra.init_state(decoder, decoder.init(0), optimizer)
    memory = step.lower(state, problem.batch(shape, row_length=row_length)).compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30


def largest_group(flags: Scaling, *, shared: bool) -> tuple[int, float]:
    """The largest power of two of samples that fits, and its GiB."""
    fitting = (0, 0.0)
    for samples in (2**k for k in range(1, 12)):
        shape = problem.Shape(flags.long_prompt, flags.long_response, samples, 1)
        row = shape.prompt + shape.response * (samples if shared else 1)
        gib = update_gib(shape, row)
        if gib > flags.memory_gib:
            return fitting
        fitting = (samples, round(gib, 2))
    return fitting


def main(flags: Scaling) -> dict:
    """Both tables."""
    rows = []
    for groups in (1, 2, 4, 8):
        shape = problem.Shape(flags.prompt, flags.response, flags.samples, groups)
        row_length = flags.prompt + flags.samples * flags.response
        result = timed(shape, row_length, flags.repeats)
        tokens = groups * row_length
        rows.append({"groups": groups, "unique_tokens": tokens, **result})
        per_token = result["cpu_seconds"] / tokens * 1e6
        print(f"{groups} groups  {tokens} tokens  {result['seconds']} s  {per_token:.0f} CPU us/token", file=sys.stderr)
    fits = {name: largest_group(flags, shared=name == "shared") for name in ("shared", "repeated")}
    print(f"largest group in {flags.memory_gib} GiB: {fits}", file=sys.stderr)
    return {
        "benchmark": "scaling",
        "seconds": rows[-1]["seconds"],
        "cpu_seconds": rows[-1]["cpu_seconds"],
        "peak_gib": round(problem.peak_gib(), 2),
        "updates": rows,
        "memory_gib": flags.memory_gib,
        "largest_group": {name: {"samples": n, "gib": gib} for name, (n, gib) in fits.items()},
        **problem.machine(),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Scaling))))
