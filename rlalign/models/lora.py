"""LoRA (arXiv 2106.09685): a frozen model and a low-rank change of its projections, which alone is trained.

    y = x W + (alpha / rank) (x A) B          A [in, rank], B [rank, out], eq. 3; B begins at 0

The adapter is a subtree `lora` of the parameters, beside the frozen ones. So everything that takes parameters takes an
adapted model, training changes and saves the adapter alone, and `without_lora` is the frozen reference at no cost: the
same arrays.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.models.config import LoraConfig
from rlalign.models.decoder import Decoder
from rlalign.types import Params

ADAPTER = "lora"
TRAINED = (ADAPTER, "reward")  # a reward head begins at random: it is never left frozen under an adapter
INPUTS = {"output": 2}  # axes of a kernel that are its input, where that is not one


def add_lora(decoder: Decoder, params: Params, config: LoraConfig, *, seed: int = 0) -> tuple[Decoder, Params]:
    """The same model with an adapter that changes nothing yet.

    Args:
      decoder, params: the model; its arrays stay where they are and are shared, not copied.
      config: rank, alpha and which projections.
      seed: of A, uniform within +-1 / sqrt(in) in float32; B is 0.

    Raises:
      ValueError: the model has an adapter; a projection that it does not have.
    """
    if ADAPTER in params:
        raise ValueError("the model has an adapter already: merge_lora first, or start from without_lora(params)")
    adapter: dict[str, Any] = {}
    for number, name in enumerate(sorted(config.targets)):
        block = "mlp" if name in params["layers"]["mlp"] else "attention"
        if name not in params["layers"][block]:
            parts = (params["layers"][part] for part in ("attention", "mlp"))
            there = [other for part in parts for other, leaf in part.items() if "kernel" in leaf]
            raise ValueError(f"LoraConfig.targets has {name!r}, the model's projections are {', '.join(there)}")
        kernel = params["layers"][block][name]["kernel"]
        layers, *shape = kernel.shape
        inputs, outputs = shape[: INPUTS.get(name, 1)], shape[INPUTS.get(name, 1) :]
        bound = float(np.prod(inputs)) ** -0.5
        key = jax.random.fold_in(jax.random.key(seed), number)
        a = jax.random.uniform(key, (layers, *inputs, config.rank), jnp.float32, -bound, bound)
        adapter.setdefault(block, {})[name] = {"a": a, "b": jnp.zeros((layers, config.rank, *outputs), jnp.float32)}
    changed = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, lora=config))
    return changed, {**params, ADAPTER: _placed_like({"layers": adapter}, params)}


def merge_lora(decoder: Decoder, params: Params) -> tuple[Decoder, Params]:
    """The model with W + (alpha / rank) A B in place of W, and no adapter: for save_pretrained, or a server.

    Raises:
      ValueError: the model has no adapter.
    """
    config = decoder.config.lora
    if ADAPTER not in params or config is None:
        raise ValueError("the model has no adapter: add_lora first")

    def merged(kernel, change):
        low, high = change["a"], change["b"]
        rank_last = low.reshape(low.shape[0], -1, config.rank)
        whole = jnp.einsum("lir,lro->lio", rank_last, high.reshape(high.shape[0], config.rank, -1))
        wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        return (wide + config.scale * whole.reshape(kernel.shape)).astype(kernel.dtype)

    layers = dict(params["layers"])
    for block, changes in params[ADAPTER]["layers"].items():
        layers[block] = dict(layers[block])
        for name, change in changes.items():
            layers[block][name] = layers[block][name] | {"kernel": merged(layers[block][name]["kernel"], change)}
    plain = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, lora=None))
    return plain, {**without_lora(params), "layers": layers}


def without_lora(params: Params) -> Params:
    """The frozen model of an adapted one, in the same arrays: the reference of a KL. Other models stay as they are."""
    return {name: value for name, value in params.items() if name != ADAPTER}


def trained(params: Params) -> Params:
    """What training changes: the adapter and a reward head, or, where there is no adapter, everything."""
    return {name: value for name, value in params.items() if name in TRAINED} if ADAPTER in params else params


def frozen(params: Params) -> Params:
    """What it leaves alone: nothing, where there is no adapter. {**frozen(params), **trained(params)} is params."""
    return {name: value for name, value in params.items() if name not in TRAINED} if ADAPTER in params else {}


def _placed_like(adapter: Params, params: Params) -> Params:
    """On the mesh of the parameters, if they lie on one."""
    mesh = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)
    if not isinstance(mesh, jax.sharding.Mesh):
        return adapter
    from rlalign.train.mesh import place_params  # here, because mesh.py imports the decoder

    return place_params(adapter, mesh)
