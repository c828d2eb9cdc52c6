"""One generation for groups behind shared prompts, and the same with every prompt prefilled for each sample.

    python benchmarks/rollout.py [--prompt P --response R --samples G]

Without flags it runs the fixed problem of problem.py: 64 tokens for 32 samples of 4 prompts, temperature 1, no early
end. The repeated form samples each response as a group of its own. Prints one JSON line; the predicted gain counts
FLOPs from shapes, and rho and alpha are the bounds of the prefill: G, and G again, as decoding works token by token.
"""

import dataclasses
import json
import time

import problem
import tyro

import rlalign as ra


@dataclasses.dataclass(frozen=True)
class Generation:
    """Settings of the benchmark.

    Args:
      prompt, response, samples, prompts: what is generated.
      repeats: timed generations; the median counts.
      repeated: also time one group a sample.
    """

    prompt: int = 512
    response: int = 64
    samples: int = 8
    prompts: int = 4
    repeats: int = 5
    repeated: bool = True


def timed(shape: problem.Shape, *, copies: int, repeats: int) -> dict:
    """Seconds of one generation with each prompt given `copies` times and samples / copies responses each."""
    decoder = ra.Decoder(problem.MODEL)
    params = decoder.init(0)
    prompts, _ = problem.sequences(shape)
    prompts = [p for p in prompts for _ in range(copies)]
    config = ra.SampleConfig(shape.samples // copies, shape.response, eos_ids=())
    begin = time.perf_counter()
    calls = 0

    def run():
        nonlocal calls
        calls += 1
        return ra.sample(decoder, params, prompts, seed=0, step=calls, config=config).tokens

    run()
    first = time.perf_counter() - begin
    return {**problem.measure(run, repeats=repeats), "first_call_seconds": round(first, 2)}


def rollout_flops(config: ra.ModelConfig, shape: problem.Shape, *, shared: bool) -> float:
    """Forward operations: dense layers 2 a weight and token, attention 4 H D a visible pair and layer, head a token."""
    c, (P, R, G, B) = config, shape
    layer = c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.mlp_width
    prefills = B * (1 if shared else G)
    tokens = prefills * P + B * G * (R - 1)
    pairs = prefills * P * (P + 1) / 2 + B * G * (R - 1) * (P + R / 2)
    attention = c.layers * pairs * 4 * c.heads * c.head_width
    return 2 * tokens * c.layers * layer + attention + B * G * R * 2 * c.width * c.vocab_size


def main(flags: Generation) -> dict:
    """Measure, and compare with what the shapes predict."""
    shape = problem.Shape(flags.prompt, flags.response, flags.samples, flags.prompts)
    result = timed(shape, copies=1, repeats=flags.repeats)
    result["peak_gib"] = round(problem.peak_gib(), 2)
    if flags.repeated:
        repeated = timed(shape, copies=shape.samples, repeats=flags.repeats)
        result |= {
            "repeated": repeated,
            "gain": round(repeated["seconds"] / result["seconds"], 3),
            "cpu_gain": round(repeated["cpu_seconds"] / result["cpu_seconds"], 3),
        }
    flops = [rollout_flops(problem.MODEL, shape, shared=shared) for shared in (False, True)]
    return {
        "benchmark": "rollout",
        **shape._asdict(),
        **result,
        "predicted_gain": round(flops[0] / flops[1], 3),
        "rho": shape.samples,
        "alpha": shape.samples,
        **problem.machine(),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Generation))))
