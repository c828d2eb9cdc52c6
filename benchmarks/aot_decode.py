"""Decode attention compiled for devices that are not there: what aot.py does, for decode_attention.

Prints one row a device and shape of a Markdown table, and one JSON line. The copies of a cache that a program makes are
counted too: the kernels read their layer where it lies.
"""

import argparse
import functools
import json
import time

import aot  # first: it sets the environment
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from rlalign_kernels import decode_attention

SHAPES = (  # B, G, H, K, D, P, R, dtype: the heads of aot.py, lengths that are no whole tiles, many samples
    (8, 8, 14, 2, 64, 2048, 1024, "bfloat16"),
    (8, 8, 28, 4, 128, 2048, 1024, "bfloat16"),
    (8, 16, 32, 8, 128, 8192, 1000, "bfloat16"),
    (4, 8, 8, 4, 256, 2048, 512, "bfloat16"),
    (4, 8, 8, 4, 256, 2048, 512, "float32"),
    (4, 8, 16, 16, 96, 2047, 77, "bfloat16"),
    (2, 64, 32, 4, 128, 1000, 5, "bfloat16"),
)
LAYERS = 2


def compiled(device, backend: str, batch, samples, heads, kv_heads, width, prompt, response, dtype) -> dict:
    """Seconds of compilation, MiB beside arguments and results and, on TPUs, of VMEM for prompt and past."""
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    cache = lambda *sizes: (shape((LAYERS, batch, kv_heads, *sizes, width), dtype),) * 2
    scalar, length = shape((), jnp.int32), shape((batch,), jnp.int32)
    inputs = shape((batch, samples, heads, width), dtype), cache(prompt), cache(samples, response)
    start = time.perf_counter()
    program = (
        jax.jit(functools.partial(decode_attention, backend=backend)).lower(*inputs, scalar, length, scalar).compile()
    )
    seconds = time.perf_counter() - start
    text = program.as_text() or ""
    kernels = [line for line in text.splitlines() if " custom-call(" in line and "decode_attention/pallas_call" in line]
    assert len(kernels) == 2, kernels
    rows = aot.vmem_mib(text, r"[^=]*= \(f32\[(\d+),.* custom-call\(.*decode_attention/pallas_call")
    vmem = {"prompt" if int(n) == batch * kv_heads else "past": mib for n, mib in rows.items()}
    memory = program.memory_analysis()
    temporary = 0 if memory is None else memory.temp_size_in_bytes / aot.MIB
    return {"vmem_mib": vmem, "temporary_mib": round(temporary, 1), "compile_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="+", choices=aot.DEVICES)
    rows = []
    print("| device | B, G | P, R | H / K | D | dtype | VMEM of prompt, past (MiB) |\n|---|---|---|---|---|---|---|")
    for name in parser.parse_args().devices:
        backend, description = aot.DEVICES[name]
        device = topologies.get_topology_desc(**description).devices[0]
        for shape in SHAPES:
            batch, samples, heads, kv_heads, width, prompt, response, dtype = shape
            row = compiled(device, backend, *shape)
            vmem = ", ".join(str(row["vmem_mib"].get(part, "-")) for part in ("prompt", "past"))
            sizes = f"{batch}, {samples} | {prompt}, {response} | {heads} / {kv_heads} | {width} | {dtype}"
            print(f"| {name} | {sizes} | {vmem} |", flush=True)
            rows.append({"device": name, "shape": shape, **row})
    print(json.dumps({"benchmark": "aot_decode", "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
