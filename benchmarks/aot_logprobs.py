"""Log-probs compiled for devices that are not there: what aot.py does, for forward and backward of target_logprobs.

Prints one row a device and shape of a Markdown table, and one JSON line. The memory is what the compiled program sets
aside beside arguments and results: a chunk's gradients and the head's, in float32.
"""

import argparse
import json
import time

import aot  # first: it sets the environment
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from rlalign_kernels import target_logprobs

SHAPES = (  # N, W, V, dtype: Qwen2.5 0.5B and 7B, Llama 3 8B, Gemma 2 2B, SmolLM2 135M
    (16384, 896, 151936, "bfloat16"),
    (16384, 3584, 152064, "bfloat16"),
    (16384, 4096, 128256, "bfloat16"),
    (16384, 2304, 256000, "bfloat16"),
    (16384, 576, 49152, "float32"),
)
KERNELS = ("statistics", "gradient")


def compiled(device, backend: str, rows: int, width: int, vocab: int, dtype: str) -> dict:
    """GiB beside arguments and results, seconds of compilation and, on TPUs, MiB of VMEM of each kernel."""
    here = SingleDeviceSharding(device)
    shape = lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

    def both(hidden, head, parent, target, live, *grads):
        run = lambda hidden, head: target_logprobs(hidden, head, parent, target, live, backend=backend)
        out, pull = jax.vjp(run, hidden, head)
        return out, pull(grads)

    ids, number = shape(rows, dtype=jnp.int32), shape(rows, dtype=jnp.float32)
    inputs = shape(rows, width), shape(width, vocab), ids, ids, shape(dtype=jnp.int32), number, number
    start = time.perf_counter()
    program = jax.jit(both).lower(*inputs).compile()
    seconds = time.perf_counter() - start
    text = program.as_text() or ""
    missing = [name for name in KERNELS if f"logprobs_{name}" not in text]
    assert not missing, missing
    vmem = aot.vmem_mib(text, r"[^=]*logprobs_(statistics|gradient)[^=]* = .*tpu_custom_call")
    memory = program.memory_analysis()
    temporary = None if memory is None else round(memory.temp_size_in_bytes / 2**30, 2)
    return {"vmem_mib": vmem, "temporary_gib": temporary, "compile_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="+", choices=aot.DEVICES)
    rows = []
    print(
        "| device | N | W | V | dtype | VMEM of forward, backward (MiB) | memory (GiB) |\n|---|---|---|---|---|---|---|"
    )
    for name in parser.parse_args().devices:
        backend, description = aot.DEVICES[name]
        device = topologies.get_topology_desc(**description).devices[0]
        for shape in SHAPES:
            row = compiled(device, backend, *shape)
            vmem = ", ".join(str(row["vmem_mib"].get(kernel, "-")) for kernel in KERNELS)
            print(f"| {name} | {' | '.join(map(str, shape))} | {vmem} | {row['temporary_gib']} |", flush=True)
            rows.append({"device": name, "shape": shape, **row})
    print(json.dumps({"benchmark": "aot_logprobs", "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
