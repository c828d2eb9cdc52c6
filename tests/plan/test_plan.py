"""rlalign plan: what it reads, what it refuses, and that its numbers are those of real arrays and real programs."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import rlalign as ra
from rlalign.cli import main
from rlalign.envs import sums
from rlalign.io.identity import run_identity
from rlalign.plan import Job, Topology, estimate, parse_topology, read_job
from rlalign.plan.compiled import Compiled, _batch
from rlalign.plan.devices import CHIPS
from rlalign.plan.estimate import GIB, _resident
from rlalign.plan.flops import forward_flops, layer_weights, mean_pairs, update_flops, visible_pairs
from rlalign.plan.text import as_json, missing_gib, page
from tests.graders import share_right
from tests.jaxprs import equations
from tests.tiny import GEMMA, GPT_NEOX, QWEN2, QWEN3, random_params, sums_model, sums_run

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "experiments" / "plans"
RECORD = json.loads(Path(__file__).with_name("compiled.json").read_text())

RUN = ra.RunConfig(
    folder="runs/planned",
    steps=4,
    prompts_per_step=8,
    sampling=ra.SampleConfig(4, 5, eos_ids=(1,)),
    optimizer=ra.OptimizerConfig(),
    row_length=40,
)
JOB = Job(RUN, dataclasses.replace(QWEN2, dtype="bfloat16"), prompt_length=9)


@pytest.mark.parametrize("row", RECORD["rows"], ids=lambda r: f"{r['plan']}-{r['topology']}-{r['program']}")
def test_the_closed_form_is_within_a_tenth_of_the_compiled_program(row):
    """benchmarks/aot_plan.py --write recorded what libtpu says; whether it fits, the two agree on too."""
    plan = estimate(read_job(PLANS / f"{row['plan']}.toml", **row["changes"]), parse_topology(row["topology"]))
    assert (plan.missing > 0) == any("refusal" in r for r in RECORD["rows"] if r["topology"] == row["topology"])
    if "gib" in row:
        assert plan.phases[row["program"]].program / GIB == pytest.approx(row["gib"], rel=0.1)


def test_what_lies_in_memory_while_fit_runs(tmp_path):
    """Copies of the parameters while a batch is judged: the policy's, two moments, what was given, the reference."""
    found = []

    def live():  # several arrays may be one buffer; no prompts and no scalars
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if x.size >= 256}.values())

    def judge(prompts, asked):
        found.append(live())
        return np.arange(len(asked.prompt), dtype=np.float32)

    decoder = ra.Decoder(sums_model(16))
    size = sum(x.nbytes for x in jax.tree.leaves(decoder.init(0)) if x.size >= 256)

    def copies(name, **changes):
        before = live()
        run = sums_run(tmp_path / name, steps=2, eval_prompts=2, **changes)
        asked = {"prompts": sums.problems("train")[:8], "eval_prompts": sums.problems("held-out")}
        how = {"reward": share_right, "decode": sums.decode, "judge": judge}
        ra.fit(run, decoder=decoder, params=decoder.init(0), **asked, **how)
        plan = estimate(Job(run, decoder.config, 6), Topology("one", CHIPS["h100"], 1)).phases["update"]
        held = sum(plan.inputs.values()) + sum(plan.beside.values())
        return (found[-1] - before) / size, held / sum(x.nbytes for x in jax.tree.leaves(decoder.init(0)))

    for expected, changes in (
        (4, {"algorithm": "grpo"}),
        (3, {"algorithm": "grpo", "keep_params": False}),
        (4, {"algorithm": "gprs"}),
        (3.5, {"algorithm": "gprs", "keep_params": False, "reference_dtype": "bfloat16"}),
    ):
        real, planned = copies("-".join(map(str, changes.values())), **changes)
        assert planned == pytest.approx(expected, abs=0.01), changes
        assert real == pytest.approx(expected, abs=0.1), changes


MESHES = ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2, "data": 4})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("lora", [None, ra.LoraConfig(rank=4)], ids=["all", "adapter"])
def test_parameters_and_optimizer_state_are_those_of_real_arrays(sizes, lora):
    job = dataclasses.replace(JOB, model=dataclasses.replace(JOB.model, lora=lora), **sizes)
    mesh, plain = ra.make_mesh(**sizes), dataclasses.replace(job.model, lora=None)
    decoder, params = ra.Decoder(plain), ra.place_params(random_params(plain), mesh)
    if lora:
        decoder, params = ra.add_lora(decoder, params, lora)
    state = ra.init_state(decoder, params, ra.make_optimizer(RUN.optimizer))

    def here(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    counted = _resident(job)[1]
    assert counted["parameters"] == here(state.params)
    assert counted["optimizer"] == here(state.opt_state)


@pytest.mark.parametrize("change", [{}, {"minibatches": 2}, {"microbatches": 2}, {"num_rows": 16}], ids=str)
def test_rows_are_those_of_a_packed_batch(change):
    job = dataclasses.replace(JOB, run=dataclasses.replace(RUN, **change), data=2)
    batch = _batch(job)
    parts = job.run.microbatches * job.shards
    assert batch.packed.forest.token.shape == (job.rows("update") * parts, RUN.row_length)


@pytest.mark.parametrize("model", [QWEN2, QWEN3, GEMMA, GPT_NEOX], ids=["qwen2", "qwen3", "gemma", "gpt_neox"])
def test_dense_operations_are_those_of_the_traced_model(model):
    """Of one layer, attention left out: every product of a forward, counted in its jaxpr."""
    model = dataclasses.replace(model, layers=1, window=None, full_layers=(), local_rope_theta=None)
    decoder = ra.Decoder(model, attention=lambda q, k, v, until, **_: q, plan=lambda until, **_: None)
    column = np.arange(6, dtype=np.int32)[None]
    forest = ra.TokenForest(column, column, column - 1, np.full_like(column, 6))
    traced = jax.make_jaxpr(lambda p: decoder.apply(p, forest) @ decoder.head(p))(random_params(model))
    counted = 0
    for e in equations(traced):
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            inner = math.prod(e.invars[0].aval.shape[axis] for axis in contracted)
            counted += 2 * inner * math.prod(e.outvars[0].aval.shape)
    assert forward_flops(model, tokens=6, pairs=0, responses=6) == counted


def test_an_update_is_three_forwards_and_pairs_are_counted_one_by_one():
    work = {"tokens": 10.0, "pairs": 0.0, "responses": 0.0}
    assert update_flops(QWEN2, **work) == 3 * forward_flops(QWEN2, **work)
    full = dataclasses.replace(QWEN2, remat="full")
    assert update_flops(full, **work) == 4 * forward_flops(full, **work)
    products = dataclasses.replace(QWEN2, remat="products")
    assert update_flops(products, **work) == update_flops(QWEN2, **work)
    adapted = dataclasses.replace(QWEN2, lora=ra.LoraConfig())
    assert update_flops(adapted, **work) == 2 * forward_flops(adapted, **work)
    assert layer_weights(GPT_NEOX) < layer_weights(dataclasses.replace(GPT_NEOX, gated_mlp=True))
    prompt, response, samples = 5, 3, 4
    own = sum(prompt + i + 1 for i in range(response))
    responses = [response] * samples
    assert visible_pairs(prompt, responses) == sum(i + 1 for i in range(prompt)) + samples * own
    for window in (1, 4, 6, 100):
        seen = lambda length, window=window: sum(min(i + 1, window) for i in range(length))
        both = seen(prompt) + samples * (seen(prompt + response) - seen(prompt))
        assert visible_pairs(prompt, responses, window) == both
    assert visible_pairs(prompt, [3, 1]) == visible_pairs(prompt, [3]) + prompt + 1  # the second's own
    half = dataclasses.replace(QWEN2, window=4, full_layers=(1,))
    pairs = [visible_pairs(prompt, responses, window) for window in (None, 4)]
    assert mean_pairs(half, prompt, responses) == sum(pairs) / 2


def test_what_moves_the_estimate_and_which_way():
    topology = parse_topology("v5e:2x2")

    def update(change, **model):
        run = dataclasses.replace(RUN, **change)
        job = Job(run, dataclasses.replace(JOB.model, **model), 9, fsdp=4)
        return estimate(job, topology)

    base = update({})
    for change in ({"prompts_per_step": 16}, {"reference_dtype": "float32", "algorithm": "gprs"}):
        assert update(change).missing > base.missing, change
    kept = lambda plan: plan.phases["update"].working["kept for the backward"]
    assert kept(update({})) > kept(update({}, remat="products")) > kept(update({}, remat="full"))
    assert kept(update({"microbatches": 2})) < kept(base)
    assert "scoring" not in base.phases
    assert "scoring" in update({"recompute_logp": True}).phases
    gprs = update({"algorithm": "gprs"})
    assert gprs.phases["scoring"].beside["reference"] == gprs.phases["update"].beside["reference"] > 0
    moments = update({"optimizer": ra.OptimizerConfig(mu_dtype="bfloat16")}).phases["update"].inputs["optimizer"]
    assert moments == pytest.approx(base.phases["update"].inputs["optimizer"] * 10 / 12, rel=0.01)
    slow = update({"sampling": dataclasses.replace(RUN.sampling, gather_weights=False)})
    assert slow.phases["rollout"].seconds["links"] == pytest.approx(5 * base.phases["rollout"].seconds["links"])


WRONG = {
    "prompt": ({"prompt_length": 60}, r"prompts\[0\] has 60 tokens, .* row_length is 40: raise row_length"),
    "endless": ({"run": {"sampling": {"eos_ids": ()}}}, "sampling.eos_ids is empty: no response would ever end"),
    "eos": ({"run": {"sampling": {"eos_ids": (99,)}}}, "sampling.eos_ids holds 99, the vocabulary has 17"),
    "group": ({"run": {"sampling": {"num_samples": 1}}}, "a group of one has no baseline"),
    "greedy": ({"run": {"sampling": {"greedy": True}}}, "greedy=True with num_samples=4: all samples of a group"),
    "parts": ({"run": {"minibatches": 64}}, "are 32 samples for 64 parts .* some would be empty; ask for more"),
    "rows": ({"run": {"num_rows": 3}, "data": 2}, "num_rows=3 does not divide into 2 parts"),
    "heads": ({"tensor": 3}, "tensor=3 does not divide the model's 2 key/value heads: choose a divisor of 2"),
    "sizes": ({"data": 0}, "data=0 must be an int, at least 1"),
    "pairs": ({"run": {"algorithm": "dpo"}}, "'dpo' learns from pairs"),
    "adapter": (
        {"run": {"reference_dtype": "bfloat16"}, "model": dataclasses.replace(JOB.model, lora=ra.LoraConfig())},
        "reference_dtype='bfloat16' with an adapter",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_fail_later_is_refused_now(case):
    changes, message = WRONG[case]
    changes = dict(changes)

    def build():
        run = dict(changes.pop("run", {}))
        if "sampling" in run:
            run["sampling"] = dataclasses.replace(RUN.sampling, **run["sampling"])
        return dataclasses.replace(JOB, run=dataclasses.replace(RUN, **run), **changes)

    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4:2x2x1", "unknown kind 'v4'; choose one of v5e, v5p"),
        ("v5e:2x2x1", "v5e comes in 2 positive sizes, as in 'v5e:4x4'"),
        ("v5p:2x2", "v5p comes in 3 positive sizes, as in 'v5p:2x2x4'"),
        ("h100:0", "h100 comes in 1 positive sizes, as in 'h100:8'"),
        ("v5e", "v5e comes in 2 positive sizes"),
        ("v5e:3x5", "v5e has no side of 3: sides are 1, 2 and multiples of 4, to 28"),
        ("v5e:1000x1000", "v5e has no side of 1000"),
        ("", "unknown kind ''"),
    ],
)
def test_topologies_that_do_not_exist(text, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(text)


def test_a_mesh_must_be_as_large_as_the_topology():
    with pytest.raises(ValueError, match="the mesh data=1 x fsdp=1 x tensor=1 has 1 devices, v5e:2x2 has 4"):
        estimate(JOB, parse_topology("v5e:2x2"))


def as_file(folder, **changes):
    """A plan as JSON: that of the 1.5B model with changes."""
    import tomllib

    values = tomllib.loads((PLANS / "qwen2_5_1_5b.toml").read_text())
    for name, value in changes.items():
        if value is None:
            values.pop(name)
        else:
            values[name] = {**values[name], **value} if isinstance(value, dict) and name in values else value
    path = folder / "plan.json"
    path.write_text(json.dumps(values))
    return path


FILES = {
    "setting": ({"promts_per_step": 1}, "RunConfig has no setting 'promts_per_step'; did you mean 'prompts_per_step'"),
    "nested": ({"sampling": {"best_of": 4}}, "sampling: SampleConfig has no setting 'best_of'; it has num_samples"),
    "model": ({"decoder": {"widht": 4}}, "decoder: ModelConfig has no setting 'widht'; did you mean 'width'"),
    "missing": ({"steps": None}, "steps of RunConfig is missing"),
    "prompt": ({"prompt_length": None}, "prompt_length is missing: the tokens of the longest prompt"),
    "axis": ({"mesh": {"expert": 2}}, "mesh has 'expert'; its axes are data, fsdp, tensor"),
    "table": ({"mesh": 16}, "mesh is 16, not a table"),
    "kind": ({"steps": "many"}, "plan.json: steps='many' must be int"),
    "optional": ({"num_rows": 1.5}, "num_rows=1.5 must be int or null"),
    "truth": ({"decoder": {"tied_head": 1}}, "decoder: tied_head=1 must be bool"),
    "length": ({"prompt_length": "long"}, "prompt_length='long' must be an int"),
    "size": ({"mesh": {"fsdp": "16"}}, "fsdp='16' must be an int"),
    "nested kind": ({"sampling": 3}, "sampling=3 must be a table of SampleConfig's settings"),
    "no table": ({"optimizer": 3}, "optimizer=3 must be a table of OptimizerConfig's settings"),
    "adapter": ({"decoder": {"lora": 3}}, "lora=3 must be a table of LoraConfig's settings"),
    "folder": ({"pretrained": 3}, "pretrained=3 must be the path of a Hugging Face folder"),
    "value": ({"optimizer": {"learning_rate": -1.0}}, "optimizer: learning_rate must be > 0, got -1.0"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_a_file_must_not_say(case, tmp_path, capsys):
    changes, message = FILES[case]
    path = as_file(tmp_path, **changes)
    assert main(["plan", str(path), "--topology", "v5e:4x4"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("rlalign plan: ")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.toml", None, "none.toml is not a file"),
        ("bad.toml", "steps = ", "bad.toml is not TOML"),
        ("bad.json", "{", "bad.json is not JSON"),
        ("list.json", "[1]", "list.json holds a JSON list, not an object"),
    ],
)
def test_files_that_are_none(name, text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["plan", str(tmp_path / name), "--topology", "v5e:4x4"]) == 2
    assert message in capsys.readouterr().err


def test_the_page_says_whether_it_fits_and_what_would_help(capsys):
    plan = ["plan", str(PLANS / "qwen2_5_7b.toml"), "--topology"]
    assert main([*plan, "v5p:2x2x4"]) == 0
    page = capsys.readouterr().out
    assert "7.62 billion parameters in bfloat16" in page
    assert "fits: " in page
    assert main([*plan, "v5e:2x2", "--fsdp", "4"]) == 1
    page = capsys.readouterr().out
    assert "DOES NOT FIT: " in page
    assert "GiB missing on each device in the update: parameters and optimizer alone are 24.83 GiB" in page
    assert "What helps: more fsdp or tensor; an adapter" in page
    assert main([*plan, "v5e:2x2", "--fsdp", "4", "--json"]) == 1
    line = json.loads(capsys.readouterr().out)
    assert line["missing_gib"] > 9
    assert line["phases"]["update"]["gib"]["optimizer"] == pytest.approx(7.62 * 12e9 / 4 / GIB, rel=0.01)


def test_a_judge_lies_in_memory_all_the_time(tmp_path):
    """From a plan's table, from its folder, and from what `fit` wrote; in bytes of real arrays."""
    model = dataclasses.replace(QWEN3, reward_head=True)
    mesh = ra.make_mesh(fsdp=4)
    real = ra.place_params(random_params(model), mesh)
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(real))
    judge = ra.make_judge(ra.Decoder(model), real, row_length=64)
    written = run_identity(ra.Decoder(QWEN2), ra.ALGORITHMS["grpo"], {}, [], judge)["judge"]
    shape = {name: value for name, value in dataclasses.asdict(model).items() if name != "reward_head"}
    run = {**dataclasses.asdict(RUN), "prompt_length": 9, "mesh": {"fsdp": 4}, "decoder": dataclasses.asdict(QWEN2)}
    path, topology = tmp_path / "plan.json", parse_topology("v5e:2x2")
    without = estimate(Job(RUN, QWEN2, 9, fsdp=4), topology)
    for table in (written, {"decoder": shape}):
        path.write_text(json.dumps({**run, "judge": table}, default=str))
        plan = estimate(read_job(path), topology)
        assert plan.job.judge == model
        assert plan.phases["judging"].inputs == {"reward model": here}
        for name, phase in without.phases.items():
            assert plan.phases[name].total == phase.total + here
    for nothing in (None, "module.function", {"function": "module.function"}):
        path.write_text(json.dumps({**run, "judge": nothing}))
        assert read_job(path).judge is None


def test_the_compilers_word_counts_where_it_was_asked():
    plan = estimate(read_job(PLANS / "qwen2_5_7b.toml"), parse_topology("v5p:2x2x4"))
    assert plan.missing < 0
    told = {"rollout": Compiled(20 * GIB, 1.0), "update": Compiled(20 * GIB, 1.0)}
    assert "by the compiler" in page(plan, told)
    large = told | {"update": Compiled(97 * GIB, 1.0)}
    assert "DOES NOT FIT: 1.26 GiB missing on each device in the update" in page(plan, large)
    assert max(missing_gib(plan, large).values()) == pytest.approx(97 - 95.74)
    refused = told | {"rollout": Compiled(float("inf"), 1.0, "RESOURCE_EXHAUSTED: too much")}
    assert "RESOURCE_EXHAUSTED: too much" in page(plan, refused)
    assert not json.loads(as_json(plan, refused))["fits"]


def test_sizes_that_the_mesh_does_not_divide_are_said(capsys):
    plan = ["plan", str(PLANS / "qwen2_5_1_5b.toml"), "--topology", "h100:15", "--fsdp", "15"]
    main(plan)
    assert "fsdp=15 and tensor=1 do not divide all of the model's sizes: 2.88 GiB" in capsys.readouterr().out


QWEN2_FOLDER = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "torch_dtype": "float32",
}


def test_a_model_is_read_from_its_folder_and_changed(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN2_FOLDER))
    run = {**dataclasses.asdict(RUN), "prompt_length": 9, "pretrained": "model", "mesh": {"fsdp": 2}}
    lora = {"rank": 3, "targets": ["query"]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**run, "decoder": {"dtype": "bfloat16", "remat": "full", "lora": lora}}))
    job = read_job(path)
    assert (job.model.layers, job.model.width, job.model.dtype, job.model.remat) == (3, 16, "bfloat16", "full")
    assert job.model.lora == ra.LoraConfig(rank=3, targets=("query",))
    assert job.sizes == (1, 2, 1)
    assert read_job(path, fsdp=4).sizes == (1, 4, 1)
    assert job.run == RUN
    path.write_text(json.dumps({**run, "pretrained": "elsewhere"}))
    with pytest.raises(FileNotFoundError, match="elsewhere is not a folder; download the model first"):
        read_job(path)
