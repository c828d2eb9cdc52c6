"""Tiny models and batches, and the batch in which every prefix is repeated: what the forest must be equal to."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.envs import sums
from rlalign.forest import pack
from rlalign.io.config import RunConfig
from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Decoder
from rlalign.rollout import SampleConfig
from rlalign.train import OptimizerConfig
from rlalign.types import Packed, TokenForest
from rlalign_kernels.attention.reference import reference_attention

SHAPE = {"vocab_size": 17, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "max_positions": 64}
QWEN2 = ModelConfig(**SHAPE, head_width=4, tied_head=True, qkv_bias=True)
QWEN3 = ModelConfig(**SHAPE, head_width=6, tied_head=False, qk_norm=True)  # heads * head_width is not width

GEMMA = dataclasses.replace(
    QWEN3,
    tied_head=True,
    norm="rms_plus_one",
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=4.0,
    attention_scale=0.3,
    attention_softcap=2.0,
    logit_softcap=1.5,
    window=3,
    full_layers=(1,),
    local_rope_theta=100.0,
)
GPT_NEOX = dataclasses.replace(
    QWEN2,
    norm="layer",
    parallel=True,
    activation="gelu",
    gated_mlp=False,
    rotary_width=2,
    kv_heads=4,
    output_bias=True,
    mlp_bias=True,
)


def sums_model(width: int) -> ModelConfig:
    """One layer, two heads, for the problem of rlalign.envs.sums."""
    return ModelConfig(
        vocab_size=sums.VOCAB_SIZE,
        width=width,
        layers=1,
        heads=2,
        kv_heads=2,
        head_width=width // 2,
        mlp_width=4 * width,
        max_positions=16,
        tied_head=True,
        qk_norm=True,
    )


def sums_run(folder, **changes) -> RunConfig:
    """A few small steps on them."""
    base = RunConfig(
        folder=str(folder),
        steps=4,
        prompts_per_step=4,
        sampling=SampleConfig(4, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,)),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        row_length=64,
        num_rows=4,
        eval_every=2,
        eval_prompts=8,
        checkpoint_every=2,
        reward_workers=1,
        reward_limit=20.0,
    )
    return dataclasses.replace(base, **changes)


def random_params(config: ModelConfig, seed: int = 0, scale: float = 0.3):
    """Parameters far from their start: large matrices, biases that are not 0, norms that are not 1."""
    shapes = jax.eval_shape(Decoder(config).init, 0)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", scale, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


def dense(q, k, v, visible_until, *, plan, **options):
    """Attention with the whole mask, in place of the kernel."""
    del plan
    return reference_attention(q, k, v, visible_until, **options).astype(q.dtype)


def dense_decoder(config: ModelConfig) -> Decoder:
    """The decoder without kernel and without tile lists."""
    return Decoder(config, attention=dense, plan=lambda visible_until, **head: None)


class Samples(NamedTuple):
    """Token sequences and where their responses begin."""

    tokens: list[np.ndarray]
    start: list[int]

    def pack(self, **options) -> Packed:
        return pack(self.tokens, response_start=self.start, **options)

    def repeated(self, length: int) -> TokenForest:
        """Each sequence as a row of its own, padded to `length`: nothing is shared."""
        size = np.array([len(t) for t in self.tokens])[:, None]
        column = np.broadcast_to(np.arange(length), (len(size), length))
        token = np.stack([np.pad(t, (0, length - len(t))) for t in self.tokens])
        inside = column < size
        return TokenForest(
            *(
                jnp.asarray(np.where(inside, x, padding), jnp.int32)
                for x, padding in ((token, 0), (column, 0), (column - 1, -1), (np.broadcast_to(size, token.shape), 0))
            )
        )

    def response(self, response_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(column i64[N, R] of each response token in its repeated row, mask b[N, R])."""
        at = np.array(self.start)[:, None] + np.arange(response_length)[None, :]
        mask = at < np.array([len(t) for t in self.tokens])[:, None]
        return np.where(mask, at, 1), mask


def ragged_groups(seed: int, groups, *, vocab: int = 17) -> Samples:
    """Groups of (prompt length, response lengths)."""
    rng = np.random.default_rng(seed)
    tokens, start = [], []
    for prompt, responses in groups:
        shared = rng.integers(0, vocab, prompt)
        for size in responses:
            tokens.append(np.concatenate([shared, rng.integers(0, vocab, size)]))
            start.append(prompt)
    return Samples(tokens, start)


def tree(seed: int, sizes, fan: int, *, vocab: int = 17) -> Samples:
    """Every path of a tree whose nodes at depth d hold about sizes[d] tokens and have `fan` children."""
    rng = np.random.default_rng(seed)

    def grow(depth):
        if depth == len(sizes):
            return [np.zeros(0, int)]
        stems = [rng.integers(0, vocab, rng.integers(1, sizes[depth] + 1)) for _ in range(fan if depth else 1)]
        return [np.concatenate([stem, path]) for stem in stems for path in grow(depth + 1)]

    tokens = grow(0)
    return Samples(tokens, [1 + i % 2 for i in range(len(tokens))])
