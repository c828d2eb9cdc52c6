"""The attention kernels compiled for devices that are not there: make aot, make aot-cuda

Forward and backward of forest_attention, by the real compilers (libtpu; ptxas for a described H100). It catches what
lowering does not: operations that a compiler refuses, and tiles that do not fit into VMEM or shared memory. It says
nothing about speed. Prints one row a device and shape of a Markdown table, and one JSON line. Each in an environment of
its own: libtpu prints errors wherever it finds no chip, and CUDA is several GB.
"""

import argparse
import json
import os
import re
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from rlalign_kernels import attention_plan, forest_attention

# XLA's GpuTargetConfig: the figures of NVIDIA's data sheet and of CUDA's table of compute capability 9.0.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
DEVICES = {  # backend of forest_attention, and what describes the device
    "v5e": ("tpu", {"topology_name": "v5e:2x2", "platform": "tpu"}),
    "v5p": ("tpu", {"topology_name": "v5p:2x2x1", "platform": "tpu"}),
    "v6e": ("tpu", {"topology_name": "v6e:2x2", "platform": "tpu"}),
    "h100": (
        "triton",
        {"topology_name": "cuda", "platform": "cuda", "topology": "1x1x1", "target_config": H100},
    ),
}
SHAPES = (  # tokens of a row, H, K, D, dtype: Qwen2.5 0.5B and 7B, Llama 3 8B, Gemma 2, and one head a key/value head
    (16384, 14, 2, 64, "bfloat16"),
    (16384, 28, 4, 128, "bfloat16"),
    (16384, 32, 8, 128, "bfloat16"),
    (16384, 8, 4, 256, "bfloat16"),
    (16384, 16, 2, 128, "float32"),
    (16384, 16, 16, 96, "bfloat16"),
)
KERNELS = ("forward", "dq", "dkv")
MIB = 2**20


def compiled(device, backend: str, tokens: int, heads: int, kv_heads: int, width: int, dtype: str) -> dict:
    """Tile, seconds of compilation and, on TPUs, MiB of VMEM of each kernel."""
    here = SingleDeviceSharding(device)
    tensor = lambda h: jax.ShapeDtypeStruct((1, tokens, h, width), dtype, sharding=here)
    until = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=here)

    def both(q, k, v, grad, until):
        out, pull = jax.vjp(lambda q, k, v: forest_attention(q, k, v, until, backend=backend), q, k, v)
        return out, *pull(grad)

    start = time.perf_counter()
    program = jax.jit(both).lower(*map(tensor, (heads, kv_heads, kv_heads, heads)), until).compile()
    seconds = time.perf_counter() - start
    text, vmem = program.as_text() or "", {}
    missing = [name for name in KERNELS if f"forest_attention_{name}" not in text]
    assert not missing, missing
    for line in text.splitlines():
        name = re.match(r"[^=]*forest_attention_(forward|dq|dkv)[^=]* = .*tpu_custom_call", line)
        size = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
        if name and size:
            vmem[name[1]] = round(int(size[1]) / MIB, 2)
    plan = jax.eval_shape(lambda u: attention_plan(u, backend=backend), until)
    return {"block_q": plan.block_q, "block_k": plan.block_k, "vmem_mib": vmem, "compile_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="+", choices=DEVICES)
    rows = []
    print("| device | T | H / K | D | dtype | tile | VMEM of forward, dq, dk/dv (MiB) |\n|---|---|---|---|---|---|---|")
    for name in parser.parse_args().devices:
        backend, description = DEVICES[name]
        device = topologies.get_topology_desc(**description).devices[0]
        for shape in SHAPES:
            tokens, heads, kv_heads, width, dtype = shape
            row = compiled(device, backend, *shape)
            vmem = ", ".join(str(row["vmem_mib"].get(kernel, "-")) for kernel in KERNELS)
            tile = f"{row['block_q']} x {row['block_k']}"
            print(f"| {name} | {tokens} | {heads} / {kv_heads} | {width} | {dtype} | {tile} | {vmem} |", flush=True)
            rows.append({"device": name, "shape": shape, **row})
    print(json.dumps({"benchmark": "aot", "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
