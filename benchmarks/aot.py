"""The attention kernels compiled for devices that are not there: make aot, make aot-cuda

Forward and backward of forest_attention, by the real compilers (libtpu; ptxas for a described H100). It catches what
lowering does not: operations that a compiler refuses, tiles that do not fit into VMEM or shared memory, and registers
that are spilled. It says nothing about speed. Prints one row a device and shape of a Markdown table, and one JSON line.
Each in an environment of its own: libtpu prints errors wherever it finds no chip, and CUDA is several GB.
"""

import argparse
import json
import os
import re
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from rlalign_kernels import forest_attention
from rlalign_kernels.attention.blocks import tile_of

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
    "tpu7x": ("tpu", {"topology_name": "tpu7x:2x2x1", "platform": "tpu"}),
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
KERNEL = r"[^=]*forest_attention_(forward|dq|dkv)[^=]* = .*tpu_custom_call"
PLATFORMS = {"tpu": "tpu", "triton": "gpu"}
MIB = 2**20


def vmem_mib(text: str, kernel: str) -> dict[str, float]:
    """MiB of VMEM that libtpu set aside, by the first group of the pattern `kernel`, which matches a kernel's line."""
    found = {}
    for line in text.splitlines():
        name = re.match(kernel, line)
        size = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
        if name and size:
            found[name[1]] = round(int(size[1]) / MIB, 2)
    return found


def gpu_resources(dump: Path) -> dict[str, str]:
    """Registers of a thread, bytes of them spilled and KiB of shared memory of each kernel that XLA dumped."""
    ptxas = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin/ptxas")
    launches = "".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
    found = {}
    for path in dump.glob("*.ptx"):
        name = re.search(r"\.entry forest_attention_(forward|dq|dkv)\(", path.read_text())
        if name:
            command = [ptxas, "-v", "-arch=sm_90a", path, "-o", os.devnull]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            registers, spilled = (re.search(p, told) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
            shared = re.search(rf"forest_attention_{name[1]} .*shared_memory: (\d+) bytes", launches)
            if not (registers and spilled and shared):
                raise ValueError(f"no account of {name[1]} in {path} and in what ptxas told: {told}")
            found[name[1]] = f"{registers[1]} / {spilled[1]} / {round(int(shared[1]) / 1024)}"
    return found


def compiled(device, backend: str, tokens: int, heads: int, kv_heads: int, width: int, dtype: str) -> dict:
    """Tile, seconds of compilation and what each kernel takes of the device."""
    here = SingleDeviceSharding(device)
    tensor = lambda h: jax.ShapeDtypeStruct((1, tokens, h, width), dtype, sharding=here)
    until = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=here)

    def both(q, k, v, grad, until):
        out, pull = jax.vjp(lambda q, k, v: forest_attention(q, k, v, until, backend=backend), q, k, v)
        return out, *pull(grad)

    described = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform=PLATFORMS[backend])
    start = time.perf_counter()
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):  # whose row of blocks.py is meant
        tile = tile_of(backend, tokens, group=heads // kv_heads, width=width, dtype=dtype)
        lowered = jax.jit(both).lower(*map(tensor, (heads, kv_heads, kv_heads, heads)), until)
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True} if backend == "triton" else {}
        text = lowered.compile(compiler_options=options).as_text() or ""
        seconds = time.perf_counter() - start
        resources = gpu_resources(Path(dump)) if backend == "triton" else vmem_mib(text, KERNEL)
    missing = [name for name in KERNELS if f"forest_attention_{name}" not in text]
    assert not missing, missing
    return {"tile": tile._asdict(), "resources": resources, "compile_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="+", choices=DEVICES)
    rows = []
    units = "VMEM (MiB), or registers / bytes spilled / KiB shared, of forward, dq, dk/dv"
    print(f"| device | T | H / K | D | dtype | tile | {units} |\n|---|---|---|---|---|---|---|")
    for name in parser.parse_args().devices:
        backend, description = DEVICES[name]
        device = topologies.get_topology_desc(**description).devices[0]
        for shape in SHAPES:
            tokens, heads, kv_heads, width, dtype = shape
            row = compiled(device, backend, *shape)
            taken = ", ".join(str(row["resources"].get(kernel, "-")) for kernel in KERNELS)
            tile = f"{row['tile']['block_q']} x {row['tile']['block_k']}"
            tile = tile if row["tile"]["heads"] == 1 else f"{row['tile']['heads']} x {tile}"
            print(f"| {name} | {tokens} | {heads} / {kv_heads} | {width} | {dtype} | {tile} | {taken} |", flush=True)
            rows.append({"device": name, "shape": shape, **row})
    print(json.dumps({"benchmark": "aot", "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
