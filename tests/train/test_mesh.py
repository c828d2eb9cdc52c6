"""Meshes of simulated devices: the same training on each, arrays where the rules say, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlalign.models.decoder import Decoder
from rlalign.train import make_mesh, make_optimizer, make_scorer, make_train_step, place_params
from rlalign.train.mesh import local_logprobs
from tests.train.cases import (
    ALGORITHM,
    COUNT,
    MODEL,
    NARROW,
    OPTIMIZER,
    RESPONSE,
    assert_like_by_hand,
    assert_near,
    batch,
    by_hand,
    new_state,
    params,
    plain,
    train,
)

MESHES = {
    "data=2": ({"data": 2}, 1),
    "fsdp=4,tensor=2": ({"fsdp": 4, "tensor": 2}, 1),
    "data=2,fsdp=2,tensor=2,microbatches=2": ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
}
# On fsdp=4, tensor=2; kv_heads=2, vocab_size=16, width=16, mlp_width=24. Whatever is not here is replicated.
EXPECTED = {
    "embedding": P("tensor", "fsdp"),
    "head/kernel": P("fsdp", "tensor"),
    "layers/attention/query/kernel": P(None, "fsdp", "tensor"),
    "layers/attention/query/bias": P(None, "tensor"),
    "layers/attention/key/kernel": P(None, "fsdp", "tensor"),
    "layers/attention/key/bias": P(None, "tensor"),
    "layers/attention/value/kernel": P(None, "fsdp", "tensor"),
    "layers/attention/value/bias": P(None, "tensor"),
    "layers/attention/output/kernel": P(None, "tensor", None, "fsdp"),
    "layers/mlp/gate/kernel": P(None, "fsdp", "tensor"),
    "layers/mlp/gate/bias": P(None, "tensor"),
    "layers/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "layers/mlp/up/bias": P(None, "tensor"),
    "layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
}


def leaves(tree):
    """(path, leaf) of a tree, the path as a/b/c of its dict keys."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey)), leaf


def assert_placed(state, mesh):
    """Parameters and both moments: the sharding of the table, and that share of the bytes on each device."""
    seen = []
    for path, leaf in leaves((state.params, state.opt_state)):
        spec = EXPECTED.get(path, P())
        assert leaf.sharding.mesh.shape == mesh.shape
        assert leaf.sharding.spec == spec, path
        cut = np.prod([mesh.shape[name] for name in spec if name])
        assert {s.data.size for s in leaf.addressable_shards} == {leaf.size // cut}, path
        seen.append(path)
    for path in EXPECTED:
        assert seen.count(path) == 3


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_trains_alike(name, x64):
    sizes, microbatches = MESHES[name]
    mesh = make_mesh(**sizes)
    parts = microbatches * sizes.get("data", 1) * sizes.get("fsdp", 1)
    state, history = train(batch(parts=parts), mesh=mesh, microbatches=microbatches)
    assert_like_by_hand(state.params, history, 1e-12)
    if "fsdp=4" in name:
        assert_placed(state, mesh)
        assert_placed(new_state(mesh=mesh), mesh)


def test_float32(x64):
    with jax.enable_x64(False):
        mesh = make_mesh(data=2, fsdp=2, tensor=2)
        state, _ = train(batch(parts=8, dtype="float32"), NARROW, mesh=mesh, microbatches=2)
    assert_near(state.params, by_hand()[-1][0], 1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_scorer_on_a_mesh(x64, microbatches):
    zero = np.zeros((COUNT, RESPONSE))
    expected = plain()(params(), zero, zero)[0][0]
    mesh = make_mesh(fsdp=2, tensor=2)
    how = {"temperature": ALGORITHM.temperature, "mesh": mesh, "microbatches": microbatches}
    got = make_scorer(Decoder(MODEL), **how)(place_params(params(), mesh), batch(parts=2 * microbatches).packed)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_a_vocabulary_that_the_tensor_axis_does_not_divide(x64):
    """15 tokens over two devices: the last column of the second is padding. Values and gradients of one device."""
    packed, rng = batch().packed, np.random.default_rng(0)
    forest = packed.forest._replace(token=packed.forest.token % 15)
    hidden, head = (jnp.asarray(rng.normal(size=s)) for s in ((*forest.token.shape, 8), (8, 15)))

    def loss(hidden, head, mesh):
        scored = local_logprobs(hidden, head, forest, packed.node[None], mesh=mesh, temperature=0.7)
        return sum(jnp.sum(jnp.sin(x)) for x in scored)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    results = (run(hidden, head, mesh) for mesh in (make_mesh(tensor=2), None))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_an_axis_that_the_mesh_does_not_divide_is_whole():
    """width 16 over fsdp=3, vocabulary 16 over tensor=2: only the second is cut."""
    placed = place_params(params(NARROW), make_mesh(fsdp=3, tensor=2))
    assert placed["embedding"].sharding.spec == P("tensor")
    assert placed["layers"]["mlp"]["gate"]["kernel"].sharding.spec == P(None, None, "tensor")
    np.testing.assert_array_equal(placed["embedding"], params(NARROW)["embedding"])


def test_axes_of_one_device_are_not_named():
    """data=2 alone replicates the parameters."""
    placed = place_params(params(NARROW), make_mesh(data=2))
    assert {x.sharding.spec for x in jax.tree.leaves(placed)} == {P()}


def test_heads_that_do_not_divide_are_refused():
    mesh = make_mesh(tensor=4)
    arguments = (Decoder(NARROW), ALGORITHM, make_optimizer(OPTIMIZER))
    with pytest.raises(ValueError, match="tensor=4 does not divide the model's 2 key/value heads: choose a divisor"):
        make_train_step(*arguments, mesh=mesh)
    with pytest.raises(ValueError, match="tensor=4 does not divide"):
        make_scorer(Decoder(NARROW), mesh=mesh)


def test_axis_name_and_mesh_are_refused():
    with pytest.raises(ValueError, match="axis_name goes without mesh and microbatches"):
        make_train_step(Decoder(NARROW), ALGORITHM, make_optimizer(OPTIMIZER), mesh=make_mesh(data=2), axis_name="x")


def test_meshes_that_the_devices_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs 32 devices, there are 8: make one size smaller"):
        make_mesh(data=16, tensor=2)
    with pytest.raises(ValueError, match=r"mesh sizes must be at least 1, got \{'data': 1, 'fsdp': 0, 'tensor': 1\}"):
        make_mesh(fsdp=0)
    with pytest.raises(ValueError, match="needs 2 devices, there are 1"):
        make_mesh(data=2, devices=jax.devices()[:1])


def test_a_mesh_takes_the_devices_it_is_given():
    devices = jax.devices()[4:6]
    assert make_mesh(tensor=2, devices=devices).devices.ravel().tolist() == devices
