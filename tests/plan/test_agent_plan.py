"""Plans of fit_agent: its phases against hand counts, what it refuses, and the config.json of a run."""

import dataclasses
import pathlib

import pytest

import rlalign as ra
from rlalign.envs.episodes import Episodes
from rlalign.plan import estimate, read_job
from rlalign.plan.devices import CHIPS, Topology
from rlalign.plan.job import Job
from rlalign.plan.text import page

MODEL = ra.ModelConfig(
    vocab_size=64, width=16, layers=2, heads=2, kv_heads=2, head_width=8, mlp_width=32, max_positions=64, tied_head=True
)
RUN = ra.AgentConfig(
    folder="runs/planned",
    steps=3,
    tasks_per_step=4,
    episodes=Episodes(copies=2, max_steps=5, max_prompt=20, sampling=ra.SampleConfig(1, 4, eos_ids=(1,))),
    optimizer=ra.OptimizerConfig(),
    row_length=48,
    minibatches=2,
    microbatches=2,
    epochs=2,
)
PLANS = pathlib.Path(__file__).parents[2] / "experiments" / "plans"
ONE = Topology("one", CHIPS["h100"], 1)


def test_a_step_is_all_episodes_of_the_longest():
    job = Job(RUN, MODEL, 20)
    phases = job.load.phases
    assert list(phases) == ["rollout", "scoring", "update"]
    assert (phases["rollout"].prompts, phases["rollout"].calls) == (8, 5)
    assert (phases["scoring"].prompts, phases["scoring"].calls) == (10, 4)
    assert (phases["update"].prompts, phases["update"].calls, phases["update"].parts) == (40, 2, 4)
    plan = estimate(job, ONE)
    assert plan.tokens == 40 * 24
    assert plan.repeated == plan.tokens, "prompts that share nothing"
    assert plan.flops["rollout"] == pytest.approx(plan.flops["scoring"])  # each token once, forward
    assert "a step: 40 prompts of 20 and a response of 4: 960 tokens stored" in page(plan, {})
    free = dataclasses.replace(RUN, algorithm="grpo")
    assert list(Job(free, MODEL, 20).load.phases) == ["rollout", "update"], "no KL: no reference"


@pytest.mark.parametrize(
    ("run", "job", "text"),
    [
        ({}, {"prompt_length": 30}, "prompt_length=30 and response_length=None of a run of fit_agent: .*max_prompt=20"),
        ({}, {"response_length": 4}, "response_length=4 of a run of fit_agent"),
        ({}, {"judge": MODEL}, "judge is for runs of fit"),
        ({"algorithm": "dpo"}, {}, "this algorithm learns from pairs"),
        ({"minibatches": 99}, {}, "fewer rows than 198 parts"),
        ({"row_length": 128, "episodes": dataclasses.replace(RUN.episodes, max_prompt=61)}, {}, "max_positions is 64"),
        (
            {"episodes": dataclasses.replace(RUN.episodes, sampling=ra.SampleConfig(1, 4, eos_ids=()))},
            {},
            "episodes.sampling.eos_ids is empty",
        ),
    ],
)
def test_what_would_fail_later_is_refused_now(run, job, text):
    settings = dataclasses.replace(RUN, **run)
    with pytest.raises(ValueError, match=text):
        Job(settings, MODEL, **({"prompt_length": settings.episodes.max_prompt} | job))


def test_the_papers_plans_are_read():
    for name in ("gigpo_alfworld", "gigpo_webshop"):
        job = read_job(PLANS / f"{name}.toml")
        assert (job.run.tasks_per_step, job.run.episodes.copies) == (16, 8)
        assert job.prompt_length == job.run.episodes.max_prompt
