"""Floating-point operations and bytes of a run, counted from shapes."""

from collections.abc import Sequence

from rlalign.models.config import ModelConfig


def layer_weights(c: ModelConfig) -> int:
    """Of one layer's projections."""
    attention = c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
    return attention + (3 if c.gated_mlp else 2) * c.width * c.mlp_width


def visible_pairs(prompt: int, responses: Sequence[int], window: int | None = None) -> float:
    """Pairs of a query and a key that it sees, in a group of responses whose prompt is stored once."""

    def before(length: int) -> float:
        seen = length if window is None else min(length, window)
        return seen * (seen + 1) / 2 + (length - seen) * seen

    return before(prompt) + sum(before(prompt + response) - before(prompt) for response in responses)


def mean_pairs(c: ModelConfig, prompt: int, responses: Sequence[int]) -> float:
    """The same, the mean of the model's layers."""
    full = c.layers if c.window is None else len(c.full_layers)
    pairs = full * visible_pairs(prompt, responses)
    return (pairs + (c.layers - full) * visible_pairs(prompt, responses, c.window)) / c.layers


def update_flops(c: ModelConfig, *, tokens: float, pairs: float, responses: float) -> float:
    """Of the forward and backward of so many tokens, visible pairs and response tokens, in all.

    Dense layers: 6 a weight and token, 8 where the backward recomputes them; 4 and 6 where they are frozen under an
    adapter. Attention: 7 products (2 forward, 5 backward) of 2 H D a pair and layer. Head: 4 products (one of them the
    recomputation) of 2 W V a response token, 3 where it is frozen; a reward head is nothing.
    """
    dense = (4 if c.lora else 6) + (2 if c.remat == "full" else 0)
    attention = c.layers * pairs * 7 * 2 * c.heads * c.head_width
    return dense * tokens * c.layers * layer_weights(c) + attention + (3 if c.lora else 4) * _head(c, responses)


def forward_flops(c: ModelConfig, *, tokens: float, pairs: float, responses: float) -> float:
    """Of a forward alone."""
    attention = c.layers * pairs * 2 * 2 * c.heads * c.head_width
    return 2 * tokens * c.layers * layer_weights(c) + attention + _head(c, responses)


def _head(c: ModelConfig, responses: float) -> float:
    """One product of the head."""
    return 0.0 if c.reward_head else responses * 2 * c.width * c.vocab_size
