"""The one model: a pre-norm decoder in Flax linen, layers stacked and scanned, configured by data.

What differs between training, prefill and decoding is only how a layer attends, so `attend` is an argument:

    attend(layer, q, k, v, cache) -> (out, cache)

Training closes over a forest's mask and carries no cache; the sampler writes and reads its caches. All else acts on
each token by itself, which is why a shared prefix may be stored once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlalign.checks import expect
from rlalign.models.config import ModelConfig
from rlalign.models.rope import inverse_frequencies, rotate
from rlalign.types import Params, TokenForest
from rlalign_kernels import attention_plan, decode_attention, forest_attention

Attend = Callable[[Any, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
AttentionFn = Callable[..., jax.Array]

FIXED = 0.02  # deviation of new matrices
INITIAL_KERNEL = nn.initializers.normal(FIXED)
ACTIVATIONS = {"silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=False), "gelu_tanh": nn.gelu}
KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
KEPT = {  # ModelConfig.remat -> what the backward finds in memory
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, KEEP_ATTENTION
    ),
    "full": KEEP_ATTENTION,
}


class Norm(nn.Module):
    """A norm of ModelConfig.norm over the last axis, in float32 or wider."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind, dtype, size = self.config.norm, jnp.dtype(self.config.dtype), (x.shape[-1],)
        start = nn.initializers.zeros if kind == "rms_plus_one" else nn.initializers.ones
        scale = jnp.expand_dims(self.param("scale", start, size, dtype), range(x.ndim - 1))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if kind == "layer":
            bias = jnp.expand_dims(self.param("bias", nn.initializers.zeros, size, dtype), range(x.ndim - 1))
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.config.norm_eps)
        # Each family rounds where its training did.
        if kind == "rms":
            return wide.astype(x.dtype) * scale
        if kind == "rms_plus_one":
            return (wide * (1 + scale.astype(wide.dtype))).astype(x.dtype)
        return (wide * scale.astype(wide.dtype) + bias.astype(wide.dtype)).astype(x.dtype)


class Projection(nn.DenseGeneral):
    """A dense layer, and the low-rank change of its kernel where the parameters hold one (lora.py)."""

    change: float = 1.0

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        out = super().__call__(inputs)
        if not self.has_variable("lora", "a"):
            return out
        a, b = (self.get_variable("lora", name).astype(inputs.dtype) for name in ("a", "b"))
        return out + self.change * jnp.tensordot(jnp.tensordot(inputs, a, a.ndim - 1), b, 1)


def _project(config: ModelConfig, name: str, features, *, bias: bool, axis: Any = -1) -> Projection:
    dtype = jnp.dtype(config.dtype)
    return Projection(
        features,
        axis=axis,
        use_bias=bias,
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=INITIAL_KERNEL,
        name=name,
        change=1.0 if config.lora is None else config.lora.scale,
    )


def _rotated(config: ModelConfig, layer, x: jax.Array, position: jax.Array) -> jax.Array:
    """x f[n, h, D] turned; layers with a window may turn at a pace of their own."""
    frequencies, scale = inverse_frequencies(config)
    if config.local_rope_theta is not None:
        local, _ = inverse_frequencies(config, local=True)
        # The scale of cosine and sine is yarn's, which no model combines with windows of their own pace.
        frequencies = jnp.where(jnp.isin(layer, jnp.array(config.full_layers, jnp.int32)), frequencies, local)
    turned, kept = jnp.split(x, [2 * frequencies.shape[0]], axis=-1)
    return jnp.concatenate([rotate(turned, position, frequencies, scale), kept], axis=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: x f[n, W] and position i32[...] of n tokens in all.

    `attend`, the part that looks at other tokens, sees q, k and v as [*position.shape, heads, D].
    """

    config: ModelConfig
    attend: Attend

    @nn.compact
    def __call__(self, x, layer, cache, position):
        c = self.config
        q = _project(c, "query", (c.heads, c.head_width), bias=c.qkv_bias)(x)
        k = _project(c, "key", (c.kv_heads, c.head_width), bias=c.qkv_bias)(x)
        v = _project(c, "value", (c.kv_heads, c.head_width), bias=c.qkv_bias)(x)
        if c.qk_norm:
            q, k = Norm(c, name="query_norm")(q), Norm(c, name="key_norm")(k)
        q, k = (_rotated(c, layer, x, position.reshape(-1)) for x in (q, k))
        q, k, v = (x.reshape(*position.shape, *x.shape[1:]) for x in (q, k, v))
        out, cache = self.attend(layer, q, k, v, cache)
        out = out.reshape(-1, c.heads, c.head_width)
        return _project(c, "output", c.width, bias=c.output_bias, axis=(-2, -1))(out), cache


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c, act = self.config, ACTIVATIONS[self.config.activation]
        up = _project(c, "up", c.mlp_width, bias=c.mlp_bias)(x)
        hidden = act(_project(c, "gate", c.mlp_width, bias=c.mlp_bias)(x)) * up if c.gated_mlp else act(up)
        return _project(c, "down", c.width, bias=c.mlp_bias)(hidden)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or both beside each other, or with norms behind them."""

    config: ModelConfig
    attend: Attend

    @nn.compact
    def __call__(self, carry, layer, position):
        x, cache = carry
        c = self.config
        normed = Norm(c, name="attention_norm")(x)
        attended, cache = Attention(c, self.attend, name="attention")(normed, layer, cache, position)
        if c.post_norms:
            attended = Norm(c, name="attention_post_norm")(attended)
        between = x if c.parallel else x + attended
        out = MLP(c, name="mlp")(Norm(c, name="mlp_norm")(between))
        if c.post_norms:
            out = Norm(c, name="mlp_post_norm")(out)
        return (x + attended + out if c.parallel else between + out, cache), None


class Stack(nn.Module):
    """Embedding, layers, final norm: tokens i32[...] to hidden states f[..., W].

    Tokens lie on one axis everywhere but in `attend`: CPUs multiply two-dimensional arrays faster.
    """

    config: ModelConfig
    attend: Attend

    @nn.compact
    def __call__(self, token, position, cache):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        embedding = self.param("embedding", INITIAL_KERNEL, (c.vocab_size, c.width), dtype)
        layer = Layer
        if c.remat != "none":
            layer = nn.remat(Layer, prevent_cse=False, policy=KEPT[c.remat])
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.layers,
        )
        x = embedding[token.reshape(-1)]
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, dtype)
        (x, cache), _ = scanned(c, self.attend, name="layers")((x, cache), jnp.arange(c.layers), position)
        if c.reward_head:
            self.param("reward", lambda key: {"kernel": INITIAL_KERNEL(key, (c.width, 1), dtype)})
        elif not c.tied_head:
            self.param("head", lambda key: {"kernel": INITIAL_KERNEL(key, (c.width, c.vocab_size), dtype)})
        x = Norm(c, name="final_norm")(x)
        return x.reshape(*token.shape, c.width), cache


def _by_fan_in(params: Params, config: ModelConfig) -> Params:
    """Matrices of deviation FIXED, scaled; see Decoder.init."""
    inputs = {"output": config.heads * config.head_width, "down": config.mlp_width}

    def scaled(path, x):
        *_, owner, name = ("", *(key.key for key in path))
        if name not in ("kernel", "embedding"):
            return x
        deviation = inputs.get(owner, config.width) ** -0.5 * ((2 * config.layers) ** -0.5 if owner in inputs else 1)
        return x * jnp.asarray(deviation / FIXED, x.dtype)

    return jax.tree_util.tree_map_with_path(scaled, params)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model as pure functions of its parameters.

    Args:
      config: shapes and options.
      attention: the attention operation, forest_attention or a form of it that is local to a device.
      plan: its tile lists from visible_until and the kind of heads, made once for all layers.
      decode: attention of the sampler, decode_attention or a form of it that is local to a device.

    >>> config = ModelConfig(vocab_size=11, width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=16,
    ...                      max_positions=32, tied_head=True)
    >>> decoder = Decoder(config)
    >>> params = decoder.init(0)
    >>> decoder.head(params).shape
    (8, 11)
    """

    config: ModelConfig
    attention: AttentionFn = forest_attention
    plan: Callable[..., Any] = attention_plan
    decode: AttentionFn = decode_attention

    def init(self, seed: int, *, deviation: Literal["fixed", "fan_in"] = "fixed") -> Params:
        """Random parameters from a seed: normal matrices, zero biases, unit norms; layers stacked on axis 0.

        Args:
          seed: of all of them.
          deviation: of the matrices. "fixed", 0.02, is what models of a width near 2500 are begun with (GPT-2);
            "fan_in", 1 / sqrt(inputs), and where a matrix writes to the residual stream 1 / sqrt(2 layers inputs), is
            close to that there, and fits narrow models too: from smaller matrices they learn to copy much later.

        Raises:
          ValueError: another deviation.
        """
        if deviation not in ("fixed", "fan_in"):
            raise ValueError(f"deviation={deviation!r} is not known; choose 'fixed' or 'fan_in'")
        token = jnp.zeros((1, 1), jnp.int32)
        forest = TokenForest(token, token, token - 1, token + 1)
        stack = Stack(self.config, self.attend(forest))
        params = stack.init(jax.random.key(seed), token, token, None)["params"]
        return params if deviation == "fixed" else _by_fan_in(params, self.config)

    def apply(self, params: Params, forest: TokenForest) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          params: what `init` or `load_pretrained` gave.
          forest: i32[B, T] each.

        Returns:
          f[B, T, W] in the config's dtype.
        """
        expect(
            token=(forest.token, "i[B, T]"),
            position=(forest.position, "i[B, T]"),
            visible_until=(forest.visible_until, "i[B, T]"),
        )
        return self.run(params, forest.token, forest.position, self.attend(forest), None)[0]

    def run(self, params: Params, token, position, attend: Attend, cache) -> tuple[jax.Array, Any]:
        """The same forward with another way to attend, for caches: token and position i32[...]."""
        params = dict(params)
        adapter = {"lora": params.pop("lora")} if "lora" in params else {}
        if adapter and self.config.lora is None:
            raise ValueError("params hold an adapter that this decoder does not know: use the decoder of add_lora")
        return Stack(self.config, attend).apply({"params": params, **adapter}, token, position, cache)

    def head(self, params: Params) -> jax.Array:
        """f[W, V]: hidden states times this are logits.

        Raises:
          ValueError: a reward model, which has none.
        """
        if self.config.reward_head:
            raise ValueError("a reward model has no head over the vocabulary, it cannot sample: see make_judge")
        return params["embedding"].T if self.config.tied_head else params["head"]["kernel"]

    def attend(self, forest: TokenForest) -> Attend:
        """Attention within a forest, for `run`; the tile lists are made here, once for all layers."""
        c = self.config
        head = {"group": c.heads // c.kv_heads, "width": c.head_width, "dtype": c.dtype}
        plan = self.plan(jnp.asarray(forest.visible_until), **head)
        everything = {"plan": plan, "scale": c.attention_scale, "softcap": c.attention_softcap}
        windowed = everything | {"window": c.window, "position": jnp.asarray(forest.position)}

        def attend(layer, q, k, v, cache):
            def over(options):
                return lambda: self.attention(q, k, v, forest.visible_until, **options)

            if c.window is None:
                out = over(everything)()
            elif not c.full_layers:
                out = over(windowed)()
            else:
                full = jnp.isin(layer, jnp.array(c.full_layers, jnp.int32))
                out = jax.lax.cond(full, over(everything), over(windowed))
            return out, cache

        return attend


def logits(decoder: Decoder, params: Params, forest: TokenForest) -> jax.Array:
    """f[B, T, V], the whole logits: for checks on small models only; training uses token_logprobs."""
    whole, cap = decoder.apply(params, forest) @ decoder.head(params), decoder.config.logit_softcap
    return whole if cap is None else cap * jnp.tanh(whole / cap)
