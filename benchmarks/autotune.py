"""Tiles of forest_attention for the device at hand, tried, timed and written into blocks.py

    PYTHONPATH=kernels python3 benchmarks/autotune.py [--width 128 --heads 32 --kv-heads 8 --dtype bfloat16] [--dry-run]

Each tile is compiled with each way to launch it, and forward, dq and dk/dv are timed apart, because each may be
launched in its own way. The fastest three are compared with backend "xla", output and gradients, and the first that is
right is written: as a row of this device, width and type, in front of the row that would have been taken or in its
place, with device, version and command above it. What does not compile or fit is passed over and named. Prints a
Markdown table and one JSON line.
"""

import argparse
import functools
import itertools
import json
import shlex
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import median_ms

from rlalign_kernels import forest_attention
from rlalign_kernels.attention import blocks
from rlalign_kernels.attention.blocks import Row, Tile
from rlalign_kernels.attention.plan import make_plan
from rlalign_kernels.attention.shapes import MEASURED, GroupShape, group, masked
from rlalign_kernels.attention.tiled import Options, attention
from rlalign_kernels.backend import load

KERNELS = ("forward", "dq", "dkv")
SHAPES = MEASURED | {"smoke": GroupShape(40, 24, 2)}
GPU_SIZES = ((64, 64), (64, 128), (128, 32), (128, 64), (128, 128))
TPU_SIZES = itertools.product((128, 256, 512), repeat=2)
SEARCH = {  # platform: backend, tiles, (warps, stages) of a launch
    "gpu": ("triton", [Tile(q, k, 4, programs=1024) for q, k in GPU_SIZES], [*itertools.product((4, 8), (1, 2, 3))]),
    "tpu": ("tpu", [Tile(q, k) for q, k in TPU_SIZES], [(4, 2)]),
    "cpu": ("interpret_triton", [Tile(32, 16, 2, programs=16)], [(4, 2)]),
}
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}  # of the largest entry


def problem(flags) -> tuple[list[jax.Array], jax.Array]:
    """(q, k, v and a cotangent [n, heads, D], visible_until [1, n]) of the named shape."""
    shape = SHAPES[flags.shape]
    until = jnp.array([masked(group(shape.prompt, *[shape.response] * shape.samples))[0]], jnp.int32)
    heads = (flags.heads, flags.kv_heads, flags.kv_heads, flags.heads)
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, h: jax.random.normal(key, (shape.tokens, h, flags.width), flags.dtype)
    return [draw(key, h) for key, h in zip(keys, heads, strict=True)], until


def programs(backend: str, tile: Tile, inputs: list[jax.Array], until: jax.Array, flags) -> dict:
    """kernel -> a call of it alone with a tile, on arrays cut as tiled.py cuts them."""
    options = Options(backend, flags.width**-0.5, None, None, tile)
    plan = jax.jit(make_plan, static_argnames=("block_q", "block_k"))(until, block_q=tile.block_q, block_k=tile.block_k)
    forward, backward = (load("attention", backend, name) for name in ("forward", "backward"))
    tokens = plan.visible_until.size

    def cut(x, block, packed):  # [n, h, D] -> [tiles, K, packed * block, D]
        x = jnp.pad(x, ((0, tokens - x.shape[0]), (0, 0), (0, 0)))
        x = x.reshape(-1, block, flags.kv_heads, packed, flags.width)
        return x.transpose(0, 2, 3, 1, 4).reshape(-1, flags.kv_heads, packed * block, flags.width)

    ratio = flags.heads // flags.kv_heads
    q, grad = (cut(inputs[i], tile.block_q, ratio) for i in (0, 3))
    k, v = (cut(inputs[i], tile.block_k, 1) for i in (1, 2))
    # Not those of the forward, which may be refused where another kernel is not: numbers of their size do to time it.
    lse, delta = (jax.random.normal(jax.random.key(i), q.shape[:3]) + 5 * i for i in (1, 0))
    # A kernel whose results are not asked for is dropped by the compiler.
    forward = jax.jit(functools.partial(forward, options))
    dq = jax.jit(lambda q, k, v, plan, *rest: backward(options, q, k, v, plan, None, *rest)[0])
    dkv = jax.jit(lambda q, k, v, plan, *rest: backward(options, q, k, v, plan, None, *rest)[1:])
    return {
        "forward": lambda: forward(q, k, v, plan, None),
        "dq": lambda: dq(q, k, v, plan, lse, delta, grad),
        "dkv": lambda: dkv(q, k, v, plan, lse, delta, grad),
    }


def search(backend: str, tiles, launches, inputs, until, flags) -> tuple[list[tuple[float, Tile]], dict[str, str]]:
    """(sum of its kernels' least times, tile launched so) by rising time, and what failed with its reason."""
    found, failed, ratio = [], {}, flags.heads // flags.kv_heads
    for tile in {blocks.FITTED[backend](tile, ratio): tile for tile in tiles}.values():
        times = {name: {} for name in KERNELS}
        for warps, stages in launches:
            launched = blocks.FITTED[backend](tile, ratio)._replace(warps=(warps,) * 3, stages=(stages,) * 3)
            for name, run in programs(backend, launched, inputs, until, flags).items():
                try:
                    wait = jax.block_until_ready
                    times[name][warps, stages] = median_ms(run, wait, repeats=flags.repeats, least_ms=flags.least_ms)
                except Exception as reason:  # noqa: BLE001 - compilers refuse in many ways; the others are worth trying
                    what = f"{name} of {tile.block_q} x {tile.block_k}, {warps} warps, {stages} stages"
                    failed[what] = f"{type(reason).__name__}: {str(reason).strip()[:160]}"
        if all(times.values()):
            warps, stages = zip(*(min(times[name], key=times[name].__getitem__) for name in KERNELS), strict=True)
            total = sum(min(times[name].values()) for name in KERNELS)
            found.append((total, tile._replace(warps=warps, stages=stages)))
            print(f"{total:.3f} ms  {found[-1][1]}", file=sys.stderr, flush=True)
    return sorted(found, key=lambda item: item[0]), failed


def largest_error(backend: str, tile: Tile, flags) -> float:
    """Against "xla" on a small group: the largest difference over the largest entry, output and gradients."""
    until = jnp.array([masked(group(90, 33, 70))[0]], jnp.int32)
    heads = (flags.heads, flags.kv_heads, flags.kv_heads, flags.heads)
    keys = jax.random.split(jax.random.key(1), 4)
    draw = lambda key, h: jax.random.normal(key, (until.size, h, flags.width), flags.dtype)
    q, k, v, grad = (draw(key, h) for key, h in zip(keys, heads, strict=True))
    tile = blocks.FITTED[backend](tile, flags.heads // flags.kv_heads)
    plan = make_plan(until, block_q=tile.block_q, block_k=tile.block_k)
    options = Options(backend, flags.width**-0.5, None, None, tile)

    def both(attend):
        out, pull = jax.vjp(attend, q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *pull(grad))]

    got = both(jax.jit(lambda q, k, v: attention(q, k, v, plan, None, options)))
    xla = both(jax.jit(lambda q, k, v: forest_attention(q[None], k[None], v[None], until, backend="xla")[0]))
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, xla, strict=True))


def rewritten(text: str, rows: tuple[Row, ...], taken: Row, new: Row, comment: str) -> str:
    """The source of blocks.py with `new` in front of `taken`, or in its place where it is for the same heads.

    A row is a line of its own; those of `rows` stand in their order.
    """
    lines = text.splitlines(keepends=True)
    at = [i for i, line in enumerate(lines) if line.startswith("    Row(")][rows.index(taken)]
    tile = f"Tile({', '.join(map(repr, new.tile))})"
    added = [f"    # {line}\n" for line in textwrap.wrap(comment, 110, break_on_hyphens=False)]
    added.append(f"    Row({', '.join(map(json.dumps, new[:5]))}, {tile}),\n")
    start = at
    while lines[start - 1].startswith("    # "):
        start -= 1
    if taken[:4] == new[:4]:
        return "".join((*lines[:start], *added, *lines[at + 1 :]))
    return "".join((*lines[:start], *added, *lines[start:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--shape", choices=SHAPES, default="4k")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--least-ms", type=float, default=10.0)
    parser.add_argument("--table", type=Path, default=Path(blocks.__file__), help="the file that is rewritten")
    parser.add_argument("--dry-run", action="store_true", help="print the row and write nothing")
    flags = parser.parse_args()
    backend, tiles, launches = SEARCH[jax.default_backend()]
    inputs, until = problem(flags)
    taken = blocks.row_of(backend, until.shape[1], width=flags.width, dtype=flags.dtype)
    tiles = list(dict.fromkeys([taken.tile, *tiles]))  # the one to beat first
    found, failed = search(backend, tiles, launches, inputs, until, flags)
    errors = {item: largest_error(backend, item[1], flags) for item in found[:3]}
    right = [item for item, error in errors.items() if error <= TOLERANCE[flags.dtype]]
    if not right:
        sys.exit(f"no tile ran and was right; refused: {failed}; errors of the fastest: {errors}")
    total, tile = right[0]
    kind = jax.devices()[0].device_kind
    size = jnp.dtype(flags.dtype).itemsize
    new = taken._replace(device=kind, width=flags.width, bytes=size, tile=tile)
    measured = f"{total:.3f} ms for its three kernels"
    comment = f"{kind}, jax {jax.__version__}, {measured}: python {shlex.join(sys.argv)}"
    text = rewritten(flags.table.read_text(), blocks.ROWS, taken, new, comment)
    if not flags.dry_run:
        flags.table.write_text(text)
    print("| tile | ms |\n|---|---|")
    print("\n".join(f"| {tile} | {ms:.3f} |" for ms, tile in found))
    result = {"benchmark": "autotune", "device": kind, "jax": jax.__version__, "row": new, "ms": round(total, 4)}
    result |= {"error": errors[right[0]], "passed_over": len(errors) - len(right), "failed": failed}
    print(json.dumps(result | {"written": not flags.dry_run}))


if __name__ == "__main__":
    main()
