"""One update, with prefixes shared and repeated: python benchmarks/update.py [--prompt P --response R --samples G]

    python benchmarks/update.py --algorithm gsil_bernoulli --prompt 512 --response 128 --samples 2      # pairs

Without flags it runs the fixed problem of problem.py; --model qwen2_0_5b and qwen2_1_5b are for accelerators, where
RLALIGN_KERNELS=triton or tpu chooses the kernels. The repeated form is the same code on rows that hold one sample
each. Prints one JSON line: seconds, cpu_seconds, peak_gib (of the shared form), gain (repeated / shared, wall),
cpu_gain, predicted_gain (all FLOPs of the repeated batch over all FLOPs of the forest), and the bounds rho and alpha.
"""

import dataclasses
import json
import time
from typing import Literal

import problem
import tyro

import rlalign as ra


@dataclasses.dataclass(frozen=True)
class Update:
    """Settings of the benchmark.

    Args:
      prompt, response, samples, prompts: the batch.
      algorithm: whose update; one that learns from pairs takes samples=2.
      model: one of problem.MODELS.
      microbatches: the gradient is accumulated over this many parts of the rows.
      repeats: timed updates; the median counts.
      repeated: also time the batch without sharing.
    """

    prompt: int = 512
    response: int = 64
    samples: int = 8
    prompts: int = 4
    algorithm: str = "grpo"
    model: Literal["fixed", "qwen2_0_5b", "qwen2_1_5b"] = "fixed"
    microbatches: int = 1
    repeats: int = 5
    repeated: bool = True


def timed(
    shape: problem.Shape,
    row_length: int,
    repeats: int,
    config: ra.ModelConfig = problem.MODEL,
    microbatches: int = 1,
    algorithm: str = "grpo",
) -> dict:
    """Seconds of one update of the batch in rows of row_length."""
    decoder = ra.Decoder(config)
    optimizer = ra.make_optimizer(ra.OptimizerConfig(learning_rate=1e-4, max_grad_norm=None))
    step = ra.make_train_step(decoder, ra.ALGORITHMS[algorithm], optimizer, microbatches=microbatches)
    batch = problem.batch(shape, row_length=row_length, vocab=config.vocab_size, parts=microbatches)
    state = ra.init_state(decoder, decoder.init(0), optimizer, copy=False)

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"], state.params

    begin = time.perf_counter()
    run()
    first = time.perf_counter() - begin
    return {**problem.measure(run, repeats=repeats), "first_call_seconds": round(first, 2)}


def main(flags: Update) -> dict:
    """Measure, and compare with what the shapes predict."""
    shape = problem.Shape(flags.prompt, flags.response, flags.samples, flags.prompts)
    config = problem.MODELS[flags.model]
    flops = problem.update_flops(config, shape, shared=True)
    how = (flags.repeats, config, flags.microbatches, flags.algorithm)
    result = timed(shape, flags.prompt + flags.samples * flags.response, *how)
    result |= {"peak_gib": round(problem.peak_gib(), 2), "gflops_per_second": round(flops / result["seconds"] / 1e9, 1)}
    if flags.repeated:
        repeated = timed(shape, flags.prompt + flags.response, *how)
        result |= {
            "repeated": repeated,
            "gain": round(repeated["seconds"] / result["seconds"], 3),
            "cpu_gain": round(repeated["cpu_seconds"] / result["cpu_seconds"], 3),
        }
    predicted = problem.update_flops(config, shape, shared=False) / flops
    return {
        "benchmark": "update",
        "model": flags.model,
        "algorithm": flags.algorithm,
        **shape._asdict(),
        **result,
        "predicted_gain": round(predicted, 3),
        "rho": round(problem.token_ratio(shape), 3),
        "alpha": round(problem.attention_ratio(shape), 3),
        **problem.machine(),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Update))))
