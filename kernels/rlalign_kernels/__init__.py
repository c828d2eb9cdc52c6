"""Kernels of the token forest. This package imports jax only.

forest_attention(q, k, v, visible_until, ...)            the one attention operation of the library
attention_plan(visible_until)                            its tile lists, computed once and shared by all layers
target_logprobs(hidden, head, parent, target, live)      log-probs and entropies without logits
"""

from rlalign_kernels.attention.api import attention_plan, forest_attention
from rlalign_kernels.logprobs.api import target_logprobs

__all__ = ["attention_plan", "forest_attention", "target_logprobs"]
