"""What a decoder is, as plain data, and how a Hugging Face config.json says it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

RopeKind = Literal["linear", "llama3", "yarn"]
Remat = Literal["none", "full"]
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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a pre-norm decoder with rotary positions, grouped-query attention and a gated SiLU MLP.

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
      norm_eps: added to the mean square in every RMSNorm.
      tied_head: whether the head is the embedding, transposed.
      qkv_bias: a bias on the query, key and value projections.
      output_bias: a bias on attention's output projection.
      mlp_bias: a bias on the three projections of the MLP.
      qk_norm: an RMSNorm over each head's D query and key values, before the rotation (Qwen3).
      max_positions: the longest context the model was made for.
      remat: what the backward pass recomputes: "none" or "full" (whole layers, but never their attention).
      dtype: of parameters and activations: "float32", "bfloat16" or "float64".

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
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    remat: Remat = "none"
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "max_positions"):
            _check_size(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise ValueError(
                f"ModelConfig.kv_heads={self.kv_heads} does not divide heads={self.heads}: each key/value head serves "
                "the same number of query heads; choose a divisor"
            )
        if self.head_width % 2:
            raise ValueError(
                f"ModelConfig.head_width={self.head_width} is odd: rotary embeddings turn pairs; choose an even number"
            )
        if not (_is_positive(self.rope_theta) and self.rope_theta > 1):
            raise ValueError(f"ModelConfig.rope_theta={self.rope_theta!r} must be a finite number > 1, such as 10000.0")
        _check_positive("ModelConfig", norm_eps=self.norm_eps)
        if not (self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling)):
            raise ValueError(f"ModelConfig.rope_scaling={self.rope_scaling!r} must be None or a RopeScaling")
        _check_choice("ModelConfig", "remat", self.remat, get_args(Remat))
        _check_choice("ModelConfig", "dtype", self.dtype, DTYPES)


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


# What a config.json may leave out, by family: the defaults of transformers' configuration classes where they differ
# or matter. A key that is present with the value null keeps its null.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ROPE_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
)
_SUPPORTED = f"rlalign reads {', '.join(_ARCHITECTURES)}; use a checkpoint of one of these"


def from_hugging_face(config: Mapping[str, Any], *, dtype: str | None = None) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json, for the families llama, mistral, qwen2 and qwen3.

    Rotary settings are read in both styles: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`.
    Whatever would change the mathematics and is not implemented is refused, never dropped.

    Args:
      config: the parsed config.json.
      dtype: "float32", "bfloat16" or "float64" in place of the file's dtype; None keeps it (float32 if it has none).

    Returns:
      ModelConfig.

    Raises:
      ValueError: an unknown architecture, custom code (`auto_map`), quantized weights, a sliding window that is in
        use, another activation than SiLU, an unknown kind of rotary scaling, or a missing key; named in the text.

    Source: transformers 5.23, models/{llama,mistral,qwen2,qwen3}/configuration_*.py.
    """
    family = _family(config)
    values = {**_FAMILIES[family], **config}
    _refuse_unsupported(values)
    _refuse_sliding_window(values, family)
    positions, kv_heads = _size(values, "max_position_embeddings"), values.get("num_key_value_heads")
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    attention_bias = family in ("llama", "qwen3") and bool(values.get("attention_bias"))
    return ModelConfig(
        vocab_size=_size(values, "vocab_size"),
        width=_size(values, "hidden_size"),
        layers=_size(values, "num_hidden_layers"),
        heads=_size(values, "num_attention_heads"),
        kv_heads=_size(values, "num_attention_heads") if kv_heads is None else kv_heads,
        head_width=_head_width(values),
        mlp_width=_size(values, "intermediate_size"),
        max_positions=positions,
        tied_head=bool(values.get("tie_word_embeddings", False)),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope, values.get("original_max_position_embeddings"), positions),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and bool(values.get("mlp_bias")),
        qk_norm=family == "qwen3",
        dtype=dtype or _dtype(values),
    )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if value is None:
        raise ValueError(f"config.json has no {key!r}; it is needed: take it from the model's card")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} {value!r} must be a positive integer; take it from the model's card")
    return value


def _head_width(config: Mapping[str, Any]) -> int:
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    if config.get("head_dim") is not None:
        return _size(config, "head_dim")
    if width % heads:
        raise ValueError(
            f"config.json: hidden_size {width} is no multiple of num_attention_heads {heads}, and there is no "
            "head_dim; add head_dim"
        )
    return width // heads


def _family(config: Mapping[str, Any]) -> str:
    """The key of _FAMILIES that model_type and architectures agree on."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or ()
    for name in architectures:
        if name not in _ARCHITECTURES:
            raise ValueError(f"config.json: architecture {name!r} is not supported; {_SUPPORTED}")
    families = {_ARCHITECTURES[name] for name in architectures} | ({model_type} if model_type is not None else set())
    if not families:
        raise ValueError(f"config.json has neither 'model_type' nor 'architectures'; {_SUPPORTED}")
    if model_type is not None and model_type not in _FAMILIES:
        raise ValueError(f"config.json: model_type {model_type!r} is not supported; {_SUPPORTED}")
    if len(families) > 1:
        raise ValueError(
            f"config.json: model_type {model_type!r} and architectures {list(architectures)} disagree; correct the "
            "wrong one"
        )
    return families.pop()


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("auto_map"):
        raise ValueError(
            f"config.json: 'auto_map' {config['auto_map']} asks for code that comes with the checkpoint, which rlalign "
            "never runs; if the model is a plain one of a supported family, remove the key"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unnamed")
        raise ValueError(
            f"config.json: 'quantization_config' ({method}): quantized weights cannot be trained; use the "
            "unquantized checkpoint"
        )
    # transformers knows SiLU by both names.
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; it must be 'silu'")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for factor in (config.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if factor not in (None, 1, 1.0):
            raise ValueError(
                f"config.json: partial_rotary_factor {factor} is not supported: all of a head is rotated; use a "
                "checkpoint with 1.0"
            )


def _refuse_sliding_window(config: Mapping[str, Any], family: str) -> None:
    """Refuse a window that hides any token of a context of max_position_embeddings."""
    window, positions = config.get("sliding_window"), _size(config, "max_position_embeddings")
    if family == "llama":
        return
    if family in ("qwen2", "qwen3"):
        layers = config.get("layer_types")
        for kind in layers or ():
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(f"config.json: layer_types has {kind!r}; only 'full_attention' is supported")
        if layers is None:
            used = config.get("use_sliding_window", False)
            used = used and config.get("max_window_layers", 28) < _size(config, "num_hidden_layers")
        else:
            used = "sliding_attention" in layers
        window = window if used else None
    if window is not None and window < positions:
        raise ValueError(
            f"config.json: sliding_window {window} is in use and shorter than max_position_embeddings {positions}; "
            "only full attention is supported: use a checkpoint without a window, or, if no sequence will be longer "
            f"than {window}, set max_position_embeddings to {window}"
        )


def _rope_scaling(rope: Mapping[str, Any], original: int | None, positions: int) -> RopeScaling | None:
    """RopeScaling from the dict under rope_scaling or rope_parameters; defaults as transformers fills them in."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"config.json: rotary settings by layer type {sorted(rope)} are not supported; {_SUPPORTED}")
    if kind == "default":
        return None
    if kind not in get_args(RopeKind):
        raise ValueError(
            f"config.json: rope type {kind!r} is not supported; rlalign reads 'default', "
            f"{', '.join(map(repr, get_args(RopeKind)))}: use a checkpoint with one of these"
            # Up to max_position_embeddings dynamic scaling leaves the frequencies alone.
            + (f", or remove the scaling if no sequence will be longer than {positions}" if kind == "dynamic" else "")
        )
    original = int(original or rope.get("original_max_position_embeddings") or positions)
    if kind == "yarn" and rope.get("factor") is None:
        rope = {**rope, "factor": positions / original}
    for key in ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",):
        if rope.get(key) is None:
            raise ValueError(f"config.json: rope type {kind!r} has no {key!r}; take it from the model's card")
    given = {name: rope[name] for name in _ROPE_NUMBERS if rope.get(name) is not None}
    return RopeScaling(kind=kind, original_max_positions=original, **given)


def _dtype(config: Mapping[str, Any]) -> str:
    """The file's dtype: `dtype` in transformers 5, `torch_dtype` before."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"config.json: dtype {name!r} is not supported; pass dtype='float32' or dtype='bfloat16' to convert"
        )
    return name
