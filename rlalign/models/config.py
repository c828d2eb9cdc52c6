"""What a decoder is, as plain data. families.py reads it from a Hugging Face config.json."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

RopeKind = Literal["linear", "llama3", "yarn"]
Norm = Literal["rms", "rms_plus_one", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
Remat = Literal["none", "products", "full"]
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of pre-training; `rope.py` has the formulas.

    Args:
      kind: "linear", "llama3" or "yarn".
      factor: how many times longer the context becomes, >= 1.
      low_freq_factor: llama3; wavelengths above original_max_positions / low_freq_factor are divided by `factor`.
      high_freq_factor: llama3; wavelengths below original_max_positions / high_freq_factor are kept.
      original_max_positions: llama3 and yarn; the context length of pre-training.
      beta_fast: yarn; dimensions that turn more often than this within the original context are kept.
      beta_slow: yarn; dimensions that turn less often than this are divided by `factor`.
      attention_factor: yarn; the scale of cosine and sine; None computes it from `factor` (and mscale).
      mscale: yarn; used together with mscale_all_dim where attention_factor is None.
      mscale_all_dim: see mscale.
      truncate: yarn; whether the ramp between kept and divided dimensions begins and ends at whole dimensions.

    Raises:
      ValueError: a value out of range, or one that the kind needs and is None.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check_choice("RopeScaling", "kind", self.kind, get_args(RopeKind))
        if not (_is_positive(self.factor) and self.factor >= 1):
            raise ValueError(
                f"RopeScaling.factor={self.factor!r} must be a finite number >= 1: the new context over the old"
            )
        if self.kind != "linear":
            _check_positive("RopeScaling", original_max_positions=self.original_max_positions)
        if self.kind == "llama3":
            _check_positive("RopeScaling", low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
            _check_order("low_freq_factor", self.low_freq_factor, "high_freq_factor", self.high_freq_factor)
        if self.kind == "yarn":
            _check_positive("RopeScaling", beta_slow=self.beta_slow, beta_fast=self.beta_fast)
            _check_order("beta_slow", self.beta_slow, "beta_fast", self.beta_fast)
            if self.attention_factor is not None:
                _check_positive("RopeScaling", attention_factor=self.attention_factor)


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank change of projections; `lora.py` has the formula.

    Args:
      rank: of the change.
      alpha: the change is scaled by alpha / rank.
      targets: projections of every layer: query, key, value, output, gate, up, down.

    Raises:
      ValueError: a value out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("query", "key", "value", "output", "gate", "up", "down")

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        _check_positive("LoraConfig", rank=self.rank, alpha=self.alpha)
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"LoraConfig.targets={self.targets!r} must name some of {', '.join(PROJECTIONS)}, each once"
            )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a pre-norm decoder with rotary positions and grouped-query attention.

    Args:
      vocab_size: V.
      width: W, of the residual stream.
      layers: number of blocks.
      heads: H, query heads.
      kv_heads: K, key/value heads; divides H, and query head h reads key/value head h // (H // K).
      head_width: D, even; H * D need not be W.
      mlp_width: F.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None for the plain frequencies.
      local_rope_theta: base in the layers with a window, without rope_scaling; None for rope_theta there too (Gemma 3).
      rotary_width: how many of a head's D are rotated, the first ones; None for all (GPT-NeoX: a quarter).
      norm: "rms" (scale x / rms(x)), "rms_plus_one" ((1 + scale) x / rms(x), Gemma) or "layer" (LayerNorm with a bias).
      norm_eps: added to the mean square, or to the variance, in every norm.
      post_norms: whether attention's and the MLP's outputs are normed before they are added (Gemma 2 and 3).
      parallel: whether attention and MLP read the same residual, x + attention(norm(x)) + mlp(norm'(x)) (GPT-NeoX).
      activation: of the MLP, "silu", "gelu" or "gelu_tanh" (its approximation by tanh).
      gated_mlp: down(act(gate) * up), or else down(act(up)).
      embedding_scale: what embeddings are multiplied with, rounded to the dtype (Gemma: the root of W).
      attention_scale: what q k is multiplied with; None for D ** -0.5.
      attention_softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
      logit_softcap: the same for logits; token_logprobs and sample apply it.
      window: tokens see only those less than this many positions before them; None for all.
      full_layers: layers that see everything in spite of the window, by index.
      tied_head: whether the head is the embedding, transposed.
      qkv_bias: a bias on the query, key and value projections.
      output_bias: a bias on attention's output projection.
      mlp_bias: a bias on the three projections of the MLP.
      qk_norm: a norm over each head's D query and key values, before the rotation (Qwen3, Gemma 3).
      max_positions: the longest context the model was made for.
      remat: what the backward pass recomputes, but never attention: "none", "products" (all but matrix products: less
        memory for few operations) or "full" (whole layers: least memory, a forward more).
      reward_head: whether it is a reward model: one number a token, reward/kernel f[W, 1], in place of a head over the
        vocabulary. See add_reward_head.
      dtype: of parameters and activations: "float32", "bfloat16" or "float64".
      lora: the adapter that parameters may hold; None for none. See add_lora.

    Raises:
      ValueError: a value out of range; the text names the field, the value and what is allowed.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    max_positions: int
    tied_head: bool
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    rotary_width: int | None = None
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    post_norms: bool = False
    parallel: bool = False
    activation: Activation = "silu"
    gated_mlp: bool = True
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    remat: Remat = "none"
    reward_head: bool = False
    dtype: str = "float32"
    lora: LoraConfig | None = None

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "max_positions"):
            _check_size(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise ValueError(
                f"ModelConfig.kv_heads={self.kv_heads} does not divide heads={self.heads}: each key/value head serves "
                "the same number of query heads; choose a divisor"
            )
        for name in ("head_width", "rotary_width"):
            if (getattr(self, name) or 0) % 2:
                value = getattr(self, name)
                raise ValueError(
                    f"ModelConfig.{name}={value} is odd: rotary embeddings turn pairs; choose an even number"
                )
        for name in ("rope_theta", "local_rope_theta"):
            theta = getattr(self, name)
            if not (_is_positive(theta) and theta > 1) and not (theta is None and name == "local_rope_theta"):
                raise ValueError(f"ModelConfig.{name}={theta!r} must be a finite number > 1, such as 10000.0")
        if self.rotary_width is not None and not 2 <= self.rotary_width <= self.head_width:
            raise ValueError(
                f"ModelConfig.rotary_width={self.rotary_width} is not in 2 ... head_width={self.head_width}: how many "
                "of a head's numbers are rotated; None for all"
            )
        self._check_window()
        _check_positive("ModelConfig", norm_eps=self.norm_eps, embedding_scale=self.embedding_scale)
        optional = ("attention_scale", "attention_softcap", "logit_softcap")
        _check_positive("ModelConfig", **{n: getattr(self, n) for n in optional if getattr(self, n) is not None})
        if not (self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling)):
            raise ValueError(f"ModelConfig.rope_scaling={self.rope_scaling!r} must be None or a RopeScaling")
        _check_choice("ModelConfig", "norm", self.norm, get_args(Norm))
        _check_choice("ModelConfig", "activation", self.activation, get_args(Activation))
        _check_choice("ModelConfig", "remat", self.remat, get_args(Remat))
        _check_choice("ModelConfig", "dtype", self.dtype, DTYPES)

    def _check_window(self):
        if self.window is not None:
            _check_size("window", self.window)
        elif self.full_layers or self.local_rope_theta is not None:
            raise ValueError("ModelConfig.full_layers and local_rope_theta go with a window: set window, or drop them")
        outside = [i for i in self.full_layers if not 0 <= i < self.layers]
        if outside:
            raise ValueError(f"ModelConfig.full_layers has {outside[0]}, there are layers 0 to {self.layers - 1}")


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"ModelConfig.{name}={value!r} must be a positive int")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _check_positive(owner: str, **fields: Any) -> None:
    for name, value in fields.items():
        if not _is_positive(value):
            raise ValueError(f"{owner}.{name}={value!r} must be a finite number > 0")


def _check_order(low: str, low_value: Any, high: str, high_value: Any) -> None:
    if low_value >= high_value:
        raise ValueError(f"RopeScaling.{low}={low_value} must be below {high}={high_value}: exchange or correct them")


def _check_choice(owner: str, name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}")
