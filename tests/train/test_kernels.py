"""A whole update through the kernels: on a CPU by the interpreter, and lowered for devices."""

import functools
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, use_abstract_mesh

import rlalign as ra
from tests.kernels.test_pallas import H100, KERNELS
from tests.tiny import ragged_groups

MODEL = ra.ModelConfig(
    vocab_size=130, width=128, layers=2, heads=4, kv_heads=2, head_width=64, mlp_width=128, max_positions=64,
    tied_head=True, qk_norm=True, remat="full",
)  # fmt: skip
SAMPLES = ragged_groups(0, [(7, (4, 3)), (3, (1, 2, 4))], vocab=130)
NAMES = ("forest_attention_forward", "forest_attention_dq", "forest_attention_dkv", "logprobs_statistics")
NAMES += ("logprobs_gradient",)


def update():
    """(step, state of fresh parameters, batch) of GRPO."""
    decoder, optimizer = ra.Decoder(MODEL), ra.make_optimizer(ra.OptimizerConfig(learning_rate=1e-2, eps=1e-4))
    packed = SAMPLES.pack(row_length=24, num_rows=1, response_length=4)
    batch = ra.Batch(packed, advantage=np.array([1.0, -0.5, 0.3, 2.0, -1.0], np.float32))
    step = ra.make_train_step(decoder, ra.ALGORITHMS["grpo"], optimizer)
    return step, lambda: ra.init_state(decoder, decoder.init(0), optimizer), batch


def run(backend):
    """Parameters after an update, and its metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLALIGN_KERNELS", backend)
        jax.clear_caches()  # the environment is read when a program is traced
        step, start, batch = update()
        assert (backend == "xla") != ("pallas_call" in str(step.trace(start(), batch).jaxpr))
        state, metrics = step(start(), batch)
        jax.clear_caches()
    return state.params, metrics["loss"], metrics["grad_norm"]


on_every_platform = functools.cache(lambda: run("xla"))


@pytest.mark.parametrize("backend", ["interpret", "interpret_triton"])
def test_an_update_equals_that_of_every_platform(backend):
    for a, b in zip(*map(jax.tree.leaves, (run(backend), on_every_platform())), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("backend", KERNELS)
def test_an_update_lowers_for_its_device(backend, monkeypatch):
    """Attention runs forward once, rematerialised layers included: once in the scan forward, never in that backward."""
    monkeypatch.setenv("RLALIGN_KERNELS", backend)
    platform, call = KERNELS[backend]
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)) if backend == "triton" else nullcontext():
        step, start, batch = update()
        text = step.trace(jax.eval_shape(start), batch).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) == 5
    assert all(name in text for name in NAMES)
