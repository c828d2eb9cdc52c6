"""target_logprobs beside the matrix products that it cannot do without, on the accelerator at hand: make bench-kernels

    PYTHONPATH=kernels python3 benchmarks/logprobs.py                         where jax is installed already
    PYTHONPATH=kernels python3 benchmarks/logprobs.py --preset smoke          the whole script on a CPU, a small shape

The forward multiplies states and head once; with the gradients it is four such products, one of them the recomputation.
`products` is the time over that of one or of four plain products of states and head. `temporary_gib` is what the
compiled program holds beside its arguments and results. Every form is first compared with log_softmax of whole logits
in float32 on a small shape. Prints a Markdown table and one JSON line.
"""

import argparse
import functools
import json
import sys
from typing import NamedTuple

import forms_jax
import jax
import jax.numpy as jnp
import numpy as np
from timing import median_ms, peak_tflops

from rlalign_kernels import target_logprobs

PRODUCTS = {"forward": 1, "both": 4}
TOLERANCE = 2e-2  # of the norm of a bfloat16 result


class Shape(NamedTuple):
    """Rows that are scored, width of a state, tokens of the vocabulary."""

    rows: int
    width: int
    vocab: int


# A Qwen2.5 of 7B: 16 thousand tokens, 152 thousand words.
PRESETS = {"full": Shape(16384, 3584, 152064), "smoke": Shape(48, 64, 300)}
CHECKED = Shape(48, 64, 300)


def arrays(shape: Shape) -> list[jax.Array]:
    """States, head, parents, targets and a cotangent of the log-probs and entropies."""
    n, width, vocab = shape
    keys = jax.random.split(jax.random.key(0), 4)
    head = jax.random.normal(keys[1], (width, vocab), jnp.bfloat16) * width**-0.5
    target = jax.random.randint(keys[2], (n,), 0, vocab)
    grads = jax.random.normal(keys[3], (2, n), jnp.float32)
    return [jax.random.normal(keys[0], (n, width), jnp.bfloat16), head, jnp.arange(n), target, grads]


def programs(backend: str):
    """pass -> function of arrays()."""
    score = functools.partial(target_logprobs, backend=backend)

    def forward(hidden, head, parent, target, grads):
        del grads
        return score(hidden, head, parent, target, parent.size)

    def both(hidden, head, parent, target, grads):
        out, pull = jax.vjp(lambda hidden, head: score(hidden, head, parent, target, parent.size), hidden, head)
        return out, pull((grads[0], grads[1]))

    return {"forward": forward, "both": both}


def error(backend: str) -> float:
    """The largest ||x - plain|| / ||plain|| of output and gradients on a small shape."""
    given = arrays(CHECKED)

    def plain(hidden, head):
        logp = jax.nn.log_softmax(hidden.astype(jnp.float32) @ head.astype(jnp.float32))
        return logp[given[2], given[3]], -jnp.sum(jnp.exp(logp) * logp, axis=1)

    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(plain, *given[:2])
        expected = jax.tree.leaves((out, pull((given[4][0], given[4][1]))))
    got = jax.tree.leaves(jax.jit(programs(backend)["both"])(*given))
    pairs = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(got, expected, strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def timed(function, given, flags) -> tuple[float, float]:
    """(milliseconds, GiB that the program holds for itself)."""
    program = jax.jit(function).lower(*given).compile()
    memory = program.memory_analysis()
    run = functools.partial(program, *given)
    ms = median_ms(run, jax.block_until_ready, repeats=flags.repeats, least_ms=flags.least_ms)
    return ms, getattr(memory, "temp_size_in_bytes", 0) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--form", action="append", help="measure this one only; may be given again")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--least-ms", type=float, default=30.0)
    flags = parser.parse_args()
    shape, kind = PRESETS[flags.preset], jax.devices()[0].device_kind
    given, peak = arrays(shape), peak_tflops(kind)
    one, _ = timed(jnp.matmul, given[:2], flags)
    errors, absent, rows = {}, {}, []
    for backend in flags.form or forms_jax.OURS[jax.default_backend()]:
        try:
            errors[backend] = round(error(backend), 5)
            for name, function in programs(backend).items():
                ms, gib = timed(function, given, flags)
                tflops = PRODUCTS[name] * 2 * np.prod(shape, dtype=float) / ms / 1e9
                share = None if peak is None else round(tflops / peak, 4)
                row = {"form": backend, "pass": name, "ms": round(ms, 3), "tflops": round(tflops, 1), "share": share}
                rows.append(row | {"products": round(ms / one / PRODUCTS[name], 3), "temporary_gib": round(gib, 3)})
        except Exception as reason:  # noqa: BLE001 - a form that fails must not take the others' numbers with it
            absent[backend] = f"{type(reason).__name__}: {str(reason).strip()[:200]}"
    print("| form | pass | ms | TFLOP/s | share | over products | temporary GiB |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join('-' if x is None else str(x) for x in row.values())} |")
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")
    result = {
        "benchmark": "logprobs",
        "device": kind,
        "jax": jax.__version__,
        "shape": shape,
        "product_ms": round(one, 3),
    }
    print(json.dumps(result | {"errors": errors, "absent": absent, "rows": rows}))
    wrong = {name: x for name, x in errors.items() if not x <= TOLERANCE}
    if absent or wrong:
        sys.exit(f"forms that did not run: {sorted(absent)}; wrong by more than {TOLERANCE}: {wrong}")


if __name__ == "__main__":
    main()
