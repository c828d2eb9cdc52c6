"""What a ring of devices computes and keeps: benchmarks/ring.py [--topology v5e:2x2]

Without a topology: live pairs of tiles on each simulated device, from the plans of groups with long prompts, and the
share of their time that devices are busy if time goes by tiles: at best, when none waits before the end (mean / largest
of the devices), and at worst, when all wait in every step (mean / sum of the steps' largest). `two_ends` is the same
for another order, which is not built: of 2 S slices a device holds d and 2 S - 1 - d.

With one, in the environment of make aot: forward and backward compiled by libtpu for all its devices, MiB of temporary
memory on each, kernels and sends in the program. One JSON line either way; neither says anything about speed.
"""

import argparse
import functools
import json
import os
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlalign_kernels import ring_attention, ring_plan
from rlalign_kernels.attention.shapes import GroupShape

GROUPS = (GroupShape(65536, 0, 1), GroupShape(16384, 1024, 16), GroupShape(32768, 1024, 8), GroupShape(65536, 2048, 16))
SLICE, HEADS, KV_HEADS, WIDTH = 8192, 32, 8, 128  # tokens a device, and Llama 3 8B, in bfloat16
ROW = P(None, "sequence")
MIB = 2**20


def until(shape: GroupShape) -> np.ndarray:
    """i32[T] of a prompt and its responses."""
    ends = shape.prompt + shape.response * np.arange(1, shape.samples + 1)
    return np.concatenate([np.full(shape.prompt, ends[-1]), np.repeat(ends, shape.response)]).astype(np.int32)


def over(function, devices, *, in_specs, out_specs, **options):
    """function(..., axis_name="sequence") over a ring of devices."""
    mesh = Mesh(np.array(devices), ("sequence",), axis_types=(AxisType.Auto,))
    function = functools.partial(function, axis_name="sequence", **options)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def busy(tiles: np.ndarray) -> dict:
    """Of live tiles i[devices, steps]."""
    mean = tiles.sum() / len(tiles)
    best, worst = mean / tiles.sum(axis=1).max(), mean / tiles.max(axis=0).sum()
    return {"tiles": tiles.sum(axis=1).tolist(), "best": round(best, 2), "worst": round(worst, 2)}


def planned(row: np.ndarray, size: int) -> np.ndarray:
    """Live tiles i[devices, steps] of ring_plan."""
    plan = jax.jit(over(ring_plan, jax.devices()[:size], in_specs=ROW, out_specs=P("sequence"), backend="tpu"))
    plan = plan(jnp.asarray(row)[None])
    own, visits = plan.own.plan.by_query.count, plan.visits.plan.by_query.count
    return np.concatenate([np.reshape(own, (size, 1)), np.reshape(visits, (size, size - 1))], axis=1)


def two_ends(row: np.ndarray, size: int, block_q: int = 128, block_k: int = 256) -> np.ndarray:
    """Live tiles i[devices, steps] if a device holds slices d and 2 S - 1 - d, by the rule of the plan."""
    length = len(row) // (2 * size)
    query, reach = np.arange(0, len(row), block_q)[:, None], row.reshape(-1, block_k).max(axis=1)[None]
    live = (np.arange(0, len(row), block_k)[None] < query + block_q) & (reach > query)
    pairs = live.reshape(2 * size, length // block_q, 2 * size, length // block_k).sum(axis=(1, 3))
    folded = pairs + pairs[::-1]  # of slices d and 2 S - 1 - d as queries, then as keys
    folded = (folded + folded[:, ::-1])[:size, :size]
    return np.stack([[folded[d, (d - t) % size] for t in range(size)] for d in range(size)])


def compiled(topology: str) -> dict:
    """MiB of temporary memory and sends of the forward, and of forward and backward."""
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    attention = over(ring_attention, devices, in_specs=(ROW,) * 4, out_specs=ROW, backend="tpu")
    mesh = Mesh(np.array(devices), ("sequence",), axis_types=(AxisType.Auto,))
    shape = lambda dtype, *rest: jax.ShapeDtypeStruct(
        (1, SLICE * len(devices), *rest), dtype, sharding=NamedSharding(mesh, ROW)
    )
    q, k, ids = shape("bfloat16", HEADS, WIDTH), shape("bfloat16", KV_HEADS, WIDTH), shape("int32")

    def both(q, k, v, grad, ids):
        out, pull = jax.vjp(lambda *x: attention(*x, ids), q, k, v)
        return out, *pull(grad)

    result: dict = {"topology": topology, "devices": len(devices), "tokens": SLICE * len(devices)}
    for name, program, inputs in (("forward", attention, (q, k, k, ids)), ("both", both, (q, k, k, q, ids))):
        start = time.perf_counter()
        done = jax.jit(program).lower(*inputs).compile()
        text, memory = done.as_text() or "", done.memory_analysis()
        result[name] = {
            "temporary_mib": round(memory.temp_size_in_bytes / MIB, 1) if memory else None,
            "kernels": text.count('custom_call_target="tpu_custom_call"'),
            "sends": text.count(" collective-permute-start(") + text.count(" collective-permute("),
            "compile_seconds": round(time.perf_counter() - start, 1),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology")
    topology = parser.parse_args().topology
    result: dict = {"benchmark": "ring", "jax": jax.__version__}
    if topology:
        result |= compiled(topology)
    else:
        jax.config.update("jax_num_cpu_devices", 8)
        cases = [(shape, size, until(shape)) for shape in GROUPS for size in (4, 8)]
        result["rows"] = [
            {"shape": shape, "devices": size, "ring": busy(planned(row, size)), "two_ends": busy(two_ends(row, size))}
            for shape, size, row in cases
        ]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
