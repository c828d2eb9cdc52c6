"""What PyTorch offers for the same attention; the names are those of forms_jax.py.

Imported only where PyTorch is installed: it is no dependency of the library.
"""

# pyright: reportMissingImports=false
import contextlib
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

VERSION = torch.__version__
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
compiled_flex = torch.compile(flex_attention, dynamic=False) if ON_GPU else flex_attention


def tensor(x: np.ndarray) -> torch.Tensor:
    """f32[B, T, H, D] -> bf16[B, H, T, D] on the device."""
    return torch.from_numpy(x).to(DEVICE, torch.bfloat16).transpose(1, 2).contiguous()


def array(x: torch.Tensor) -> np.ndarray:
    """The inverse of tensor()."""
    return x.detach().transpose(1, 2).float().cpu().numpy()


def random(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """bf16[B, H, T, D] on the device, of a shape [B, T, H, D]."""
    rows, length, heads, width = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(rows, heads, length, width, device=DEVICE, dtype=torch.bfloat16, generator=generator)


def wait(_) -> None:
    """Until the device has done what it was given."""
    if ON_GPU:
        torch.cuda.synchronize()


def flex(until: np.ndarray, head: dict) -> tuple[Callable, tuple]:
    """FlexAttention over one row, with the forest's mask."""
    del head
    reach, length = torch.from_numpy(until[0]).to(DEVICE), until.shape[1]

    def visible(b, h, query, key):
        return (key <= query) & (query < reach[key])

    blocks = create_block_mask(visible, None, None, length, length, device=DEVICE, _compile=ON_GPU)
    return lambda q, k, v: compiled_flex(q, k, v, block_mask=blocks, enable_gqa=True), ()


def flash(until: np.ndarray, head: dict) -> tuple[Callable, tuple]:
    """scaled_dot_product_attention, causal, by its flash kernel."""
    del until, head

    def attend(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if ON_GPU else contextlib.nullcontext():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend, ()


def forms(platform: str) -> dict[str, tuple[bool, Callable]]:
    """name -> (is it for the repeated batch, build)."""
    del platform
    return {"torch flex": (False, flex), "torch sdpa flash": (True, flash)}


def runs(attend: Callable, extra: tuple, q, k, v, grad) -> dict[str, Callable]:
    """The forward alone, and with it the gradients of q, k and v."""
    del extra
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return attend(*leaves)

    def both():
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad)

    return {"forward": forward, "both": both}
