"""ModelConfig: what it refuses, and how a config.json of each family and style is read."""

import dataclasses

import pytest

from rlalign.models.config import ModelConfig, RopeScaling
from rlalign.models.families import from_hugging_face

GOOD = {
    "vocab_size": 64,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "mlp_width": 48,
    "max_positions": 128,
    "tied_head": False,
}

BAD_CONFIG = {
    "kv_heads": (3, r"ModelConfig\.kv_heads=3 does not divide heads=4: .* choose a divisor"),
    "head_width": (7, r"ModelConfig\.head_width=7 is odd: .* choose an even number"),
    "vocab_size": (0, r"ModelConfig\.vocab_size=0 must be a positive int"),
    "width": (-1, r"ModelConfig\.width=-1 must be a positive int"),
    "layers": (2.0, r"ModelConfig\.layers=2\.0 must be a positive int"),
    "heads": (True, r"ModelConfig\.heads=True must be a positive int"),
    "mlp_width": (0, r"ModelConfig\.mlp_width=0 must be a positive int"),
    "max_positions": (None, r"ModelConfig\.max_positions=None must be a positive int"),
    "rope_theta": (1.0, r"ModelConfig\.rope_theta=1\.0 must be a finite number > 1, such as 10000\.0"),
    "norm_eps": (0.0, r"ModelConfig\.norm_eps=0\.0 must be a finite number > 0"),
    "rope_scaling": ({"factor": 2}, r"ModelConfig\.rope_scaling=\{'factor': 2\} must be None or a RopeScaling"),
    "local_rope_theta": (1e4, "full_layers and local_rope_theta go with a window: set window, or drop them"),
    "rotary_width": (10, r"ModelConfig\.rotary_width=10 is not in 2 \.\.\. head_width=8: .* None for all"),
    "norm": ("batch", r"ModelConfig\.norm='batch' is not known; choose one of 'rms', 'rms_plus_one', 'layer'"),
    "activation": ("relu", r"ModelConfig\.activation='relu' is not known; choose one of 'silu', 'gelu', 'gelu_tanh'"),
    "attention_softcap": (0.0, r"ModelConfig\.attention_softcap=0\.0 must be a finite number > 0"),
    "window": (0, r"ModelConfig\.window=0 must be a positive int"),
    "full_layers": ((1,), "full_layers and local_rope_theta go with a window"),
    "remat": ("all", r"ModelConfig\.remat='all' is not known; choose one of 'none', 'products', 'full'"),
    "dtype": ("float16", r"ModelConfig\.dtype='float16' is not known; choose one of 'float32', 'bfloat16', 'float64'"),
}


@pytest.mark.parametrize("field", BAD_CONFIG)
def test_bad_model_config(field):
    value, message = BAD_CONFIG[field]
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**GOOD, field: value})


LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_positions": 32}
YARN = {"kind": "yarn", "factor": 8.0, "original_max_positions": 32}
BAD_SCALING = [
    (
        {**YARN, "kind": "dynamic"},
        r"RopeScaling\.kind='dynamic' is not known; choose one of 'linear', 'llama3', 'yarn'",
    ),
    ({**YARN, "factor": 0.5}, r"RopeScaling\.factor=0\.5 must be a finite number >= 1"),
    ({**YARN, "factor": float("inf")}, r"RopeScaling\.factor=inf must be"),
    ({**YARN, "factor": "4"}, r"RopeScaling\.factor='4' must be"),
    ({"kind": "llama3", "factor": 8.0}, r"RopeScaling\.original_max_positions=None must be a finite number > 0"),
    ({**LLAMA3, "low_freq_factor": 0.0}, r"RopeScaling\.low_freq_factor=0\.0 must be a finite number > 0"),
    ({**LLAMA3, "low_freq_factor": 4.0}, r"RopeScaling\.low_freq_factor=4\.0 must be below high_freq_factor=4\.0"),
    ({**YARN, "beta_fast": 0.5}, r"RopeScaling\.beta_slow=1\.0 must be below beta_fast=0\.5: exchange or correct them"),
    ({**YARN, "attention_factor": -1.0}, r"RopeScaling\.attention_factor=-1\.0 must be a finite number > 0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_SCALING)
def test_bad_rope_scaling(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)


def test_configs_are_values():
    config = ModelConfig(**GOOD, rope_scaling=RopeScaling(**YARN))
    assert config == dataclasses.replace(config)
    assert len({config, dataclasses.replace(config)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3  # pyright: ignore[reportAttributeAccessIssue]


def hugging_face(family="llama", **changes):
    """A config.json; None as a change stays null, `...` drops the key."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}
    names |= {"gemma3_text": "Gemma3", "gpt_neox": "GPTNeoX"}
    base = {
        "model_type": family,
        "architectures": [f"{names.get(family, family)}ForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


PLAIN = ModelConfig(**GOOD, norm_eps=1e-5)

GEMMA = {
    "norm": "rms_plus_one",
    "post_norms": True,
    "activation": "gelu_tanh",
    "embedding_scale": 32**0.5,
    "head_width": 256,
    "tied_head": True,
    "max_positions": 8192,
}
NEOX = {
    "norm": "layer",
    "parallel": True,
    "activation": "gelu",
    "gated_mlp": False,
    "kv_heads": 4,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}

READ = {
    "llama": (hugging_face(), {}),
    "llama with biases": (
        hugging_face(attention_bias=True, mlp_bias=True),
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    ),
    "multi-head attention": (hugging_face(num_key_value_heads=...), {"kv_heads": 4}),
    "explicit head width": (hugging_face(head_dim=16), {"head_width": 16}),
    "null head width": (hugging_face(head_dim=None), {}),
    "defaults": (
        hugging_face(max_position_embeddings=..., rms_norm_eps=..., hidden_act=..., tie_word_embeddings=...),
        {"max_positions": 2048, "norm_eps": 1e-6},
    ),
    "model_type alone": (hugging_face(architectures=...), {}),
    "architectures alone": (hugging_face(model_type=...), {}),
    "SiLU by its other name": (hugging_face(hidden_act="swish"), {}),
    "tied": (hugging_face(tie_word_embeddings=True), {"tied_head": True}),
    "dtype": (hugging_face(dtype="bfloat16"), {"dtype": "bfloat16"}),
    "torch_dtype": (hugging_face(torch_dtype="torch.bfloat16"), {"dtype": "bfloat16"}),
    "mistral": (hugging_face("mistral"), {}),
    "mistral has no biases to switch on": (hugging_face("mistral", attention_bias=True), {}),
    "mistral with a window": (hugging_face("mistral", sliding_window=64), {"window": 64}),
    "mistral's own window": (
        hugging_face("mistral", sliding_window=..., max_position_embeddings=8192),
        {"window": 4096, "max_positions": 8192},
    ),
    "qwen2 with a window from a layer on": (
        hugging_face("qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=1),
        {"qkv_bias": True, "window": 64, "full_layers": (0,)},
    ),
    "qwen3 with a window by name": (
        hugging_face("qwen3", head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"]),
        {"qk_norm": True, "window": 64, "full_layers": (1,)},
    ),
    "gemma2, what it may leave out": (
        hugging_face("gemma2", sliding_window=..., max_position_embeddings=..., tie_word_embeddings=..., head_dim=...),
        {**GEMMA, "window": 4096, "full_layers": (1,), "attention_softcap": 50.0, "logit_softcap": 30.0},
    ),
    "gemma2 without caps": (
        hugging_face("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=144),
        {**GEMMA, "max_positions": 128, "tied_head": False, "attention_scale": 1 / 12},
    ),
    "gemma3, old style": (
        hugging_face(
            "gemma3_text", sliding_window=16, num_hidden_layers=7, rope_scaling={"type": "linear", "factor": 8}
        ),
        {
            **GEMMA,
            "max_positions": 128,
            "tied_head": False,
            "layers": 7,
            "qk_norm": True,
            "window": 16,
            "full_layers": (5,),
            "rope_theta": 1e6,
            "local_rope_theta": 1e4,
            "rope_scaling": RopeScaling("linear", 8, original_max_positions=128),
        },
    ),
    "gemma3, new style": (
        hugging_face(
            "gemma3_text",
            sliding_window=16,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        ),
        {
            **GEMMA,
            "max_positions": 128,
            "tied_head": False,
            "qk_norm": True,
            "window": 16,
            "full_layers": (0,),
            "rope_theta": 5e5,
            "local_rope_theta": 2e4,
        },
    ),
    "gpt_neox": (
        hugging_face("gpt_neox", num_key_value_heads=..., hidden_act=..., rotary_emb_base=5000),
        {**NEOX, "rotary_width": 2, "rope_theta": 5000.0},
    ),
    "gpt_neox, the other way": (
        hugging_face(
            "gpt_neox",
            num_key_value_heads=...,
            hidden_act="gelu_new",
            rotary_pct=1.0,
            use_parallel_residual=False,
            attention_bias=False,
            layer_norm_eps=1e-3,
        ),
        NEOX
        | {"activation": "gelu_tanh", "parallel": False, "qkv_bias": False, "output_bias": False, "norm_eps": 1e-3},
    ),
    "mistral with a window that hides nothing": (hugging_face("mistral", sliding_window=128), {}),
    "qwen2": (hugging_face("qwen2"), {"qkv_bias": True}),
    "qwen2 with a window switched off": (
        hugging_face("qwen2", sliding_window=16, use_sliding_window=False, max_window_layers=1),
        {"qkv_bias": True},
    ),
    "qwen2 with a window in no layer": (
        hugging_face("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=2),
        {"qkv_bias": True},
    ),
    "qwen2 with full layers by name": (
        hugging_face("qwen2", sliding_window=16, use_sliding_window=True, layer_types=["full_attention"] * 2),
        {"qkv_bias": True},
    ),
    "qwen3": (hugging_face("qwen3", head_dim=16), {"qk_norm": True, "head_width": 16}),
    "qwen3's own head width": (hugging_face("qwen3"), {"qk_norm": True, "head_width": 128}),
    "qwen3 with biases": (
        hugging_face("qwen3", head_dim=8, attention_bias=True),
        {"qk_norm": True, "qkv_bias": True, "output_bias": True},
    ),
    "rope_theta": (hugging_face(rope_theta=500000), {"rope_theta": 500000.0}),
    "rope_parameters": (
        hugging_face(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        {"rope_theta": 1e6},
    ),
    "linear, old style": (
        hugging_face(rope_theta=100.0, rope_scaling={"type": "linear", "factor": 2}),
        {"rope_theta": 100.0, "rope_scaling": RopeScaling("linear", 2, original_max_positions=128)},
    ),
    "llama3, old style": (
        hugging_face(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 64,
            }
        ),
        {"rope_scaling": RopeScaling("llama3", 8.0, high_freq_factor=3.0, original_max_positions=64)},
    ),
    "yarn, new style": (
        hugging_face(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16,
                "beta_slow": None,
                "attention_factor": 0.5,
                "truncate": False,
            }
        ),
        {
            "rope_theta": 1e6,
            "rope_scaling": RopeScaling(
                "yarn", 4.0, original_max_positions=32, beta_fast=16, attention_factor=0.5, truncate=False
            ),
        },
    ),
    "yarn, the original context beside it": (
        hugging_face(original_max_position_embeddings=16, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        {"rope_scaling": RopeScaling("yarn", 4.0, original_max_positions=16)},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_config_json(name):
    config, changes = READ[name]
    assert from_hugging_face(config) == dataclasses.replace(PLAIN, **changes)


def test_dtype_argument_wins():
    assert from_hugging_face(hugging_face(dtype="float16"), dtype="float32").dtype == "float32"
    with pytest.raises(ValueError, match=r"ModelConfig\.dtype='int8' is not known"):
        from_hugging_face(hugging_face(), dtype="int8")


READS = (
    "rlalign reads LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Gemma2ForCausalLM, "
    "Gemma3ForCausalLM, GPTNeoXForCausalLM and their ForSequenceClassification; use one of these"
)

REFUSED = [
    (hugging_face("gemma3", architectures=...), f"model_type 'gemma3' is not supported; {READS}"),
    (hugging_face("gemma3"), f"architecture 'gemma3ForCausalLM' is not supported; {READS}"),
    (
        hugging_face(architectures=["LlamaForTokenClassification"]),
        f"architecture 'LlamaForTokenClassification' is not supported; {READS}",
    ),
    (
        hugging_face(architectures=["LlamaForSequenceClassification"]),
        "a classifier of 2 classes is no reward model, which gives one number: use another checkpoint, or write",
    ),
    (
        hugging_face(architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b", "2": "c"}),
        "a classifier of 3 classes is no reward model",
    ),
    (hugging_face(architectures=["Qwen2ForCausalLM"]), r"model_type 'llama' and architectures \['Qwen2For.* disagree"),
    (hugging_face(model_type=..., architectures=...), f"has neither 'model_type' nor 'architectures'; {READS}"),
    (
        hugging_face(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
        r"'auto_map' \{.*modeling_x.*\} asks for code that comes with the checkpoint, which rlalign never runs; .*",
    ),
    (
        hugging_face(quantization_config={"quant_method": "gptq"}),
        r"'quantization_config' \(gptq\): quantized weights cannot be trained; use the unquantized checkpoint",
    ),
    (hugging_face(hidden_act="relu"), "hidden_act 'relu' is not supported; choose one of silu, swish, gelu, gelu_p"),
    (hugging_face(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not supported"),
    (
        hugging_face(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "partial_rotary_factor 0.5 is not supported",
    ),
    (
        hugging_face("qwen3", layer_types=["full_attention", "linear_attention"]),
        "layer_types has 'linear_attention'; 'full_attention' and 'sliding_attention' are known",
    ),
    (hugging_face("qwen3", layer_types=["full_attention"]), "1 layer_types for 2 layers; correct one"),
    (
        hugging_face("gemma2", use_bidirectional_attention=True),
        "use_bidirectional_attention is not supported: a forest's tokens see what is before",
    ),
    (hugging_face("gemma2", attention_bias=True), "attention_bias is not supported for Gemma"),
    (
        hugging_face("gemma3_text", rope_parameters={"sliding_attention": {"rope_type": "yarn"}}),
        "rope type 'yarn' of sliding_attention is not supported",
    ),
    (
        hugging_face(rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope type 'dynamic' is not supported; rlalign reads 'default', 'linear', 'llama3', 'yarn': use .*, or remove "
        "the scaling if no sequence will be longer than 128",
    ),
    (
        hugging_face(rope_parameters={"rope_type": "longrope", "factor": 2.0}),
        "rope type 'longrope' is not supported; .*: use a checkpoint with one of these$",
    ),
    (hugging_face(rope_scaling={"type": "linear"}), "rope type 'linear' has no 'factor'; take it from"),
    (
        hugging_face(rope_scaling={"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}),
        "rope type 'llama3' has no 'high_freq_factor'; take it from",
    ),
    (
        hugging_face(rope_parameters={"full_attention": {"rope_type": "default"}}),
        r"rotary settings by layer type \['full_attention'\] are not supported",
    ),
    (hugging_face(hidden_size=...), "config.json has no 'hidden_size'; it is needed"),
    (hugging_face(vocab_size="64"), "vocab_size '64' must be a positive integer"),
    (hugging_face(num_attention_heads=0), "num_attention_heads 0 must be a positive integer"),
    (
        hugging_face(num_attention_heads=3, num_key_value_heads=3),
        "hidden_size 32 is no multiple of num_attention_heads 3, and there is no head_dim; add head_dim",
    ),
    (hugging_face(num_key_value_heads=3), r"ModelConfig\.kv_heads=3 does not divide heads=4"),
    (hugging_face(dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn' is not supported; pass dtype='float32'"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(config, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face(config)
