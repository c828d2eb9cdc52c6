"""How a Hugging Face config.json says what a decoder is, family by family."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from rlalign.models.config import DTYPES, ModelConfig, RopeKind, RopeScaling

Values = Mapping[str, Any]


class Family(NamedTuple):
    """One model_type.

    Attributes:
      architecture: its class in transformers.
      defaults: what a config.json may leave out, where transformers' default differs or matters; null stays null.
      fields: fields of ModelConfig beyond those that all families share, from the values of a config.json.
    """

    architecture: str
    defaults: dict[str, Any]
    fields: Callable[[Values], dict[str, Any]]

    @property
    def classifier(self) -> str:
        """Its class there with one number a sequence in place of logits: a reward model."""
        text = "Text" if self.architecture.startswith("Gemma3") else ""  # without it Gemma 3's is one of images too
        return self.architecture.replace("ForCausalLM", f"{text}ForSequenceClassification")


def _plain(values: Values) -> dict[str, Any]:
    return {
        "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "activation": _activation(values, "hidden_act", "silu"),
    }


def _llama(values: Values) -> dict[str, Any]:
    bias = bool(values.get("attention_bias"))
    return {**_plain(values), "qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(values.get("mlp_bias"))}


def _mistral(values: Values) -> dict[str, Any]:
    return {**_plain(values), **_window(values, [True] * _size(values, "num_hidden_layers"))}


def _qwen2(values: Values) -> dict[str, Any]:
    return {**_plain(values), "qkv_bias": True, **_window(values, _windowed_above(values))}


def _qwen3(values: Values) -> dict[str, Any]:
    bias = bool(values.get("attention_bias"))
    window = _window(values, _windowed_above(values))
    return {**_plain(values), "qk_norm": True, "qkv_bias": bias, "output_bias": bias, **window}


def _gemma2(values: Values) -> dict[str, Any]:
    if values.get("use_bidirectional_attention"):
        raise ValueError(
            "config.json: use_bidirectional_attention is not supported: a forest's tokens see what is before"
        )
    if values.get("attention_bias"):
        raise ValueError("config.json: attention_bias is not supported for Gemma; use a checkpoint without")
    scale = _size(values, "query_pre_attn_scalar")
    every = values.get("sliding_window_pattern") or 2
    windowed = [bool((i + 1) % every) for i in range(_size(values, "num_hidden_layers"))]
    return {
        "norm": "rms_plus_one",
        "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "post_norms": True,
        "activation": _activation(values, "hidden_activation", "gelu_pytorch_tanh"),
        "embedding_scale": _size(values, "hidden_size") ** 0.5,
        "attention_scale": None if scale == _head_width(values) else scale**-0.5,
        "attention_softcap": values.get("attn_logit_softcapping"),
        "logit_softcap": values.get("final_logit_softcapping"),
        **_window(values, _by_type(values) or windowed),
    }


def _gemma3(values: Values) -> dict[str, Any]:
    fields = _gemma2({"sliding_window_pattern": 6, **values})
    local = (values.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta = local.get("rope_theta") or values.get("rope_local_base_freq") or 10000.0
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"config.json: rope type {local['rope_type']!r} of sliding_attention is not supported")
    return {**fields, "qk_norm": True, **({"local_rope_theta": float(theta)} if fields["window"] else {})}


def _gpt_neox(values: Values) -> dict[str, Any]:
    rope = values.get("rope_parameters") or {}
    share = float(rope.get("partial_rotary_factor", values.get("rotary_pct", 0.25)))
    bias, rotary = bool(values.get("attention_bias", True)), int(_head_width(values) * share)
    return {
        "norm": "layer",
        "norm_eps": float(values.get("layer_norm_eps", 1e-5)),
        "parallel": bool(values.get("use_parallel_residual", True)),
        "activation": _activation(values, "hidden_act", "gelu"),
        "gated_mlp": False,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": True,
        "rotary_width": None if rotary == _head_width(values) else rotary,
    }


_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_GEMMA |= {"query_pre_attn_scalar": 256, "sliding_window": 4096}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}, _llama),
    "mistral": Family(
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        _mistral,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        _qwen2,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
        _qwen3,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**_GEMMA, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _gemma2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**_GEMMA, "max_position_embeddings": 131072, "rope_theta": 1000000.0},
        _gemma3,
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", {"max_position_embeddings": 2048}, _gpt_neox),
}
_ARCHITECTURES = {family.architecture: name for name, family in FAMILIES.items()}
_CLASSIFIERS = {family.classifier: name for name, family in FAMILIES.items()}
_CLASSES = _ARCHITECTURES | _CLASSIFIERS
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_ROPE_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
)
_SUPPORTED = f"rlalign reads {', '.join(_ARCHITECTURES)} and their ForSequenceClassification; use one of these"


def from_hugging_face(config: Values, *, dtype: str | None = None) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json of a family of FAMILIES.

    Rotary settings are read in both styles: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`.
    Whatever would change the mathematics and is not implemented is refused, never dropped.

    Args:
      config: the parsed config.json.
      dtype: "float32", "bfloat16" or "float64" in place of the file's dtype; None keeps it (float32 if it has none).

    Returns:
      ModelConfig. A window that hides no token of max_position_embeddings is left out.

    Raises:
      ValueError: an unknown architecture, custom code (`auto_map`), quantized weights, an unknown activation or kind of
        rotary scaling, attention that is not causal, or a missing key; named in the text.

    Source: transformers 5.23, models/{llama,mistral,qwen2,qwen3,gemma2,gemma3,gpt_neox}/configuration_*.py.
    """
    name = _family(config)
    family = FAMILIES[name]
    values = {**family.defaults, **config}
    _refuse_unsupported(values, name)
    positions, kv_heads = _size(values, "max_position_embeddings"), values.get("num_key_value_heads")
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if name == "gemma3_text":
        rope = rope.get("full_attention", {} if "sliding_attention" in rope else rope)
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
        rope_theta=float(
            rope.get("rope_theta") or values.get("rotary_emb_base") or values.get("rope_theta") or 10000.0
        ),
        rope_scaling=_rope_scaling(rope, values.get("original_max_position_embeddings"), positions),
        reward_head=_is_reward_model(config),
        dtype=dtype or _dtype(values),
        **family.fields(values),
    )


def _activation(values: Values, key: str, default: str) -> str:
    name = values.get(key) or default
    if name not in _ACTIVATIONS:
        raise ValueError(f"config.json: {key} {name!r} is not supported; choose one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _by_type(values: Values) -> list[bool] | None:
    """Which layers have a window, where config.json says it layer by layer."""
    types = values.get("layer_types")
    for kind in types or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"config.json: layer_types has {kind!r}; 'full_attention' and 'sliding_attention' are known"
            )
    if types and len(types) != _size(values, "num_hidden_layers"):
        raise ValueError(f"config.json: {len(types)} layer_types for {values['num_hidden_layers']} layers; correct one")
    return [kind == "sliding_attention" for kind in types] if types else None


def _windowed_above(values: Values) -> list[bool]:
    """Qwen's rule: layers from max_window_layers on, where the window is in use."""
    layers, used = _size(values, "num_hidden_layers"), bool(values.get("use_sliding_window", False))
    by_type = _by_type(values)
    return [used and i >= values.get("max_window_layers", 28) for i in range(layers)] if by_type is None else by_type


def _window(values: Values, windowed: list[bool]) -> dict[str, Any]:
    """window and full_layers; a window that hides nothing is none."""
    window = values.get("sliding_window")
    if window is None or not any(windowed) or window >= _size(values, "max_position_embeddings"):
        return {"window": None}
    return {"window": window, "full_layers": tuple(i for i, cut in enumerate(windowed) if not cut)}


def _size(config: Values, key: str) -> int:
    value = config.get(key)
    if value is None:
        raise ValueError(f"config.json has no {key!r}; it is needed: take it from the model's card")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} {value!r} must be a positive integer; take it from the model's card")
    return value


def _head_width(config: Values) -> int:
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    if config.get("head_dim") is not None:
        return _size(config, "head_dim")
    if width % heads:
        raise ValueError(
            f"config.json: hidden_size {width} is no multiple of num_attention_heads {heads}, and there is no "
            "head_dim; add head_dim"
        )
    return width // heads


def _family(config: Values) -> str:
    """The key of FAMILIES that model_type and architectures agree on."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or ()
    for name in architectures:
        if name not in _CLASSES:
            raise ValueError(f"config.json: architecture {name!r} is not supported; {_SUPPORTED}")
    families = {_CLASSES[name] for name in architectures} | ({model_type} if model_type is not None else set())
    if not families:
        raise ValueError(f"config.json has neither 'model_type' nor 'architectures'; {_SUPPORTED}")
    if model_type is not None and model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type {model_type!r} is not supported; {_SUPPORTED}")
    if len(families) > 1:
        raise ValueError(
            f"config.json: model_type {model_type!r} and architectures {list(architectures)} disagree; correct the "
            "wrong one"
        )
    return families.pop()


def _is_reward_model(config: Values) -> bool:
    """Whether it is a sequence classifier of one class, whose number is a reward."""
    if not set(config.get("architectures") or ()) & set(_CLASSIFIERS):
        return False
    labels = config.get("num_labels", len(config.get("id2label") or "12"))  # transformers' own default is two
    if labels != 1:
        raise ValueError(
            f"config.json: a classifier of {labels} classes is no reward model, which gives one number: use another "
            'checkpoint, or write "id2label": {"0": "LABEL_0"} if it has one class'
        )
    return True


def _refuse_unsupported(config: Values, family: str) -> None:
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
    if family == "gpt_neox":
        return
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for factor in (config.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if factor not in (None, 1, 1.0):
            raise ValueError(
                f"config.json: partial_rotary_factor {factor} is not supported: all of a head is rotated; use a "
                "checkpoint with 1.0"
            )


def _rope_scaling(rope: Values, original: int | None, positions: int) -> RopeScaling | None:
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


def _dtype(config: Values) -> str:
    """The file's dtype: `dtype` in transformers 5, `torch_dtype` before."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"config.json: dtype {name!r} is not supported; pass dtype='float32' or dtype='bfloat16' to convert"
        )
    return name
