"""Record what transformers' PyTorch models and rotary tables say, for test_pretrained.py and test_rope.py.

torch is not a dependency, so this runs in an environment of its own, from the repository's root:

    python3 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
    /tmp/torchenv/bin/python -m tests.models.record_logits

It writes fixtures/<case>.json: config.json, the seed and the shapes of the weights (see folders.py), two sequences of
tokens that share a prefix, and their float32 logits; and fixtures/frequencies.json.
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.folders import FIXTURES, weights, write_folder

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA = {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {
    **SHAPE,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 5,
    "tie_word_embeddings": True,
}
NEOX = {key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
NEOX |= {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu"}

# Both spellings of the rotary settings occur: rope_theta with rope_scaling, and rope_parameters.
CASES = {
    "llama_biases": {**LLAMA, "attention_bias": True, "mlp_bias": True, "rope_theta": 500.0},
    "llama_llama3": {
        **LLAMA,
        "head_dim": 16,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "llama_linear": {**LLAMA, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama_yarn": {**LLAMA, "head_dim": 16, "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, **YARN}},
    "mistral": {
        **SHAPE,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "qwen2": {
        **SHAPE,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 1,
        "rope_theta": 1000000.0,
    },
    "qwen3": {
        **SHAPE,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 16,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "mistral_window": {
        **SHAPE,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "head_dim": 16,
        "sliding_window": 5,
        "rope_theta": 1000.0,
    },
    "qwen3_window": {
        **SHAPE,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "rope_theta": 1000000.0,
    },
    "gemma2": {
        **GEMMA,
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "rope_theta": 10000.0,
    },
    "gemma3": {
        **GEMMA,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 4,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gpt_neox": {**NEOX, "rotary_pct": 0.25, "rotary_emb_base": 10000},
    "gpt_neox_in_turn": {
        **NEOX,
        "use_parallel_residual": False,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    },
}

LONG = {**LLAMA, "hidden_size": 512, "rope_theta": 500000.0, "max_position_embeddings": 131072}  # D = 128
LONG_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FREQUENCIES = {
    "plain": LONG,
    "linear": {**LONG, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {**LONG, "rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192}},
    "yarn": {**LONG, "rope_scaling": LONG_YARN},
    "yarn, ramp between dimensions": {**LONG, "rope_scaling": {**LONG_YARN, "truncate": False}},
    "yarn, other betas": {**LONG, "rope_scaling": {**LONG_YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
    "yarn, attention factor": {**LONG, "rope_scaling": {**LONG_YARN, "attention_factor": 0.75}},
    "yarn, mscale": {**LONG, "rope_scaling": {**LONG_YARN, "mscale": 1.5, "mscale_all_dim": 0.5}},
    "yarn, factor from the lengths": {**LONG, "rope_scaling": {**LONG_YARN, "factor": None}},
    "yarn, ramp over one dimension": {**LONG, "rope_scaling": {**LONG_YARN, "original_max_position_embeddings": 6}},
}
TOKENS = [
    [1, 17, 42, 9, 63, 30, 5, 28, 11, 50, 3, 3, 47, 22, 60, 8],
    [1, 17, 42, 9, 63, 30, 5, 28, 35, 0, 19, 58, 2, 41, 26, 13],
]


def record(name: str, config: dict, seed: int) -> dict:
    """The model of one case, loaded by transformers from the folder that the test will write too."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    elif config["model_type"] == "gpt_neox":  # in folders the head keeps its first name
        shapes["embed_out.weight"] = shapes.pop("lm_head.weight")
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), config, weights(seed, shapes))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)).logits
    rounded = [[[round(x, 6) for x in row] for row in sequence] for sequence in logits.tolist()]
    return {"config": config, "seed": seed, "shapes": shapes, "tokens": TOKENS, "logits": rounded}


def frequencies(config: dict) -> dict:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    rotary = model.model.rotary_emb
    return {"config": config, "frequencies": rotary.inv_freq.tolist(), "scale": float(rotary.attention_scaling)}


def main() -> None:
    FIXTURES.mkdir(exist_ok=True)
    for seed, (name, config) in enumerate(CASES.items()):
        (FIXTURES / f"{name}.json").write_text(json.dumps(record(name, config, seed)) + "\n", encoding="utf-8")
    tables = {name: frequencies(config) for name, config in FREQUENCIES.items()}
    (FIXTURES / "frequencies.json").write_text(json.dumps(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
