"""The problems of the benchmarks, and how they measure.

The fixed one: a Qwen3-shaped decoder (4 layers, width 256, 4 heads, 2 key/value heads of 64, MLP 1024, vocabulary 512,
tied head, float32); 4 prompts x 8 responses, prompt 512, response 64; no KL; AdamW. For accelerators the shapes of
Qwen2.5 0.5B and 1.5B in bfloat16, with random weights. Every number comes with CPU seconds beside wall seconds, because
machines are shared.
"""

import dataclasses
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import rlalign as ra
from rlalign.plan import flops
from rlalign.plan.flops import layer_weights, visible_pairs


class Shape(NamedTuple):
    """`prompts` groups of `samples` responses of length `response` behind prompts of length `prompt`."""

    prompt: int = 512
    response: int = 64
    samples: int = 8
    prompts: int = 4


MODEL = ra.ModelConfig(
    vocab_size=512,
    width=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_width=64,
    mlp_width=1024,
    max_positions=32768,
    rope_theta=1e6,
    tied_head=True,
    qk_norm=True,
)

QWEN2 = ra.ModelConfig(
    vocab_size=151936,
    width=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_width=64,
    mlp_width=4864,
    max_positions=32768,
    rope_theta=1e6,
    tied_head=True,
    qkv_bias=True,
    dtype="bfloat16",
    remat="full",
)
MODELS = {
    "fixed": MODEL,
    "qwen2_0_5b": QWEN2,
    "qwen2_1_5b": dataclasses.replace(QWEN2, width=1536, layers=28, heads=12, head_width=128, mlp_width=8960),
}


def sequences(shape: Shape, seed: int = 0, vocab: int = MODEL.vocab_size) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(prompts, responses) of random tokens, `samples` responses a prompt in order."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, vocab, shape.prompt) for _ in range(shape.prompts)]
    count = shape.prompts * shape.samples
    return prompts, [rng.integers(3, vocab, shape.response) for _ in range(count)]


def batch(shape: Shape, *, row_length: int, seed: int = 0, vocab: int = MODEL.vocab_size, parts: int = 1) -> ra.Batch:
    """The batch of one update, on-policy; rows of prompt + response tokens hold one sample each and share nothing.

    Two samples a prompt are also a pair, with log-probs of a reference.
    """
    prompts, responses = sequences(shape, seed, vocab)
    whole = [np.concatenate([prompts[i // shape.samples], r]) for i, r in enumerate(responses)]
    packed = ra.pack(whole, row_length=row_length, response_start=[shape.prompt] * len(whole), parts=parts)
    advantage = np.random.default_rng(seed + 1).normal(size=len(whole)).astype(np.float32)
    if shape.samples != 2:
        return ra.Batch(packed, advantage=advantage)
    pair = np.arange(len(whole), dtype=np.int32).reshape(-1, 2)
    return ra.Batch(packed, advantage=advantage, ref_logp=np.zeros(packed.mask.shape, np.float32), pair=pair)


def update_flops(config: ra.ModelConfig, shape: Shape, *, shared: bool) -> float:
    """Floating-point operations of one update, counted from shapes; AdamW is 16 a weight."""
    c, (P, R, G, B) = config, shape
    tokens = B * (P + G * R if shared else G * (P + R))
    pairs = B * (visible_pairs(P, [R] * G) if shared else G * visible_pairs(P, [R]))
    weights = c.layers * layer_weights(c) + c.vocab_size * c.width
    return flops.update_flops(c, tokens=tokens, pairs=pairs, responses=B * G * R) + 16 * weights


def token_ratio(shape: Shape) -> float:
    """rho = G (P + R) / (P + G R): the bound on the gain of everything that works token by token, but the head."""
    P, R, G, _ = shape
    return G * (P + R) / (P + G * R)


def attention_ratio(shape: Shape) -> float:
    """alpha = G (P + R)^2 / (P^2 + G R (2 P + R)): the bound on the gain of attention."""
    P, R, G, _ = shape
    return G * (P + R) ** 2 / (P**2 + G * R * (2 * P + R))


def cpu_seconds() -> float:
    """User and system seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_gib() -> float:
    """The most memory so far, GiB: of the first accelerator, or of this process on a CPU."""
    used = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in used:
        return used["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(run: Callable[[], Any], *, repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median wall and CPU seconds of run() after `warmup` calls; waits for its result."""
    for _ in range(warmup):
        jax.block_until_ready(run())
    wall, cpu = [], []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), cpu_seconds()
        jax.block_until_ready(run())
        wall.append(time.perf_counter() - begin)
        cpu.append(cpu_seconds() - begin_cpu)
    return {"seconds": round(statistics.median(wall), 4), "cpu_seconds": round(statistics.median(cpu), 4)}


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
