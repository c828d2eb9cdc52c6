"""A decoder and its parameters as a Hugging Face folder, tensor by tensor, which transformers loads."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from rlalign import hosts
from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Decoder
from rlalign.models.families import FAMILIES, Family, from_hugging_face
from rlalign.models.leaves import leaves, stored_shape, tensor_names, to_stored
from rlalign.types import Params

SHARD_BYTES = 5 * 10**9  # of a weight file, as transformers cuts them
_CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_ROPE = {  # what a kind of RopeScaling has beside the original context
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def save_pretrained(
    folder: str | Path,
    decoder: Decoder,
    params: Params,
    *,
    source: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that load_pretrained and transformers' from_pretrained read; of several processes the first does.

    Args:
      folder: made if it is not there; must hold no weights yet.
      decoder: the model.
      params: its parameters; sharded ones are fetched layer by layer.
      source: the folder that the model came from: its config.json, tokenizer and other files are copied. None writes a
        config.json of the family that has this shape.
      shard_bytes: the most bytes of a weight file; host memory holds one file at a time.

    A reward model becomes the family's sequence classifier. For more than one sequence at a time transformers wants a
    pad_token_id in its config.json, and reads the reward at the last other token: choose one that ends no answer.

    Raises:
      FileExistsError: the folder holds weights.
      ValueError: a config that no family has, or that is not the source's, with the fields that differ; an adapter.
    """
    if "lora" in params or decoder.config.lora is not None:
        raise ValueError("the parameters hold an adapter, which a folder has no place for: merge_lora(decoder, params)")
    folder = Path(folder)
    if hosts.agree(folder.is_dir() and any(path.name.endswith(_WEIGHTS) for path in folder.iterdir())):
        raise FileExistsError(f"{folder} holds weights already; choose another folder, or remove them")
    config = decoder.config
    if source is None:
        text = to_hugging_face(config)
    else:
        text = json.loads((Path(source) / _CONFIG).read_text(encoding="utf-8"))
        text = {key: value for key, value in text.items() if key != "torch_dtype"} | {"dtype": config.dtype}
        text |= _classes(config, FAMILIES[text["model_type"]])  # a reward model may come from a language model
        _check_same(config, from_hugging_face(text), f"{Path(source) / _CONFIG} is of another model")
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, config, params, shard_bytes)
    if not hosts.first():
        hosts.wait_for_all("export")
        return
    (folder / _CONFIG).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    for path in () if source is None else sorted(Path(source).iterdir()):
        text_file = path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt")
        if text_file and path.name != _CONFIG and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    hosts.wait_for_all("export")


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the family of FAMILIES that has this shape: from_hugging_face's inverse.

    Raises:
      ValueError: no family has it, with the fields that its nearest one cannot express.
    """
    name = _family(config)
    c = config
    text: dict[str, Any] = {
        **_classes(config, FAMILIES[name]),
        "model_type": name,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tied_head,
        "dtype": c.dtype,
        **(_neox(c) if name == "gpt_neox" else _rms(c, name)),
    }
    _check_same(config, from_hugging_face(text), f"no family of transformers has this model; {name} is the nearest")
    return text


def _classes(config: ModelConfig, family: Family) -> dict[str, Any]:
    if not config.reward_head:
        return {"architectures": [family.architecture]}
    return {"architectures": [family.classifier], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _family(c: ModelConfig) -> str:
    if c.norm == "layer":
        return "gpt_neox"
    if c.norm == "rms_plus_one":
        return "gemma3_text" if c.qk_norm else "gemma2"
    if c.qk_norm:
        return "qwen3"
    if c.qkv_bias and not c.output_bias:
        return "qwen2"
    return "llama" if c.window is None else "mistral"


def _rms(c: ModelConfig, name: str) -> dict[str, Any]:
    gemma, act = c.norm == "rms_plus_one", _ACTIVATIONS[c.activation]
    local = c.window is not None
    kinds = ["sliding_attention" if local and i not in c.full_layers else "full_attention" for i in range(c.layers)]
    text = {
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "rms_norm_eps": c.norm_eps,
        "hidden_activation" if gemma else "hidden_act": act,
        "attention_bias": name in ("llama", "qwen3") and c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "sliding_window": c.window,
        "rope_parameters": _rope(c),
    }
    if name in ("qwen2", "qwen3"):
        text |= {"use_sliding_window": local, "layer_types": kinds}
    if gemma:
        scalar = c.head_width if c.attention_scale is None else round(c.attention_scale**-2)
        text |= {"layer_types": kinds, "query_pre_attn_scalar": scalar}
        text |= {"attn_logit_softcapping": c.attention_softcap, "final_logit_softcapping": c.logit_softcap}
    if name == "gemma3_text":
        theta = c.rope_theta if c.local_rope_theta is None else c.local_rope_theta
        around = {"rope_type": "default", "rope_theta": theta}
        text["rope_parameters"] = {"full_attention": _rope(c), "sliding_attention": around}
    return text


def _neox(c: ModelConfig) -> dict[str, Any]:
    share = (c.rotary_width or c.head_width) / c.head_width
    return {
        "layer_norm_eps": c.norm_eps,
        "hidden_act": _ACTIVATIONS[c.activation],
        "use_parallel_residual": c.parallel,
        "attention_bias": c.qkv_bias,
        "rope_parameters": {**_rope(c), "partial_rotary_factor": share},
    }


def _rope(c: ModelConfig) -> dict[str, Any]:
    if c.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    scaling = dataclasses.asdict(c.rope_scaling)
    numbers = {key: scaling[key] for key in _ROPE[c.rope_scaling.kind] if scaling[key] is not None}
    if c.rope_scaling.kind != "linear":
        numbers["original_max_position_embeddings"] = c.rope_scaling.original_max_positions
    return {"rope_type": c.rope_scaling.kind, "rope_theta": c.rope_theta, **numbers}


def _check_same(config: ModelConfig, other: ModelConfig, message: str) -> None:
    """`remat` is no property of a model."""
    ours, theirs = (dataclasses.asdict(dataclasses.replace(c, remat="none")) for c in (config, other))
    differ = [f"{key}={ours[key]!r} (there {theirs[key]!r})" for key in ours if ours[key] != theirs[key]]
    if differ:
        raise ValueError(f"{message}: {', '.join(differ)}")


def _tensors(config: ModelConfig, params: Params) -> dict[str, list[tuple[str, int | None]]]:
    """Each tensor of the folder -> the leaves that it holds, and its layer."""
    found: dict[str, list] = {}
    for path, leaf in leaves(config).items():
        layered = "{}" in leaf.tensor
        for i, name in enumerate(tensor_names(leaf, config)):
            found.setdefault(name, []).append((path, i if layered else None))
    return found


def _value(params: Mapping[str, Any], path: str, layer: int | None) -> np.ndarray:
    value: Any = params
    for name in path.split("/"):
        value = value[name]
    return np.asarray(hosts.fetch(value if layer is None else value[layer]))


def _files(config: ModelConfig, found: Mapping[str, Any], shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each weight file, in order."""
    itemsize, names, size = jnp.dtype(config.dtype).itemsize, [], 0
    for name in found:
        leaf = leaves(config)[found[name][0][0]]
        more = int(np.prod(stored_shape(leaf, config))) * itemsize
        if names and size + more > shard_bytes:
            yield names
            names, size = [], 0
        names, size = [*names, name], size + more
    yield names


def _write_weights(folder: Path, config: ModelConfig, params: Params, shard_bytes: int) -> None:
    found, there = _tensors(config, params), leaves(config)
    files = list(_files(config, found, shard_bytes))
    index, total = {}, 0
    for number, names in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for name in names:
            parts = {there[path]: _value(params, path, layer) for path, layer in found[name]}
            tensors[name] = to_stored(parts, config)
            index[name], total = file, total + tensors[name].nbytes
        if hosts.first():
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1 and hosts.first():
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
