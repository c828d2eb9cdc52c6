"""Forms of attention in JAX that attention.py compares: ours on a forest, ours and cuDNN's on the repeated batch."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlalign_kernels import attention_plan, forest_attention

VERSION = jax.__version__
OURS = {"gpu": ("triton", "xla"), "tpu": ("tpu", "xla"), "cpu": ("xla", "interpret_triton", "interpret")}


def tensor(x: np.ndarray) -> jax.Array:
    """f32[B, T, H, D] -> bf16 on the device."""
    return jnp.asarray(x, jnp.bfloat16)


def array(x: jax.Array) -> np.ndarray:
    """The inverse of tensor()."""
    return np.asarray(x, np.float32)


def random(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """bf16[B, T, H, D] on the device."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


wait = jax.block_until_ready


def ours(backend: str, until: np.ndarray, head: dict) -> tuple[Callable, tuple]:
    """forest_attention by one backend, with tile lists made beforehand."""

    def attend(q, k, v, until, plan):
        return forest_attention(q, k, v, until, backend=backend, plan=plan)

    rows = jnp.asarray(until)
    plan = jax.jit(functools.partial(attention_plan, backend=backend, dtype="bfloat16", **head))(rows)
    return attend, (rows, plan)


def cudnn(until: np.ndarray, head: dict) -> tuple[Callable, tuple]:
    """jax.nn.dot_product_attention by cuDNN, causal."""
    del until, head
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"), ()


def forms(platform: str) -> dict[str, tuple[bool, Callable]]:
    """name -> (is it for the repeated batch, build); build(visible_until, group and width) -> (attend, its lists)."""
    forest = {name: (False, functools.partial(ours, name)) for name in OURS[platform]}
    kernel = OURS[platform][0]
    again = {f"{kernel}, repeated": (True, functools.partial(ours, kernel))}
    return forest | again | {"cudnn": (True, cudnn)}


def runs(attend: Callable, extra: tuple, q, k, v, grad) -> dict[str, Callable]:
    """The forward alone, and with it the gradients of q, k and v."""

    @jax.jit
    def both(q, k, v, grad, *extra):
        out, pull = jax.vjp(lambda *x: attend(*x, *extra), q, k, v)
        return out, *pull(grad)

    forward = jax.jit(attend)
    return {"forward": lambda: forward(q, k, v, *extra), "both": lambda: both(q, k, v, grad, *extra)}
