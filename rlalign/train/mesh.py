"""Where arrays live: a mesh with axes data, fsdp and tensor, and one table of rules.

Rows of a batch go over data and fsdp together, key/value heads over tensor. Attention, the gather of hidden states and
the log-probs are local to a device (shard_map); dense layers are left to the compiler, which follows the shardings of
parameters and rows.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlalign.hosts import put
from rlalign.logprobs import token_logprobs
from rlalign.models.decoder import Decoder
from rlalign.types import Params, TokenForest
from rlalign_kernels import attention_plan, decode_attention, forest_attention

AnyMesh = Mesh | AbstractMesh
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# The end of a parameter's path -> its sharding; the first axis of a layer's parameter is the layer. The optimizer's
# moments end in the same paths. Whatever is not named here is replicated.
RULES: dict[str, P] = {
    "embedding": P("tensor", "fsdp"),
    "attention/query/kernel": P(None, "fsdp", "tensor", None),
    "attention/query/bias": P(None, "tensor", None),
    "attention/key/kernel": P(None, "fsdp", "tensor", None),
    "attention/key/bias": P(None, "tensor", None),
    "attention/value/kernel": P(None, "fsdp", "tensor", None),
    "attention/value/bias": P(None, "tensor", None),
    "attention/output/kernel": P(None, "tensor", None, "fsdp"),
    "mlp/gate/kernel": P(None, "fsdp", "tensor"),
    "mlp/gate/bias": P(None, "tensor"),
    "mlp/up/kernel": P(None, "fsdp", "tensor"),
    "mlp/up/bias": P(None, "tensor"),
    "mlp/down/kernel": P(None, "tensor", "fsdp"),
    "head/kernel": P("fsdp", "tensor"),
    # Adapters (lora.py): cut like their kernels, the rank whole.
    "attention/query/a": P(None, "fsdp", None),
    "attention/query/b": P(None, None, "tensor", None),
    "attention/key/a": P(None, "fsdp", None),
    "attention/key/b": P(None, None, "tensor", None),
    "attention/value/a": P(None, "fsdp", None),
    "attention/value/b": P(None, None, "tensor", None),
    "attention/output/a": P(None, "tensor", None, None),
    "attention/output/b": P(None, None, "fsdp"),
    "mlp/gate/a": P(None, "fsdp", None),
    "mlp/gate/b": P(None, None, "tensor"),
    "mlp/up/a": P(None, "fsdp", None),
    "mlp/up/b": P(None, None, "tensor"),
    "mlp/down/a": P(None, "tensor", None),
    "mlp/down/b": P(None, None, "fsdp"),
}


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of data x fsdp x tensor devices.

    Args:
      data: copies of the parameters; each sees other rows.
      fsdp: parameters and optimizer state are cut this many times; rows too.
      tensor: heads, MLP columns and vocabulary are cut this many times.
      devices: None takes the first data * fsdp * tensor of jax.devices().

    Raises:
      ValueError: sizes that the devices do not fit.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if min(sizes.values()) < 1:
        raise ValueError(f"mesh sizes must be at least 1, got {sizes}")
    need = math.prod(sizes.values())
    devices = jax.devices() if devices is None else devices
    if len(devices) < need:
        raise ValueError(f"a mesh of {sizes} needs {need} devices, there are {len(devices)}: make one size smaller")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:need])


def row_shards(mesh: AnyMesh | None) -> int:
    """Over how many devices the rows are cut."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def _path(path) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _spec(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> P:
    for ending, spec in RULES.items():
        if (path == ending or path.endswith("/" + ending)) and len(spec) == len(shape):
            # An axis whose size the mesh does not divide is replicated. Written as the compiler writes its results
            # (no axes of size 1, no trailing None), or the second step would be compiled again.
            names = [
                a if a and mesh.shape[a] > 1 and size % mesh.shape[a] == 0 else None
                for a, size in zip(spec, shape, strict=True)
            ]
            while names and names[-1] is None:
                names.pop()
            return P(*names)
    return P()


def shardings(tree: Params, mesh: AnyMesh) -> Params:
    """The NamedSharding of every leaf of a tree of parameters, optimizer state or both, by RULES."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _spec(_path(path), np.shape(x), mesh)), tree
    )


def place_params(tree: Params, mesh: Mesh) -> Params:
    """The tree with every leaf put where RULES say; host arrays must be the same in every process."""
    return jax.tree.map(put, tree, shardings(tree, mesh))


def keep_sharding(tree: Params, mesh: Mesh | None) -> Params:
    """The tree constrained to RULES inside a compiled function, so that a step returns what it was given."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def gather_embedding(params: Params, mesh: Mesh | None) -> Params:
    """The embedding whole along fsdp before it is indexed: the compiler would replicate activations instead."""
    if mesh is None:
        return params
    vocab = (*_spec("embedding", params["embedding"].shape, mesh), None)[0]
    whole = jax.lax.with_sharding_constraint(params["embedding"], NamedSharding(mesh, P(vocab, None)))
    return {**params, "embedding": whole}


def gather_params(params: Params, mesh: Mesh | None) -> Params:
    """All parameters whole along fsdp, cut over tensor alone: for loops that read them once a token."""
    if mesh is None:
        return params

    def whole(path, x):
        spec = P(*(name if name != "fsdp" else None for name in _spec(_path(path), x.shape, mesh)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(whole, params)


def check_mesh(decoder: Decoder, mesh: AnyMesh) -> None:
    """Refuse a mesh that cannot hold the decoder's heads."""
    kv_heads, tensor = decoder.config.kv_heads, mesh.shape["tensor"]
    if kv_heads % tensor:
        raise ValueError(
            f"tensor={tensor} does not divide the model's {kv_heads} key/value heads: choose a divisor of {kv_heads}"
        )


@functools.cache
def shard_decoder(decoder: Decoder, mesh: Mesh | None) -> Decoder:
    """The decoder with attention local to each device: rows over data and fsdp, heads over tensor."""
    if mesh is None:
        return decoder
    check_mesh(decoder, mesh)
    heads = P(ROWS, None, "tensor", None)
    local = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    def plan(visible_until, **head):
        run = functools.partial(attention_plan, **head)
        return local(run, in_specs=P(ROWS, None), out_specs=P(ROWS))(visible_until)

    def attention(q, k, v, visible_until, *, plan, position=None, **options):
        def run(q, k, v, visible_until, plan, position):
            return forest_attention(q, k, v, visible_until, plan=plan, position=position, **options)

        specs = (heads, heads, heads, P(ROWS, None), P(ROWS), P(ROWS, None))
        return local(run, in_specs=specs, out_specs=heads)(q, k, v, visible_until, plan, position)

    prefix, suffix = P(None, ROWS, "tensor", None, None), P(None, ROWS, "tensor", None, None, None)
    specs = (heads, prefix, suffix, P(), P(ROWS), P(), P())

    def decode(q, prefix, suffix, layer, length, step, *, window=None, **options):
        def run(*arrays):
            return decode_attention(*arrays[:-1], window=arrays[-1], **options)

        return local(run, in_specs=specs, out_specs=heads)(q, prefix, suffix, layer, length, step, window)

    return dataclasses.replace(decoder, attention=attention, plan=plan, decode=decode)


def local_logprobs(
    hidden,
    head,
    forest: TokenForest,
    node,
    *,
    mesh: Mesh | None,
    temperature: float,
    softcap=None,
    allowed=None,
):
    """token_logprobs with nodes counted inside a part: node i32[S, M, R] -> (logp, entropy) f[S * M, R].

    The vocabulary is cut over the tensor axis, as the head's parameters are; four numbers a token cross it. With
    allowed=(table b[S, A, V], state i32[S, M, R]), each part its own table, it is not cut, and the form is "xla".
    """
    parts, samples, response = node.shape
    vocab, shards = head.shape[1], 1 if mesh is None else mesh.shape["tensor"]
    axis = {} if shards == 1 else {"axis_name": "tensor", "vocab": vocab}

    if allowed is not None and shards > 1:
        raise ValueError(f"allowed strings and tensor={shards}: a table of tokens is not cut; use data and fsdp")

    def run(hidden, head, forest, node, allowed):
        flat, only = node.reshape(-1, response), {}
        if allowed is not None:
            only = {"allowed": (allowed[0][0], allowed[1].reshape(flat.shape)), "backend": "xla"}
        how = {"temperature": temperature, "softcap": softcap, **axis, **only}
        return tuple(x.reshape(node.shape) for x in token_logprobs(hidden, head, forest, flat, **how))

    if mesh is not None:
        rows = P(ROWS, None, None)
        specs = (rows, P(None, "tensor"), P(ROWS, None), rows, rows)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        head = jnp.pad(head, ((0, 0), (0, -vocab % shards)))
    return tuple(x.reshape(parts * samples, response) for x in run(hidden, head, forest, node, allowed))


def local_likeliest(hidden, head, forest: TokenForest, node, *, mesh: Mesh | None, chunk: int = 128):
    """Whether no token is likelier than each one's: node i32[S, M, R], counted inside a part -> b[S * M, R].

    Without a gradient, the head whole on each device, `chunk` tokens' logits at a time; False where node is -1. A
    softcap and a temperature do not change the order.
    """

    def run(hidden, head, forest, node):
        flat, length = node.reshape(-1), forest.token.shape[1]
        at = jnp.maximum(flat, 0)
        parent = at // length * length + forest.parent.reshape(-1)[at]
        states, wide = hidden.reshape(-1, hidden.shape[-1]), jnp.promote_types(hidden.dtype, jnp.float32)

        def likeliest(place):
            return jnp.argmax(jnp.matmul(states[place], head, preferred_element_type=wide))

        best = jax.lax.map(likeliest, jnp.maximum(parent, 0), batch_size=min(chunk, flat.size))
        return ((best == forest.token.reshape(-1)[at]) & (flat >= 0)).reshape(node.shape)

    if mesh is not None:
        rows = P(ROWS, None, None)
        specs = (rows, P(None, None), P(ROWS, None), rows)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return run(hidden, head, forest, node).reshape(-1, node.shape[-1])


def local_rewards(hidden, kernel, node, *, mesh: Mesh | None):
    """What a reward model gives at each sample's last token: node i32[S, M, R], counted inside a part -> f[S * M].

    In float32 or wider; 0 where a sample has no token.
    """

    def run(hidden, kernel, node):
        last = jnp.max(node, axis=-1)  # depth-first: of a sample's tokens, the last lies furthest
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        found = hidden.reshape(-1, hidden.shape[-1])[jnp.maximum(last, 0).reshape(-1)]
        reward = jnp.matmul(found, kernel, preferred_element_type=wide)[:, 0]
        return jnp.where(last >= 0, reward.reshape(last.shape), 0)

    if mesh is not None:
        specs = (P(ROWS, None, None), P(None, None), P(ROWS, None, None))
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(ROWS, None), check_vma=False)
    return run(hidden, kernel, node).reshape(-1)
