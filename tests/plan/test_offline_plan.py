"""rlalign plan of fit_offline: what it reads, what it refuses, and that its numbers are those of a real run."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import rlalign as ra
from rlalign.cli import main
from rlalign.envs import sums
from rlalign.plan import Job, Topology, estimate, parse_topology, read_job
from rlalign.plan.compiled import _batch
from rlalign.plan.devices import CHIPS
from rlalign.plan.estimate import GIB
from rlalign.plan.flops import forward_flops, layer_weights, update_flops
from rlalign.train.offline import LEARNT_FROM, make_offline_batch, pack_examples
from rlalign.types import Preference, Rollouts, StopReason
from tests.tiny import QWEN2, sums_model

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "experiments" / "plans"
GENERATION = ra.SampleConfig(1, 5, eos_ids=(1,), greedy=True)
RUN = ra.OfflineConfig(
    folder="runs/planned",
    algorithm="gsil_bernoulli",
    examples_per_step=8,
    optimizer=ra.OptimizerConfig(),
    row_length=40,
    epochs=2.0,
    generation=GENERATION,
    prepare_size=6,
)
MODEL = dataclasses.replace(QWEN2, dtype="bfloat16")
JOB = Job(RUN, MODEL, prompt_length=9, response_length=7)
ONE = Topology("one", CHIPS["v5e"], 1)


def changed(run=(), **changes):
    return dataclasses.replace(JOB, run=dataclasses.replace(RUN, **dict(run)), **changes)


def test_a_step_counted_by_hand():
    """8 pairs of 9 + 7 and 9 + 5 tokens; 6 examples at a time are answered and scored, each once in two epochs."""
    plan = estimate(JOB, ONE)
    assert list(plan.phases) == ["rollout", "scoring", "update"]
    assert plan.tokens == 8 * (9 + 7 + 5)
    assert plan.repeated == 8 * (9 + 7 + 9 + 5)
    seen = lambda first, end: sum(i + 1 for i in range(first, end))  # keys before and at each query
    answers, both = seen(0, 14), seen(0, 16) + seen(9, 14)
    dense, attention = 2 * 2 * layer_weights(QWEN2), 2 * 2 * 2 * QWEN2.heads * QWEN2.head_width
    head = 2 * QWEN2.width * QWEN2.vocab_size
    share = 8 / 2  # of 8 examples a step, each seen twice, so many are new
    assert plan.flops["rollout"] == pytest.approx(share * (14 * dense + answers * attention + 5 * head))
    assert plan.flops["scoring"] == pytest.approx(share * (21 * dense + both * attention + 12 * head))
    assert plan.flops["update"] == pytest.approx(8 * (3 * 21 * dense + 3.5 * both * attention + 4 * 12 * head))
    cache = 2 * 2 * 6 * 2 * 128 * 2  # keys and values, layers, prompts, heads, lanes, bytes; a bucket holds 12 tokens
    activations = 4 * 6 * 17 * 4  # of logits
    rollout = plan.phases["rollout"]
    assert rollout.working == {"gathered weights": 17 * 16 * 2, "caches": cache * (12 + 5), "activations": activations}


PHASES = {
    "sft": (None, ["update"]),
    "dpo": (None, ["scoring", "update"]),
    "simpo": (None, ["update"]),
    "kto": (None, ["scoring", "update"]),
    "spin": (GENERATION, ["rollout", "scoring", "update"]),
}


@pytest.mark.parametrize("name", PHASES)
def test_an_algorithm_has_the_phases_that_it_needs(name):
    generation, phases = PHASES[name]
    job = changed({"algorithm": name, "generation": generation})
    assert list(estimate(job, ONE).phases) == phases
    expected = {"sft": (7,), "spin": (7, 5)}.get(name, (7, 7))
    assert {phase: work.responses for phase, work in job.load.phases.items() if phase != "rollout"} == dict.fromkeys(
        [phase for phase in phases if phase != "rollout"], expected
    )


def test_the_longest_response_is_the_generated_one_where_no_other_is_given():
    assert changed(response_length=None).load.phases["update"].responses == (5, 5)


def test_a_reward_model_has_no_head_over_the_vocabulary():
    job = changed(
        {"algorithm": "bradley_terry", "generation": None}, model=dataclasses.replace(MODEL, reward_head=True)
    )
    plan, policy = estimate(job, ONE), estimate(changed({"algorithm": "simpo", "generation": None}), ONE)
    assert list(plan.phases) == ["update"]
    work = job.load.phases["update"].counts(MODEL)
    assert plan.flops["update"] == update_flops(MODEL, **work | {"responses": 0})
    assert forward_flops(job.model, **work) == forward_flops(MODEL, **work | {"responses": 0})
    assert plan.flops["update"] < policy.flops["update"]


@pytest.mark.parametrize(("examples", "gib"), [(128, 3.828), (16, 2.549)])
def test_a_reward_models_update_is_within_a_tenth_of_the_compiled_program(examples, gib):
    """By libtpu 0.0.42.1 for 16 chips of a v5e; of few examples the embedding's gradient is the largest share."""
    model = dataclasses.replace(read_job(PLANS / "qwen2_5_1_5b.toml").model, reward_head=True)
    run = ra.OfflineConfig("runs/planned", "bradley_terry", examples, ra.OptimizerConfig(), row_length=1024)
    plan = estimate(Job(run, model, 512, fsdp=16, response_length=256), parse_topology("v5e:4x4"))
    assert plan.phases["update"].program / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"microbatches": 2}, {"num_rows": 16}, {"algorithm": "sft"}, {"algorithm": "dpo"}),
        {"row_length": 16, "examples_per_step": 3},
    ],
    ids=str,
)
def test_rows_are_those_of_packed_examples(changes):
    """Also where a row of 16 tokens takes one response of a pair, whose other one must go to the same part."""
    if "algorithm" in changes:
        changes = {**changes, "generation": None}
    job, rng = changed(changes, data=2), np.random.default_rng(1)
    algorithm, update = job.load.algorithm, job.load.phases["update"]
    kind, parts = LEARNT_FROM[algorithm.data], job.run.microbatches * job.shards

    def examples(count):
        draw = lambda length: rng.integers(0, 17, length)
        return [kind(draw(9), *map(draw, update.responses)) for _ in range(count)]

    reference = np.zeros((update.prompts * len(update.responses), max(update.responses)))
    how = {"row_length": job.run.row_length, "parts": parts, "num_rows": job.run.num_rows, "ref_logp": reference}
    real = make_offline_batch(algorithm, examples(update.prompts), **how)
    assert job.rows("update") * parts == len(real.packed.forest.token)
    planned = _batch(job)
    assert jax.tree.map(np.shape, planned) == jax.tree.map(np.shape, real._replace(ref_logp=planned.ref_logp))
    assert (planned.ref_logp is None) != algorithm.needs_reference
    if "scoring" in job.load.phases:
        scored = pack_examples(examples(6), row_length=job.run.row_length, parts=job.shards)
        assert job.rows("scoring") * job.shards == len(scored.forest.token)


def test_prepare_size_moves_what_an_iteration_prepares_and_nothing_else():
    small, large = (estimate(changed({"prepare_size": size}), ONE) for size in (6, 24))
    for phase in ("rollout", "scoring"):
        assert large.phases[phase].program > small.phases[phase].program
        assert large.flops[phase] == pytest.approx(small.flops[phase])
    assert large.phases["update"] == small.phases["update"]
    once = estimate(changed({"epochs": 0.5}), ONE)  # half of the examples are never seen, and never answered
    assert once.flops["rollout"] == pytest.approx(2 * small.flops["rollout"])


class Enough(Exception):
    """Raised by a sampler that has seen what it wanted."""


def test_what_lies_in_memory_while_fit_offline_answers(tmp_path):
    """Copies of the parameters: the policy's, two moments, what was given; no second model. And its config.json."""
    decoder = ra.Decoder(sums_model(16))
    size = sum(x.nbytes for x in jax.tree.leaves(decoder.init(0)) if x.size >= 256)

    def live():  # several arrays may be one buffer; no scalars
        return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if x.size >= 256}.values())

    def copies(name, calls, **changes):
        """While the policy answers, of each call; it leaves after so many."""
        before, found = live(), []

        def sampler(decoder, params, prompts, **how):
            found.append((live() - before) / size)
            if len(found) == calls:
                raise Enough
            token, prompt = np.full((len(prompts), 1), sums.EOS), np.arange(len(prompts))
            logp = np.zeros(token.shape, np.float32)
            return Rollouts(token, token == sums.EOS, logp, logp, np.full(len(prompts), StopReason.EOS), prompt)

        how = ra.SampleConfig(1, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,))
        run = dataclasses.replace(RUN, folder=str(tmp_path / name), iterations=2, epochs=1.0, generation=how, **changes)
        with pytest.raises(Enough):
            ra.fit_offline(
                run,
                decoder=decoder,
                params=decoder.init(0),
                examples=sums.demonstrations("train")[:6],
                sampler=sampler,
            )
        job = read_job(tmp_path / name / "config.json", prompt_length=6, response_length=3)
        assert job == Job(run, decoder.config, 6, response_length=3)
        phases = estimate(job, Topology("one", CHIPS["h100"], 1)).phases.values()
        whole = sum(x.nbytes for x in jax.tree.leaves(decoder.init(0)))
        held = {(sum(p.inputs.values()) + sum(p.beside.values())) / whole for p in phases}
        assert len(held) == 1
        return found, held.pop()

    for expected, calls, changes in ((4, 1, {}), (3, 2, {"keep_params": False})):
        real, planned = copies(str(expected), calls, **changes)
        assert planned == pytest.approx(expected, abs=0.01)
        assert real == pytest.approx([expected] * calls, abs=0.1)


WRONG = {
    "response": ({"run": {"generation": None}, "response_length": None}, "response_length is missing: .*longest resp"),
    "rollouts": ({"run": {"algorithm": "grpo"}}, "algorithm='grpo' learns from rollouts: use fit, or one of gsil_bern"),
    "imitation": ({"run": {"algorithm": "sft"}}, "generation is given, and algorithm='sft' learns from demonstrations"),
    "answers": ({"run": {"algorithm": "bradley_terry"}}, "trains a reward model, which cannot answer prompts"),
    "head": ({"run": {"algorithm": "bradley_terry", "generation": None}}, "the model lacks a reward head"),
    "headed": ({"model": dataclasses.replace(MODEL, reward_head=True)}, "the model has a reward head"),
    "row": ({"response_length": 32}, r"examples\[0\] needs 41 tokens \(prompt 9, .*, and row_length is 40: raise it"),
    "model": ({"run": {"row_length": 99}, "response_length": 60}, "69 tokens .* and the model's max_positions is 64"),
    "parts": ({"run": {"microbatches": 16}}, "examples_per_step=8 and num_rows=None for 16 parts"),
    "rows": ({"run": {"num_rows": 3}, "data": 2}, "num_rows=3 for 2 parts .* and rows that divide"),
    "eos": ({"run": {"generation": ra.SampleConfig(1, 5, eos_ids=(99,))}}, "generation.eos_ids holds 99, the vocab"),
    "endless": ({"run": {"generation": ra.SampleConfig(1, 5, eos_ids=())}}, "generation.eos_ids is empty: no response"),
    "judge": ({"judge": MODEL}, "judge is for runs of fit: the rewards of others come from elsewhere; leave it out"),
    "kind": ({"response_length": True}, "response_length=True must be an int, at least 1"),
    "heads": ({"tensor": 3}, "tensor=3 does not divide the model's 2 key/value heads"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_fail_later_is_refused_now(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        changed(**changes)


def test_the_responses_of_fit_have_their_length_from_sampling():
    run = ra.RunConfig("runs/planned", 4, 8, ra.SampleConfig(4, 5, eos_ids=(1,)), ra.OptimizerConfig(), 40)
    with pytest.raises(ValueError, match=r"response_length=7 is for runs of fit_offline: .*sampling.max_new_tokens"):
        Job(run, MODEL, 9, response_length=7)


FILES = {
    "both": ({"prompts_per_step": 8}, "has prompts_per_step and examples_per_step of prompts_per_step (a run"),
    "neither": ({"examples_per_step": None}, "has none of prompts_per_step (a run of fit), examples_per_step"),
    "setting": ({"sampling": {"num_samples": 1}}, "OfflineConfig has no setting 'sampling'; "),
    "near": ({"prepare_sise": 3}, "OfflineConfig has no setting 'prepare_sise'; did you mean 'prepare_size'?"),
    "group": ({"generation": {**dataclasses.asdict(GENERATION), "num_samples": 2, "greedy": False}}, "makes its pair"),
    "table": ({"generation": 3}, "generation=3 must be a table of SampleConfig's settings"),
    "choice": ({"truncated": "hide"}, "truncated must be 'keep' or 'drop', got 'hide'"),
    "missing": ({"algorithm": None}, "algorithm of OfflineConfig is missing"),
    "length": ({"generation": None, "response_length": None}, "response_length is missing"),
}


def as_file(folder, **changes):
    """JOB as JSON, with changes."""
    lengths = {"prompt_length": 9, "response_length": 7}
    values = {**dataclasses.asdict(RUN), **lengths, "decoder": dataclasses.asdict(MODEL), **changes}
    path = folder / "plan.json"
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return path


@pytest.mark.parametrize("case", FILES)
def test_what_a_file_must_not_say(case, tmp_path, capsys):
    changes, message = FILES[case]
    assert main(["plan", str(as_file(tmp_path, **changes)), "--topology", "v5e:1x1"]) == 2
    assert message in capsys.readouterr().err


def test_a_file_and_its_flags(tmp_path):
    path = as_file(tmp_path)
    assert read_job(path) == JOB
    assert read_job(path, response_length=3, data=2) == changed(response_length=3, data=2)
    assert main(["plan", str(path), "--topology", "v5e:1x1", "--response-length", "99"]) == 2
    imitation = as_file(tmp_path, algorithm="sft", generation=None)
    assert read_job(imitation) == changed({"algorithm": "sft", "generation": None})


def test_the_page_says_what_is_done_once_an_iteration(capsys):
    plan = ["plan", str(PLANS / "gsil_zephyr.toml"), "--topology"]
    assert main([*plan, "v5p:2x2x4"]) == 0
    page = capsys.readouterr().out
    assert "a step: 128 prompts of 512 and responses of 512 and 256: 163,840 tokens stored, 229,376 if" in page
    assert "once an iteration all are answered and scored, 256 examples at a time; the seconds below are" in page
    assert "GiB a device                 rollout     scoring      update\n" in page
    assert "reference  " not in page
    pair = changed({"algorithm": "dpo", "generation": None})
    assert estimate(pair, ONE).phases["scoring"].beside.keys() == {"optimizer", "given parameters"}
    assert Preference is LEARNT_FROM[pair.load.algorithm.data]
    plan[1] = str(PLANS / "qwen2_5_7b.toml")
    assert main([*plan, "v5p:2x2x4"]) == 0
    assert "once an iteration" not in capsys.readouterr().out


PAPER = {
    "gsil": (["gsil_self_imitation.py"], "gsil_zephyr", "7.24 billion"),
    "gprs": (["gprs_reward_quality.py"], "gprs_tldr", "8.03 billion"),
    "crpo": (["crpo_medqa.py"], "crpo_qwen2_5_3b", "3.09 billion"),
    "rule": (["gprs_reward_quality.py", "--reward", "rule"], "gprs_math", "7.62 billion"),
    "alfworld": (["gigpo_alfworld.py"], "gigpo_alfworld", "1.54 billion"),
    "webshop": (["gigpo_webshop.py"], "gigpo_webshop", "1.54 billion"),
}


LARGER = {"crpo": ("v5p:2x2x4", 16)}  # its answers of 4096 tokens are scored by the reference all at once


@pytest.mark.parametrize("case", PAPER)
def test_the_papers_preset_of_an_experiment_is_planned_and_not_run(case, tmp_path, monkeypatch, capsys):
    (script, *flags), plan, size = PAPER[case]
    topology, devices = LARGER.get(case, ("v5p:2x2x2", 8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "experiments")  # what some of them share
    monkeypatch.setattr(sys, "argv", [script, "--preset", "paper", "--topology", topology, *flags])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "experiments" / script), run_name="__main__")
    assert left.value.code == 0
    page, command, line = capsys.readouterr().out.rstrip().rsplit("\n", 2)
    assert page.startswith(f"{size} parameters in bfloat16")
    assert f"{topology}: {devices} devices of 95.74 GiB; mesh data 1 x fsdp {devices} x tensor 1" in page
    file = PLANS / f"{plan}.toml"
    assert command.endswith(f'make plan ARGS="{file} --topology {topology} --fsdp {devices} --compile"')
    planned = estimate(read_job(file, fsdp=devices), parse_topology(topology))
    assert json.loads(line)["missing_gib"] == round(planned.missing, 3)
    assert not list(tmp_path.iterdir())
