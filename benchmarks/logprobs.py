"""Log-probs without logits, beside the matrix product that logits would be: python benchmarks/logprobs.py

On an accelerator N 16,384, W 896, V 151,936 (Qwen2.5 0.5B) in bfloat16; on a CPU less, in float32. RLALIGN_KERNELS or
--backend chooses the form. Prints one JSON line: seconds of forward and of forward with backward, of one product of
[N, W] x [W, V], and their ratios to one product and to four, which is what a backward that makes the logits anew needs.
temporary_gib is what the compiled forward with backward sets aside: chunk x V and the head's float32 gradient.
"""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import problem
import tyro

from rlalign_kernels import target_logprobs
from rlalign_kernels.backend import choose


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Settings of the benchmark.

    Args:
      rows, width, vocab: N, W, V; None picks by platform.
      dtype: of states and head; None picks by platform.
      backend: of target_logprobs.
      repeats: timed calls; the median counts.
    """

    rows: int | None = None
    width: int = 896
    vocab: int | None = None
    dtype: str | None = None
    backend: str | None = None
    repeats: int = 10


def main(flags: Scoring) -> dict:
    """Measure on the first device."""
    cpu = jax.default_backend() == "cpu"
    rows, vocab = flags.rows or (512 if cpu else 16384), flags.vocab or (8192 if cpu else 151936)
    dtype = flags.dtype or ("float32" if cpu else "bfloat16")
    rng = np.random.default_rng(0)
    hidden, head = (
        jnp.asarray(rng.normal(size=s) / flags.width**0.25, dtype) for s in ((rows, flags.width), (flags.width, vocab))
    )
    parent, target = jnp.arange(rows), jnp.asarray(rng.integers(0, vocab, rows))

    def scored(hidden, head):
        return target_logprobs(hidden, head, parent, target, jnp.int32(rows), backend=flags.backend)

    def loss(hidden, head):
        logp, entropy = scored(hidden, head)
        return jnp.sum(logp) + 0.01 * jnp.sum(entropy)

    def timed(function):
        begin = time.perf_counter()
        program = jax.jit(function).lower(hidden, head).compile()
        compiling, memory = time.perf_counter() - begin, program.memory_analysis()
        seconds = problem.measure(lambda: program(hidden, head), repeats=flags.repeats)
        temporary = None if memory is None else round(memory.temp_size_in_bytes / 2**30, 3)
        return {**seconds, "compile_seconds": round(compiling, 1), "temporary_gib": temporary}

    forward, both, product = timed(scored), timed(jax.grad(loss, (0, 1))), timed(jnp.matmul)
    return {
        "benchmark": "logprobs",
        "rows": rows,
        "width": flags.width,
        "vocab": vocab,
        "dtype": dtype,
        "backend": choose(flags.backend),
        "seconds": both["seconds"],
        "cpu_seconds": both["cpu_seconds"],
        "peak_gib": round(problem.peak_gib(), 2),
        "forward": forward,
        "forward_and_backward": both,
        "product": product,
        "forward_over_product": round(forward["seconds"] / product["seconds"], 3),
        "both_over_four_products": round(both["seconds"] / product["seconds"] / 4, 3),
        "tflops_of_product": round(2 * rows * flags.width * vocab / product["seconds"] / 1e12, 2),
        **problem.machine(),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Scoring))))
