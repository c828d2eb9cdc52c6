"""What the contract canary costs a step: python benchmarks/canary.py

Two figures. `share` is its part of the steps of a real `fit`, of a model so small that a step takes some milliseconds:
nothing trains faster. `rows` is what it costs for larger batches, without a run: milliseconds of a step in which it
looks at the arrays, of one in which it does not, and of their mean. Prints one JSON line.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import problem
import tyro

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.canary import LOOK, Canary, looks
from rlalign.io.metrics import read_metrics
from rlalign.types import Rollouts

MODEL = ra.ModelConfig(
    vocab_size=sums.VOCAB_SIZE,
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_width=8,
    mlp_width=64,
    max_positions=16,
    tied_head=True,
    qk_norm=True,
)
SHAPES = ((4, 4, 4), (32, 8, 256), (64, 8, 1024), (64, 16, 4096))  # prompts, samples each, tokens each


@dataclasses.dataclass(frozen=True)
class Cost:
    """Settings of the benchmark.

    Args:
      steps: of the run, and calls of each shape.
    """

    steps: int = 1000


def share_right(completion: str, example: dict) -> float:
    """Which digits are right: a reward that has signal at once."""
    return sum(a == b for a, b in zip(completion.ljust(3), example["answer"], strict=False)) / 3


def in_a_run(steps: int) -> dict[str, Any]:
    """The canary's share of the time of steps, evaluations, saves and the step that compiles left out."""
    with tempfile.TemporaryDirectory(prefix="rlalign-canary-") as folder:
        run = ra.RunConfig(
            folder=folder,
            steps=steps,
            prompts_per_step=4,
            sampling=ra.SampleConfig(4, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,)),
            optimizer=ra.OptimizerConfig(learning_rate=1e-3),
            row_length=64,
            num_rows=4,
            eval_every=steps,
            eval_prompts=8,
            checkpoint_every=steps,
            reward_workers=1,
        )
        decoder, held_out = ra.Decoder(MODEL), sums.problems("held-out")
        how = {
            "prompts": sums.problems("train"),
            "eval_prompts": held_out,
            "reward": share_right,
            "decode": sums.decode,
        }
        ra.fit(run, decoder=decoder, params=decoder.init(0), **how)
        rows = read_metrics(f"{folder}/metrics.jsonl")[1:-1]
    canary, step = (np.array([row[name] for row in rows]) for name in ("seconds_canary", "seconds"))
    return {
        "share": round(float(canary.sum() / step.sum()), 5),
        "step_ms": round(float(np.median(step)) * 1e3, 3),
        "canary_ms": round(float(canary.mean()) * 1e3, 4),
        "alarms": sum(row["alarms"] for row in rows),
    }


def by_itself(prompts: int, samples: int, tokens: int, *, calls: int) -> dict[str, Any]:
    """Milliseconds of a call, for random responses of random lengths."""
    rng, count = np.random.default_rng(0), prompts * samples
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, count)[:, None]
    logp = np.where(mask, rng.normal(-1, 0.5, mask.shape).clip(None, 0), 0).astype(np.float32)
    token = rng.integers(2, 32_000, mask.shape).astype(np.int32)
    stop, owner = np.ones(count, np.int32), np.repeat(np.arange(prompts, dtype=np.int32), samples)
    seen = {"rollouts": Rollouts(token, mask, logp, logp, stop, owner), "learnt": mask.copy()}
    seen["metrics"] = {"groups_without_signal": 0, "skipped": 0, "entropy": 1.0, "tokens_learnt": mask.sum()}
    canary, times = Canary(eos_ids=(0, 1)), ([], [])
    for step in range(calls):
        begin = time.perf_counter()
        found = canary(step=step, prompt_ids=np.arange(prompts) + prompts * (step % 50), **seen)
        times[not looks(step)].append(time.perf_counter() - begin)
        assert not found, found
    look, pass_by = (statistics.median(some) * 1e3 for some in times)
    mean = (look + (LOOK - 1) * pass_by) / LOOK
    shape = {"prompts": prompts, "samples": samples, "tokens": tokens}
    return shape | {"look_ms": round(look, 4), "between_ms": round(pass_by, 4), "mean_ms": round(mean, 4)}


def main(flags: Cost) -> dict:
    """Both figures."""
    begin, cpu = time.perf_counter(), time.process_time()
    found = in_a_run(flags.steps)
    rows = [by_itself(*shape, calls=flags.steps) for shape in SHAPES]
    return {
        "benchmark": "canary",
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_gib": round(problem.peak_gib(), 3),
        **found,
        "look_every": LOOK,
        "rows": rows,
        **problem.machine(),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Cost))))
