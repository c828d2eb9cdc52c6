"""Adapters: what they compute, that they alone are trained and saved, and the model they become."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.checkpoint import Checkpoints
from rlalign.io.files import fingerprint
from rlalign.models import LoraConfig, add_lora, logits, merge_lora, without_lora
from rlalign.models.lora import frozen, trained
from rlalign.train import init_state, make_mesh, make_train_step, place_params
from tests.io.graders import even
from tests.tiny import GEMMA, GPT_NEOX, QWEN2, QWEN3, ragged_groups, random_params, sums_model, sums_run
from tests.train import cases

CONFIG = LoraConfig(rank=3, alpha=5.0)
SMALL = {"qwen2": QWEN2, "qwen3": QWEN3, "gemma": GEMMA, "gpt_neox": GPT_NEOX}


def targets(model):
    """Every projection that the model has."""
    return tuple(name for name in CONFIG.targets if name != "gate" or model.gated_mlp)


def adapted(model, *, dtype="float32", **changes):
    """A model with an adapter whose B is not 0."""
    config = dataclasses.replace(CONFIG, targets=targets(model), **changes)
    decoder, params = add_lora(ra.Decoder(model), random_params(model), config)
    rng = np.random.default_rng(7)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), dtype), params["lora"])
    return decoder, {**params, "lora": drawn}


def forest(vocab=17):
    return ragged_groups(0, [(6, (3, 4, 2)), (5, (1, 2))], vocab=vocab).pack(row_length=24).forest


@pytest.mark.parametrize("name", SMALL)
def test_an_adapter_begins_as_the_model_itself(name):
    model = SMALL[name]
    plain, params = ra.Decoder(model), random_params(model)
    decoder, both = add_lora(plain, params, dataclasses.replace(CONFIG, targets=targets(model)))
    np.testing.assert_array_equal(logits(decoder, both, forest()), logits(plain, params, forest()))
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (without_lora(both), params)), strict=True))
    assert all(np.abs(x).max() > 0 for path, x in jax.tree.leaves_with_path(both["lora"]) if path[-1].key == "a")


@pytest.mark.parametrize("name", SMALL)
def test_equals_the_merged_model(name, x64):
    model = dataclasses.replace(SMALL[name], dtype="float64")
    decoder, params = adapted(model, dtype="float64")
    plain, merged = merge_lora(decoder, params)
    assert plain.config == model
    assert jax.tree.structure(merged) == jax.tree.structure(without_lora(params))
    got, want = logits(decoder, params, forest()), logits(plain, merged, forest())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    assert np.abs(want - logits(plain, without_lora(params), forest())).max() > 0.1


def test_gradients_are_those_of_the_merged_kernels(x64):
    """dA = s dW B^T and dB = s A^T dW, with the gradient dW of the plain model at W + s A B."""
    model = dataclasses.replace(QWEN3, dtype="float64")
    decoder, params = adapted(model, dtype="float64")
    plain, merged = merge_lora(decoder, params)
    loss = lambda decoder, params: jnp.sum(jnp.sin(logits(decoder, params, forest())))
    got = jax.grad(lambda adapter: loss(decoder, {**params, "lora": adapter}))(params["lora"])
    whole = jax.grad(lambda merged: loss(plain, merged))(merged)
    for block, changes in got["layers"].items():
        for name, change in changes.items():
            own = params["lora"]["layers"][block][name]
            flat = lambda x, columns: np.asarray(x).reshape(x.shape[0], -1, columns)
            width = int(np.prod(own["b"].shape[2:]))
            a, b = flat(own["a"], 3), np.asarray(own["b"]).reshape(-1, 3, width)
            kernel = flat(whole["layers"][block][name]["kernel"], width)
            expected = (5 / 3 * kernel @ b.swapaxes(1, 2), 5 / 3 * a.swapaxes(1, 2) @ kernel)
            np.testing.assert_allclose(flat(change["a"], 3), expected[0], rtol=0, atol=1e-11)
            np.testing.assert_allclose(np.reshape(change["b"], b.shape), expected[1], rtol=0, atol=1e-11)


def steps(mesh=None, count=3):
    decoder, params = adapted(cases.NARROW)
    params = params if mesh is None else place_params(params, mesh)
    optimizer = ra.make_optimizer(cases.OPTIMIZER)
    state = init_state(decoder, params, optimizer)
    step = make_train_step(decoder, cases.ALGORITHM, optimizer, mesh=mesh)
    for _ in range(count):
        state, metrics = step(state, cases.batch(parts=1 if mesh is None else 4, dtype="float32"))
    return params, state, metrics


def test_training_moves_the_adapter_alone(x64):
    cases.fields()  # in float64
    with jax.enable_x64(False):
        before, state, metrics = steps()
    assert int(state.step) == 3
    assert np.isfinite(metrics["grad_norm"])
    for a, b in zip(*map(jax.tree.leaves, (frozen(before), frozen(state.params))), strict=True):
        assert a is b  # not even copied
    for a, b in zip(*map(jax.tree.leaves, (before["lora"], state.params["lora"])), strict=True):
        assert np.abs(a - b).max() > 1e-4
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert moments <= 2 * sum(x.size for x in jax.tree.leaves(before["lora"])) + 4


def test_a_mesh_trains_it_alike(x64):
    cases.fields()  # in float64
    with jax.enable_x64(False):
        (_, one, _), (_, many, _) = steps(), steps(make_mesh(data=2, fsdp=2, tensor=2))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(one.params["lora"]), jax.tree.leaves(many.params["lora"]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    cut = many.params["lora"]["layers"]["attention"]["query"]
    assert cut["a"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert cut["b"].sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor")


def test_fit_saves_the_adapter_and_continues(tmp_path):
    """With a KL to the model under the adapter: at the first step, where they agree, it is 0."""
    base = ra.Decoder(sums_model(16))
    params = base.init(0)
    decoder, both = add_lora(base, params, LoraConfig(rank=2))
    algorithm = dataclasses.replace(ra.ALGORITHMS["grpo"], kl_coef=0.1)

    def run(folder, steps, params):
        config = sums_run(tmp_path / folder, steps=steps, eval_prompts=4)
        usual = {"prompts": sums.problems("train")[:40], "eval_prompts": sums.problems("held-out")}
        how = {"reward": even, "decode": sums.decode, "algorithm": algorithm}
        return ra.fit(config, decoder=decoder, params=params, **usual, **how)

    whole = run("whole", 4, both)
    rows = ra.io.metrics.read_metrics(whole.folder / "metrics.jsonl")
    assert rows[0]["kl"] < 1e-9 < rows[3]["kl"]
    run("parts", 2, both)
    again = run("parts", 4, both)
    assert fingerprint(again.state.params) == fingerprint(whole.state.params)
    with Checkpoints(whole.folder / "checkpoints") as checkpoints:
        like = whole.state._replace(params=trained(whole.state.params))
        saved, _ = checkpoints.restore(None, like)
    assert set(saved.params) == {"lora"}
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (frozen(whole.state.params), params)), strict=True))
    other = {**both, "embedding": both["embedding"] + 1}
    with pytest.raises(ra.io.checkpoint.ConfigMismatch, match="reference_sha256"):
        run("parts", 6, other)


def test_the_sampler_and_the_trainer_agree():
    decoder, params = adapted(QWEN2)
    prompts = [np.arange(1, 5), np.arange(3, 10)]
    rollouts = ra.sample(decoder, params, prompts, seed=0, step=0, config=ra.SampleConfig(3, 5, eos_ids=(2,)))
    batch = ra.make_batch(ra.ALGORITHMS["grpo"], prompts, rollouts, np.arange(6.0), row_length=64)
    scored = ra.make_scorer(decoder)(params, batch.packed)
    np.testing.assert_allclose(scored[rollouts.mask], rollouts.logp[rollouts.mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "LoraConfig.rank=0"),
        ({"alpha": -1.0}, r"LoraConfig.alpha=-1.0"),
        ({"targets": ("query", "head")}, r"targets=\('query', 'head'\) must name some of query, key"),
        ({"targets": ()}, r"targets=\(\) must name"),
        ({"targets": ("up", "up")}, "each once"),
    ],
    ids=str,
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**change)


def test_models_that_are_refused():
    plain, params = ra.Decoder(GPT_NEOX), random_params(GPT_NEOX)
    with pytest.raises(ValueError, match="has 'gate', the model's projections are key, output, query, value, down, up"):
        add_lora(plain, params, LoraConfig())
    decoder, both = adapted(QWEN2)
    with pytest.raises(ValueError, match="has an adapter already: merge_lora first"):
        add_lora(decoder, both, CONFIG)
    with pytest.raises(ValueError, match="has no adapter: add_lora first"):
        merge_lora(decoder, without_lora(both))
    with pytest.raises(ValueError, match="use the decoder of add_lora"):
        logits(ra.Decoder(QWEN2), both, forest())


def test_an_adapter_is_not_lost_on_export(tmp_path):
    decoder, params = adapted(QWEN2)
    for one in (decoder, ra.Decoder(QWEN2)):
        with pytest.raises(ValueError, match=r"a folder has no place for: merge_lora\(decoder, params\)"):
            ra.save_pretrained(tmp_path, one, params)
    ra.save_pretrained(tmp_path, *merge_lora(decoder, params))
    read, again = ra.load_pretrained(tmp_path)
    np.testing.assert_allclose(logits(read, again, forest()), logits(decoder, params, forest()), rtol=0, atol=1e-5)
