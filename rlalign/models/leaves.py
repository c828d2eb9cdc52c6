"""Where each leaf of the parameters lies in a Hugging Face folder: names, axes and conditions, as data."""

import math
from typing import NamedTuple

import numpy as np

from rlalign.models.config import ModelConfig


class Leaf(NamedTuple):
    """Where a leaf of the parameters comes from.

    Attributes:
      tensor: its name in the folder, {} standing for the layer.
      axes: stored axes -> axes of the leaf, in the letters of `sizes`; letters without a comma are one stored axis.
      when: the option of `options` that the leaf depends on; empty for always.
      part: which third of the stored axis 3 the leaf is, where three leaves are one tensor.
    """

    tensor: str
    axes: str
    when: str = ""
    part: int | None = None


# Linear weights are stored [out, in] and used [in, out]. Leaves under layers/ have the layers on axis 0.
_LLAMA: dict[str, Leaf] = {
    "embedding": Leaf("model.embed_tokens.weight", "V,W->VW"),
    "layers/attention_norm/scale": Leaf("model.layers.{}.input_layernorm.weight", "W->W"),
    "layers/attention/query/kernel": Leaf("model.layers.{}.self_attn.q_proj.weight", "HD,W->WHD"),
    "layers/attention/query/bias": Leaf("model.layers.{}.self_attn.q_proj.bias", "HD->HD", "qkv_bias"),
    "layers/attention/key/kernel": Leaf("model.layers.{}.self_attn.k_proj.weight", "KD,W->WKD"),
    "layers/attention/key/bias": Leaf("model.layers.{}.self_attn.k_proj.bias", "KD->KD", "qkv_bias"),
    "layers/attention/value/kernel": Leaf("model.layers.{}.self_attn.v_proj.weight", "KD,W->WKD"),
    "layers/attention/value/bias": Leaf("model.layers.{}.self_attn.v_proj.bias", "KD->KD", "qkv_bias"),
    "layers/attention/output/kernel": Leaf("model.layers.{}.self_attn.o_proj.weight", "W,HD->HDW"),
    "layers/attention/output/bias": Leaf("model.layers.{}.self_attn.o_proj.bias", "W->W", "output_bias"),
    "layers/attention/query_norm/scale": Leaf("model.layers.{}.self_attn.q_norm.weight", "D->D", "qk_norm"),
    "layers/attention/key_norm/scale": Leaf("model.layers.{}.self_attn.k_norm.weight", "D->D", "qk_norm"),
    "layers/mlp_norm/scale": Leaf("model.layers.{}.post_attention_layernorm.weight", "W->W"),
    "layers/mlp/gate/kernel": Leaf("model.layers.{}.mlp.gate_proj.weight", "F,W->WF", "gated_mlp"),
    "layers/mlp/gate/bias": Leaf("model.layers.{}.mlp.gate_proj.bias", "F->F", "gate_bias"),
    "layers/mlp/up/kernel": Leaf("model.layers.{}.mlp.up_proj.weight", "F,W->WF"),
    "layers/mlp/up/bias": Leaf("model.layers.{}.mlp.up_proj.bias", "F->F", "mlp_bias"),
    "layers/mlp/down/kernel": Leaf("model.layers.{}.mlp.down_proj.weight", "W,F->FW"),
    "layers/mlp/down/bias": Leaf("model.layers.{}.mlp.down_proj.bias", "W->W", "mlp_bias"),
    "final_norm/scale": Leaf("model.norm.weight", "W->W"),
    "head/kernel": Leaf("lm_head.weight", "V,W->WV", "untied_head"),
    "reward/kernel": Leaf("score.weight", "1,W->W1", "reward_head"),
}
# Gemma gives Llama's post_attention_layernorm, which is before the MLP, to the norm behind attention.
_GEMMA = _LLAMA | {
    "layers/attention_post_norm/scale": Leaf("model.layers.{}.post_attention_layernorm.weight", "W->W", "post_norms"),
    "layers/mlp_norm/scale": Leaf("model.layers.{}.pre_feedforward_layernorm.weight", "W->W"),
    "layers/mlp_post_norm/scale": Leaf("model.layers.{}.post_feedforward_layernorm.weight", "W->W", "post_norms"),
}
_QKV, _LAYER = "gpt_neox.layers.{}.attention.query_key_value", "gpt_neox.layers.{}."
_GPT_NEOX: dict[str, Leaf] = {
    "embedding": Leaf("gpt_neox.embed_in.weight", "V,W->VW"),
    "layers/attention_norm/scale": Leaf(_LAYER + "input_layernorm.weight", "W->W"),
    "layers/attention_norm/bias": Leaf(_LAYER + "input_layernorm.bias", "W->W"),
    "layers/attention/query/kernel": Leaf(_QKV + ".weight", "H3D,W->WHD", part=0),
    "layers/attention/query/bias": Leaf(_QKV + ".bias", "H3D->HD", "qkv_bias", part=0),
    "layers/attention/key/kernel": Leaf(_QKV + ".weight", "H3D,W->WHD", part=1),
    "layers/attention/key/bias": Leaf(_QKV + ".bias", "H3D->HD", "qkv_bias", part=1),
    "layers/attention/value/kernel": Leaf(_QKV + ".weight", "H3D,W->WHD", part=2),
    "layers/attention/value/bias": Leaf(_QKV + ".bias", "H3D->HD", "qkv_bias", part=2),
    "layers/attention/output/kernel": Leaf(_LAYER + "attention.dense.weight", "W,HD->HDW"),
    "layers/attention/output/bias": Leaf(_LAYER + "attention.dense.bias", "W->W", "output_bias"),
    "layers/mlp_norm/scale": Leaf(_LAYER + "post_attention_layernorm.weight", "W->W"),
    "layers/mlp_norm/bias": Leaf(_LAYER + "post_attention_layernorm.bias", "W->W"),
    "layers/mlp/up/kernel": Leaf(_LAYER + "mlp.dense_h_to_4h.weight", "F,W->WF"),
    "layers/mlp/up/bias": Leaf(_LAYER + "mlp.dense_h_to_4h.bias", "F->F", "mlp_bias"),
    "layers/mlp/down/kernel": Leaf(_LAYER + "mlp.dense_4h_to_h.weight", "W,F->FW"),
    "layers/mlp/down/bias": Leaf(_LAYER + "mlp.dense_4h_to_h.bias", "W->W", "mlp_bias"),
    "final_norm/scale": Leaf("gpt_neox.final_layer_norm.weight", "W->W"),
    "final_norm/bias": Leaf("gpt_neox.final_layer_norm.bias", "W->W"),
    "head/kernel": Leaf("embed_out.weight", "V,W->WV", "untied_head"),
    "reward/kernel": Leaf("score.weight", "1,W->W1", "reward_head"),
}
_NAMES = {"rms": _LLAMA, "rms_plus_one": _GEMMA, "layer": _GPT_NEOX}


def options(config: ModelConfig) -> dict[str, bool]:
    """What decides which leaves there are."""
    names = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "post_norms", "gated_mlp", "reward_head")
    untied = not config.tied_head and not config.reward_head
    derived = {"gate_bias": config.gated_mlp and config.mlp_bias, "untied_head": untied}
    return {name: getattr(config, name) for name in names} | derived


def leaves(config: ModelConfig) -> dict[str, Leaf]:
    """The leaves of a config's parameters by path."""
    there = options(config)
    return {path: leaf for path, leaf in _NAMES[config.norm].items() if not leaf.when or there[leaf.when]}


def embedding_and_head(config: ModelConfig) -> tuple[str, str]:
    """The names of the two tensors, of which a tied checkpoint may store the second too."""
    names = _NAMES[config.norm]
    return names["embedding"].tensor, names["head/kernel"].tensor


def sizes(config: ModelConfig) -> dict[str, int]:
    """Letters of Leaf.axes -> sizes."""
    c = config
    named = {"V": c.vocab_size, "W": c.width, "H": c.heads, "K": c.kv_heads, "D": c.head_width, "F": c.mlp_width}
    return named | {"1": 1, "3": 3}


def tensor_names(leaf: Leaf, config: ModelConfig) -> list[str]:
    """The tensors of a leaf, in the order of the layers."""
    return [leaf.tensor.format(i) for i in range(config.layers)] if "{}" in leaf.tensor else [leaf.tensor]


def stored_shape(leaf: Leaf, config: ModelConfig) -> tuple[int, ...]:
    """The shape of the tensor in the folder."""
    size = sizes(config)
    return tuple(math.prod(size[letter] for letter in axis) for axis in leaf.axes.split("->")[0].split(","))


def used_shape(leaf: Leaf, config: ModelConfig) -> tuple[int, ...]:
    """The shape of the leaf, without the axis of layers."""
    return tuple(sizes(config)[letter] for letter in leaf.axes.split("->")[1])


def from_stored(leaf: Leaf, config: ModelConfig, value: np.ndarray) -> np.ndarray:
    """A view of a stored tensor as one layer of its leaf."""
    stored, used = leaf.axes.split("->")
    letters, size = stored.replace(",", ""), sizes(config)
    value = value.reshape([size[letter] for letter in letters])
    if leaf.part is not None:
        value, letters = value.take(leaf.part, axis=letters.index("3")), letters.replace("3", "")
    return value.transpose([letters.index(letter) for letter in used])


def stored_view(leaf: Leaf, config: ModelConfig, value: np.ndarray) -> np.ndarray | None:
    """One layer of a leaf, contiguous, as a view with the axes of its stored tensor; None if it is a part of one."""
    stored, used = leaf.axes.split("->")
    axes, shape = stored.split(","), stored_shape(leaf, config)
    if used == "".join(axes):
        return value.reshape(shape)
    if used == "".join(reversed(axes)):
        return value.reshape(shape[::-1]).T
    return None


def to_stored(parts: dict[Leaf, np.ndarray], config: ModelConfig) -> np.ndarray:
    """The stored tensor of one layer of its leaf, or of its three leaves; the inverse of from_stored."""
    leaf = next(iter(parts))
    stored, used = leaf.axes.split("->")
    letters = stored.replace(",", "")
    order = [used.index(letter) for letter in letters if letter != "3"]
    values = [parts[key].transpose(order) for key in sorted(parts, key=lambda key: key.part or 0)]
    whole = values[0] if leaf.part is None else np.stack(values, axis=letters.index("3"))
    return np.ascontiguousarray(whole.reshape(stored_shape(leaf, config)))
