"""Kernels of the token forest. This package imports jax only.

forest_attention(q, k, v, visible_until, ...)            the one attention operation of the library
attention_plan(visible_until)                            its tile lists, computed once and shared by all layers
ring_attention(q, k, v, visible_until, axis_name=...)    the same on rows cut along their tokens, inside shard_map
ring_plan(visible_until, axis_name=...)                  its tile lists
decode_attention(q, prefix, suffix, layer, length, step) that of the sampler: one token a sample, over caches
target_logprobs(hidden, head, parent, target, live)      log-probs and entropies without logits
"""

from rlalign_kernels.attention.api import attention_plan, forest_attention
from rlalign_kernels.attention.ring import ring_attention, ring_plan
from rlalign_kernels.decode.api import decode_attention
from rlalign_kernels.logprobs.api import target_logprobs

__all__ = ["attention_plan", "decode_attention", "forest_attention", "ring_attention", "ring_plan", "target_logprobs"]
