"""What saving costs a run: python benchmarks/saving.py

A real `fit` of a decoder whose vocabulary makes the state as large as asked for (parameters and two moments of AdamW,
float32), with few tokens a step. Counted are whole rounds between saves: the shares of wall time for which the run
stands still (`stall_share`) and by which steps behind a save take longer than the others (`slowed_share`: the thread
that writes needs a core), and what the same saves would take in front of the steps (`front_share`). Prints one JSON
line.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import problem
import tyro

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.checkpoint import Checkpoints
from rlalign.io.metrics import read_metrics
from rlalign.types import TrainState


@dataclasses.dataclass(frozen=True)
class Saving:
    """Settings of the benchmark.

    Args:
      state_mb: megabytes of state.
      every: steps between saves.
      rounds: of so many steps, that are counted; half a round before and after is not.
      behind: steps after a save in which its thread may still be writing.
      width: of the decoder.
      repeats: saves in front, whose median counts.
    """

    state_mb: int = 500
    every: int = 100
    rounds: int = 2
    behind: int = 10
    width: int = 256
    repeats: int = 3


def share_right(completion: str, example: dict) -> float:
    """Which digits are right: a reward that has signal at once."""
    return sum(a == b for a, b in zip(completion.ljust(3), example["answer"], strict=False)) / 3


def train(flags: Saving, folder: str) -> tuple[TrainState, list[dict[str, Any]]]:
    """The run, and the metrics of the steps that are counted."""
    vocabulary = max(round(flags.state_mb * 1e6 / 12 / flags.width), sums.VOCAB_SIZE)
    decoder = ra.Decoder(dataclasses.replace(problem.MODEL, vocab_size=vocabulary, width=flags.width, layers=1))
    steps = (flags.rounds + 1) * flags.every
    run = ra.RunConfig(
        folder=folder,
        steps=steps,
        prompts_per_step=4,
        sampling=ra.SampleConfig(4, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,)),
        optimizer=ra.OptimizerConfig(learning_rate=1e-4),
        row_length=64,
        num_rows=4,
        eval_every=steps,
        eval_prompts=8,
        checkpoint_every=flags.every,
        keep_params=False,
        reward_workers=1,
    )
    data = {"prompts": sums.problems("train"), "eval_prompts": sums.problems("held-out")}
    how = {"reward": share_right, "decode": lambda ids: sums.decode([i for i in ids if i < sums.VOCAB_SIZE])}
    result = ra.fit(run, decoder=decoder, params=decoder.init(0), **data, **how)
    half = flags.every // 2
    return result.state, read_metrics(Path(folder) / "metrics.jsonl")[half : steps - half]


def in_front(state: TrainState, folder: str, repeats: int) -> tuple[float, float]:
    """Median seconds of a save that is waited for, and of the copy that one behind the steps begins with."""
    saves, copies = [], []
    with Checkpoints(Path(folder) / "front", keep=1) as checkpoints:
        for step in range(repeats):
            begin = time.perf_counter()
            checkpoints.save(step, state, {})
            saves.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            jax.tree.map(np.array, state)
            copies.append(time.perf_counter() - begin)
    return statistics.median(saves), statistics.median(copies)


def main(flags: Saving) -> dict[str, Any]:
    """All figures."""
    begin, cpu = time.perf_counter(), problem.cpu_seconds()
    with tempfile.TemporaryDirectory(prefix="rlalign-saving-") as folder:
        state, rows = train(flags, folder)
        save, copy = in_front(state, folder, flags.repeats)
    wall = sum(row["seconds"] for row in rows)
    stalls = [row.get("seconds_save", 0.0) for row in rows]
    saved = [i for i, stall in enumerate(stalls) if stall]
    near = {i + k for i in saved for k in range(flags.behind)}
    work = [row["seconds"] - stall for row, stall in zip(rows, stalls, strict=True)]
    usual = statistics.median(seconds for i, seconds in enumerate(work) if i not in near)
    slowed = sum(work[i] - usual for i in near if i < len(work))
    return {
        "benchmark": "saving",
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(problem.cpu_seconds() - cpu, 1),
        "peak_gib": round(problem.peak_gib(), 2),
        **dataclasses.asdict(flags),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "saves": len(saved),
        "step_seconds": round(usual, 4),
        "stall_seconds": round(statistics.median(stalls[i] for i in saved), 4),
        "stall_share": round(sum(stalls) / wall, 5),
        "slowed_share": round(slowed / wall, 5),
        "front_seconds": round(save, 3),
        "front_share": round(save / (save + flags.every * usual), 5),
        "copy_seconds": round(copy, 4),
        **problem.machine(),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Saving))))
