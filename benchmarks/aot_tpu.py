"""The attention kernels compiled for TPUs that are not there: make aot

Forward and backward of forest_attention, by the real compiler (libtpu) from descriptions of the chips. It catches what
lowering does not: operations that Mosaic refuses, and tiles that do not fit into VMEM. It says nothing about speed.
Prints one row a chip and shape of a Markdown table, and one JSON line. Needs the extra `tpu` in an environment of its
own: libtpu prints errors wherever it finds no chip.
"""

import argparse
import json
import os
import re
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from rlalign_kernels import attention_plan, forest_attention

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SHAPES = (  # tokens of a row, H, K, D, dtype: Qwen2.5 0.5B and 7B, Llama 3 8B, Gemma 2, and one head a key/value head
    (4096, 14, 2, 64, "bfloat16"),
    (4096, 28, 4, 128, "bfloat16"),
    (12288, 32, 8, 128, "bfloat16"),
    (4096, 8, 4, 256, "bfloat16"),
    (4096, 8, 1, 128, "float32"),
    (2048, 16, 16, 96, "bfloat16"),
)
MIB = 2**20


def both(q, k, v, grad, visible_until):
    """The output and all gradients."""
    out, pull = jax.vjp(lambda *x: forest_attention(*x, visible_until, backend="tpu"), q, k, v)
    return out, *pull(grad)


def compiled(device, tokens: int, heads: int, kv_heads: int, width: int, dtype: str) -> dict:
    """Seconds of compilation, and MiB of VMEM of each kernel."""
    here = SingleDeviceSharding(device)
    tensor = lambda h: jax.ShapeDtypeStruct((1, tokens, h, width), dtype, sharding=here)
    until = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=here)
    start = time.perf_counter()
    program = jax.jit(both).lower(tensor(heads), tensor(kv_heads), tensor(kv_heads), tensor(heads), until).compile()
    seconds = time.perf_counter() - start
    vmem = {}
    for line in program.as_text().splitlines():
        name = re.match(r"[^=]*forest_attention_(forward|dq|dkv)[^=]* = .*tpu_custom_call", line)
        if name:
            sizes = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
            vmem[name[1]] = round(int(sizes[1]) / MIB, 2) if sizes else None
    assert set(vmem) == {"forward", "dq", "dkv"}, vmem
    plan = jax.eval_shape(lambda u: attention_plan(u, backend="tpu"), until)
    return {"block_q": plan.block_q, "block_k": plan.block_k, "vmem_mib": vmem, "compile_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", default=list(CHIPS), choices=CHIPS)
    rows = []
    print("| chip | T | H / K | D | dtype | tile | VMEM of forward, dq, dk/dv (MiB) |\n|---|---|---|---|---|---|---|")
    for chip in parser.parse_args().chips:
        device = topologies.get_topology_desc(topology_name=CHIPS[chip], platform="tpu").devices[0]
        for shape in SHAPES:
            tokens, heads, kv_heads, width, dtype = shape
            row = compiled(device, *shape)
            vmem = ", ".join(f"{row['vmem_mib'][name]}" for name in ("forward", "dq", "dkv"))
            tile = f"{row['block_q']} x {row['block_k']}"
            print(f"| {chip} | {tokens} | {heads} / {kv_heads} | {width} | {dtype} | {tile} | {vmem} |", flush=True)
            rows.append({"chip": chip, "shape": shape, **row})
    print(json.dumps({"benchmark": "aot_tpu", "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
