"""The Pallas kernels: run by the interpreter on a CPU, and lowered for the devices they are for."""

import functools
import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from rlalign.models import decoder as decoder_module
from rlalign.models.config import ModelConfig
from rlalign.models.decoder import Decoder
from rlalign.types import TokenForest
from rlalign_kernels import attention_plan, forest_attention
from rlalign_kernels import backend as backends
from rlalign_kernels.attention import triton
from rlalign_kernels.attention.blocks import Tile
from rlalign_kernels.attention.plan import make_plan
from rlalign_kernels.attention.shapes import HEADS
from rlalign_kernels.attention.tiled import Options
from tests.jaxprs import equations
from tests.kernels.test_attention import FORESTS, arrays, check, compiled, random_rows, run
from tests.tiny import SHAPE

both = pytest.mark.parametrize("backend", ["interpret", "interpret_triton"])
KERNELS = {"tpu": ("tpu", "@tpu_custom_call"), "triton": ("cuda", "@__gpu$xla.gpu.triton")}
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")  # jax 0.12 asks for one


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [*HEADS.values(), (6, 2)])
def test_equals_the_dense_mask(backend, heads, kv_heads, dtype, x64):
    check("trees", heads, kv_heads, dtype, width=64, backend=backend)


@both
@pytest.mark.parametrize("name", sorted(set(FORESTS) - {"trees"}))
def test_equals_the_dense_mask_on_every_forest(backend, name, x64):
    check(name, 2, 1, "float32", width=64, backend=backend)


@both
@pytest.mark.parametrize("width", [96, 128, 256])
def test_other_head_widths(backend, width, x64):
    check("small_trees", 2, 1, "float32", width=width, backend=backend)


@both
@pytest.mark.parametrize("options", [{"scale": -0.5}, {"window": 7}, {"window": 3, "softcap": 1.5}], ids=str)
def test_options_equal_the_dense_mask(backend, options, x64):
    check("trees", 2, 1, "float32", width=64, backend=backend, **options)


@both
def test_options_in_bfloat16(backend, x64):
    check("small_trees", 4, 2, "bfloat16", width=64, backend=backend, window=5, softcap=4.0)


@both
def test_a_plan_of_another_backend_is_refused(backend):
    until = jnp.asarray(FORESTS["odd"][0])
    inputs = arrays(0, until.shape, 2, 1, 64, "float32")[:3]
    message = (
        r"64 x 64, the batch .* and backend '(interpret.*)' tiles of .*: use attention_plan\(.*backend='\1', group=2"
    )
    with pytest.raises(ValueError, match=message):
        forest_attention(*inputs, until, backend=backend, plan=attention_plan(until))


@both
def test_queries_that_see_no_key_get_zero_in_no_forest_too(backend):
    """What a careless visible_until makes of a program that leaves tiles unwritten."""
    q, k, v, _ = arrays(0, (1, 64), 2, 1, 64, "float32")
    out = forest_attention(q, k, v, jnp.ones((1, 64), jnp.int32), backend=backend)
    np.testing.assert_allclose(out[0, 0], jnp.broadcast_to(v[0, 0], (2, 64)), rtol=1e-6)
    assert not np.any(out[0, 1:])


def test_more_pairs_than_scalar_memory_holds_are_refused():
    shape = jax.ShapeDtypeStruct((1, 131072, 2, 128), jnp.bfloat16)
    call = functools.partial(forest_attention, backend="tpu")
    with pytest.raises(ValueError, match=r"131072 tokens in all can have \d+ pairs of tiles, more than the 80000"):
        jax.eval_shape(call, shape, shape, shape, jax.ShapeDtypeStruct((1, 131072), jnp.int32))


@both
def test_two_runs_agree_bit_for_bit_and_so_does_a_shared_plan(backend):
    until = jnp.asarray(FORESTS["trees"][0])
    inputs = arrays(0, until.shape, 4, 2, 64, "float32")
    first, again = (run(forest_attention, inputs, until, backend=backend) for _ in range(2))
    plan = attention_plan(until, backend=backend, group=2, width=64, dtype="float32")
    planned = compiled(forest_attention, backend=backend)(*inputs, until, jnp.zeros_like(until), plan=plan)
    for a, b, c in zip(first, again, planned, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@both
def test_what_lies_in_the_padding_changes_nothing(backend):
    """Tiles that no pair reaches are never written: what the program finds there must not show."""
    until, _ = FORESTS["trees"]
    inputs = arrays(0, until.shape, 2, 1, 64, "float32")
    dead = jnp.asarray(until == 0)[:, :, None, None]
    clean = run(forest_attention, inputs, until, backend=backend)
    dirty = run(forest_attention, [jnp.where(dead, np.nan, x) for x in inputs], until, backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)
    for x in run(forest_attention, inputs, np.zeros_like(until), backend=backend):
        assert not np.asarray(x).any()


@both
def test_agrees_with_the_backend_of_every_platform(backend):
    """The same sums in another order: what a change of device changes."""
    until, _ = FORESTS["long_trees"]
    inputs = arrays(0, until.shape, 4, 2, 64, "float32")
    for a, b in zip(*(run(forest_attention, inputs, until, backend=x) for x in (backend, "xla")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_the_environment_chooses_a_backend(monkeypatch):
    until = jnp.asarray(FORESTS["small_trees"][0])
    inputs = arrays(0, until.shape, 2, 1, 64, "float32")[:3]
    program = lambda: str(jax.make_jaxpr(lambda *x: forest_attention(*x, until))(*inputs))
    assert "pallas_call" not in program()
    monkeypatch.setenv("RLALIGN_KERNELS", "interpret")
    assert "pallas_call" in program()
    assert attention_plan(until).block_k == attention_plan(until, backend="interpret").block_k == 32
    monkeypatch.setenv("RLALIGN_KERNELS", "cudnn")
    for call in (attention_plan, lambda u: forest_attention(*inputs, u)):
        with pytest.raises(ValueError, match="unknown kernel backend 'cudnn': choose one of xla, tpu, triton, "):
            call(until)


def test_without_pallas_plain_xla_runs_and_says_so_once(monkeypatch, caplog):
    until = jnp.asarray(FORESTS["small_trees"][0])
    inputs = arrays(0, until.shape, 2, 1, 64, "float32")[:3]
    want = jax.jit(lambda *x: forest_attention(*x, until, backend="xla"))(*inputs)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.tpu", None)  # its import fails
    monkeypatch.setenv("RLALIGN_KERNELS", "tpu")
    backends._has_pallas.cache_clear()
    try:
        for _ in range(2):  # a TPU's kernel would not run here
            np.testing.assert_array_equal(jax.jit(lambda *x: forest_attention(*x, until))(*inputs), want)
        assert backends.choose(None) == backends.choose("tpu") == "xla"
        assert backends.choose("interpret_triton") == "interpret_triton"
    finally:
        backends._has_pallas.cache_clear()
    said = [record.getMessage() for record in caplog.records if "no Pallas for 'tpu' kernels" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("plain XLA runs in their place")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "window": 100}], ids=str)
def test_lowers_for_its_device(backend, width, dtype, options):
    """Forward, dq and dk/dv become kernels; `make aot` and `make aot-cuda` compile them."""
    if (backend, width, dtype) == ("triton", 256, "float32"):
        pytest.skip("refused: see test_refusals_name_the_argument")
    shape = lambda heads: jax.ShapeDtypeStruct((2, 1100, heads, width), dtype)
    ids = jax.ShapeDtypeStruct((2, 1100), jnp.int32)

    def program(q, k, v, grad, until, position):
        attend = functools.partial(forest_attention, backend=backend, position=position, **options)
        out, pull = jax.vjp(lambda *x: attend(*x, until), q, k, v)
        return out, pull(grad)

    platform, call = KERNELS[backend]
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)) if backend == "triton" else nullcontext():
        traced = jax.jit(program).trace(shape(8), shape(2), shape(2), shape(8), ids, ids)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) == 3
    for name in ("forward", "dq", "dkv"):
        assert f"forest_attention_{name}" in text


def test_long_tiles_of_a_gpu_start_first_and_few_key_tiles_are_cut():
    until = jnp.asarray(FORESTS["long_trees"][0])
    tile = Tile(16, 32, 2, programs=100)
    plan = make_plan(until, block_q=tile.block_q, block_k=tile.block_k)
    options = Options("triton", 1.0, None, None, tile)
    for pairs, first in ((plan.by_query, plan.first), (plan.by_key, plan.first_key)):
        order = triton._lists(pairs, pairs.key, first, options, plan, None)[3][0]
        assert sorted(order) == list(range(first.size - 1))
        work = np.diff(first)[np.asarray(order)]
        assert work[0] > work[-1]
        assert (np.diff(work) <= 0).all()
    assert [triton._parts(options, programs, 500) for programs in (1, 25, 33, 50, 99, 100, 400)] == [
        128,
        4,
        4,
        2,
        2,
        1,
        1,
    ]
    assert [triton._parts(options, 1, steps) for steps in (1, 2, 7, 8, 100)] == [1, 2, 4, 8, 64]  # of a short batch


@both
@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.nothing_saveable], ids=["ours", "saves nothing"])
def test_a_rematerialised_layer_never_runs_its_forward_again(backend, policy, monkeypatch):
    """Layers are scanned, so a kernel that a layer runs once is traced once."""
    monkeypatch.setenv("RLALIGN_KERNELS", backend)
    if policy is not None:
        monkeypatch.setitem(decoder_module.KEPT, "full", policy)
    decoder = Decoder(ModelConfig(**SHAPE, head_width=64, tied_head=True, remat="full"))
    until, position = (jnp.asarray(x) for x in FORESTS["small_trees"])
    forest = TokenForest(jnp.zeros_like(until), position, until, until)  # parents are not looked at
    loss = lambda params: jnp.sum(decoder.apply(params, forest))
    traced = jax.make_jaxpr(jax.grad(loss))(jax.eval_shape(decoder.init, 0))
    kernels = [e.params["name"] for e in equations(traced) if e.primitive.name == "pallas_call"]
    again = [] if policy is None else ["forest_attention_forward"]
    assert sorted(kernels) == ["forest_attention_dkv", "forest_attention_dq", "forest_attention_forward", *again]


@both
def test_rows_over_data_and_heads_over_tensor(backend):
    """Each device plans and attends to its own rows, with its own key/value heads."""
    until = jnp.asarray(random_rows(2, 4, 60)[0])
    inputs = arrays(0, until.shape, 4, 2, 64, "float32")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    local = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    rows, heads = P("data", None), P("data", None, "tensor", None)
    plan = functools.partial(attention_plan, backend=backend, group=2, width=64, dtype="float32")
    plan = local(plan, in_specs=rows, out_specs=P("data"))

    def attention(q, k, v, until, *, position):
        del position
        run = lambda q, k, v, until, plan: forest_attention(q, k, v, until, plan=plan, backend=backend)
        return local(run, in_specs=(heads,) * 3 + (rows, P("data")), out_specs=heads)(q, k, v, until, plan(until))

    for a, b in zip(run(attention, inputs, until), run(forest_attention, inputs, until), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
