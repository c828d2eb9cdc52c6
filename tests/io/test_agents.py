"""fit_agent: what it logs, what it refuses, and that it continues where it was."""

import dataclasses
import json

import numpy as np
import pytest

import rlalign as ra
from rlalign.envs.episodes import Episode, Episodes
from rlalign.envs.prompting import bare
from rlalign.envs.protocol import End
from rlalign.envs.words import EOS
from rlalign.envs.worlds import Worlds
from rlalign.io.agents import fit_agent
from rlalign.io.canary import CAUSES
from rlalign.io.checkpoint import ConfigMismatch
from rlalign.io.config import AgentConfig
from rlalign.io.files import fingerprint
from rlalign.io.metrics import read_metrics
from rlalign.io.player import Player
from rlalign.io.updates import RunAborted
from rlalign.plan import read_job
from rlalign.types import Rollouts, StopReason
from tests.envs.corridor import Corridor
from tests.envs.test_episodes import DECODER, REBUILT, WORDS, either

EPISODES = Episodes(copies=4, max_steps=4, max_prompt=40, sampling=ra.SampleConfig(1, 2, eos_ids=(EOS,)))


def config(folder, **changes):
    base = AgentConfig(
        folder=str(folder),
        steps=4,
        tasks_per_step=2,
        episodes=EPISODES,
        optimizer=ra.OptimizerConfig(learning_rate=1e-2),
        row_length=64,
        num_rows=24,
        eval_every=2,
        eval_tasks=3,
        checkpoint_every=2,
    )
    return dataclasses.replace(base, **changes)


def test_answers_drawn_from_what_is_admissible_and_trained_so(tmp_path):
    run(config(tmp_path, minibatches=2, num_rows=None), parse=bare, write=WORDS.encode)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all(row["invalid_actions"] == 0 for row in rows[:-1])
    assert all(row["first_ratio_error"] <= 1e-4 and row["first_kl"] <= 1e-4 for row in rows[:1])
    assert rows[0]["entropy"] < 0.7  # of two actions, log 2 and the ends that are sure: not of the vocabulary
    free = tmp_path / "free"
    run(config(free), parse=bare)
    assert read_metrics(free / "metrics.jsonl")[0]["invalid_actions"] > 0.5


class Failing(Corridor):
    """A corridor that is out of order for odd tasks."""

    def reset(self, seed):
        if seed % 2:
            raise OSError("flooded")
        return super().reset(seed)


def run(settings, world=Corridor, horizon=4, **more):
    usual = {"decoder": DECODER, "params": DECODER.init(0), "tasks": range(20), "eval_tasks": range(100, 105)}
    usual |= {"form": REBUILT, "parse": either, "decode": WORDS.decode}
    with Worlds(world, copies=8, arguments={"length": 2, "horizon": horizon}) as worlds:
        return fit_agent(settings, **({"worlds": worlds} | usual | more))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps, and its parameters."""
    folder = tmp_path_factory.mktemp("agents")
    return folder, run(config(folder))


def test_a_run_logs_evaluates_and_shows_its_episodes(whole):
    folder, result = whole
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert sorted(result.accuracy) == [0, 2, 4]
    assert all(row["compiles"] == 0 for row in rows[3:]), "one shape: nothing compiles later"
    first = rows[0]
    assert first["ratio_error"] <= 1e-4
    assert first["environment_steps"] == pytest.approx(8 * first["episode_steps"])
    assert first["episodes_played"] == 8
    assert [row.get("alarms") for row in rows] == [0, 0, 0, 0, None]
    assert first["tokens_stored"] < first["tokens_repeated"]
    for name in ("anchor_share", "step_to_episode", "invalid_actions", "seconds_group", "loss", "kl", "score"):
        assert np.isfinite(first[name])
    job = read_job(folder / "config.json")  # what `rlalign plan` reads
    assert (job.run, job.model) == (config(folder), DECODER.config)
    assert (folder / "report.html").exists()
    assert "trajectories" in (folder / "trajectories.html").name
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    assert {line["step"] for line in trained} == {1, 3}
    assert len(trained) == 2 * 8
    turn = trained[0]["turns"][0]
    assert turn["advantage"] == pytest.approx(turn["episode"] + turn["step"], abs=1e-5)
    held_out = [line for line in lines if line["split"] == "held-out"]
    assert [line["seed"] for line in held_out] == [100, 101, 102] * 3
    assert held_out[0]["turns"][0]["advantage"] is None


def test_a_killed_run_continues_in_the_same_bits(whole, tmp_path):
    """A run that ends after two steps and is taken up again logs what the whole one did, and ends where it did."""
    folder, result = whole
    run(config(tmp_path, steps=2))
    again = run(config(tmp_path))
    assert fingerprint(again.state.params) == fingerprint(result.state.params)
    timeless = lambda row: {k: v for k, v in row.items() if "second" not in k and k != "compiles"}
    ours, theirs = ([timeless(row) for row in read_metrics(f / "metrics.jsonl")] for f in (tmp_path, folder))
    assert ours == theirs
    with pytest.raises(ConfigMismatch, match="prompts_sha256"):
        run(config(tmp_path), tasks=range(1, 21))
    with pytest.raises(ConfigMismatch, match=r"worlds\.arguments\.horizon"):
        run(config(tmp_path), horizon=5)
    with pytest.raises(ConfigMismatch, match=r"worlds\.parse"):
        run(config(tmp_path), parse=bare)
    with pytest.raises(ConfigMismatch, match=r"episodes\.penalty"):
        run(config(tmp_path, episodes=dataclasses.replace(EPISODES, penalty=0.5)))


def faulty(decoder, params, prompts, **how):
    """Equal prompts share a key, all answers are said to have ended, and log-probs are not those of what was drawn."""
    rollouts = ra.sample(decoder, params, prompts, at_least=(8, EPISODES.max_prompt), **how)
    first = {}
    rows = [first.setdefault(prompt.tokens.tobytes(), row) for row, prompt in enumerate(prompts)]
    rollouts = Rollouts(*(x[rows] for x in rollouts))
    ended = np.full_like(rollouts.stop, StopReason.EOS)
    return rollouts._replace(stop=ended, logp=rollouts.logp - 0.5 * rollouts.mask)


def test_the_canary_watches_episodes(tmp_path, caplog):
    steps = {"steps": 14, "eval_every": 14, "eval_tasks": 1, "checkpoint_every": 14}
    run(config(tmp_path / "run", **steps), sampler=faulty)
    told = [record.getMessage() for record in caplog.records if record.name.endswith("canary")]
    for kind in ("eos", "keys_in_group", "temperature"):
        assert sum(f"probably {CAUSES[kind]}" in text for text in told) == 1, (kind, told)
    assert "padding" not in {kind for kind, cause in CAUSES.items() for text in told if cause in text}
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["alarms"] == 1
    run(config(tmp_path / "off", steps=1, canary=False), sampler=faulty)
    assert "alarms" not in read_metrics(tmp_path / "off" / "metrics.jsonl")[0]


@pytest.mark.parametrize("name", ["grpo", "hgpo"])
def test_other_algorithms_run_too(name, tmp_path):
    run(config(tmp_path, steps=1, algorithm=name))
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert np.isfinite(first["loss"])
    assert "step_to_episode" not in first
    assert np.isfinite(first["anchor_share"])


def test_lost_episodes_are_counted_and_too_many_end_the_run(tmp_path):
    some = config(tmp_path / "some", steps=1, max_lost_share=0.6)
    run(some, world=Failing, tasks=[2, 3])
    first = read_metrics(tmp_path / "some" / "metrics.jsonl")[0]
    assert first["episodes_lost"] == 4
    assert first["reward"] == pytest.approx(10 * first["accuracy"]) != 0, "lost episodes are in neither"
    assert first["eval_lost"] == 1
    with pytest.raises(RunAborted) as error:
        run(config(tmp_path / "all", steps=1), world=Failing, tasks=[1, 3])
    assert "8 of 8 episodes of a step were lost to their environments" in error.value.reason
    assert "RAISED, raised OSError: flooded" in error.value.reason


class Recorded(Player):
    """A Player that plays from a table: task -> rewards of its two copies."""

    def __init__(self, settings, table):
        self.config, self.tasks, self.asked = settings, sorted(table), []

        def play(params, *, tasks, config, seed, step, attempt):
            assert attempt == len(self.asked)
            self.asked.append(list(tasks))
            return [
                Episode(g, task, (ended(reward),), End.WON, "", 1.0, None)
                for g, task in enumerate(tasks)
                for reward in table[task]
            ]

        self.play = play


def ended(reward):
    from tests.envs.test_prompting import turn

    return turn("a", "b", stop=StopReason.EOS)._replace(reward=reward)


def test_tasks_whose_episodes_are_alike_are_replaced(tmp_path):
    """Six of eight tasks teach nothing; what teaches is kept, and groups are numbered anew."""
    table = {task: (0.0, 0.0) if task > 1 else (0.0, 10.0) for task in range(8)}
    episodes = dataclasses.replace(EPISODES, copies=2)
    player = Recorded(config(tmp_path, resample=20, episodes=episodes), table)
    found, played = player._episodes(None, 0)
    assert [e.seed in (0, 1) for e in found] == [True] * 4
    assert [e.group for e in found] == [0, 0, 1, 1]
    assert len(played) == 2 * sum(map(len, player.asked)) > 4
    again = Recorded(player.config, table)
    assert again._episodes(None, 0)[0] == found or [e.seed for e in again._episodes(None, 0)[0]] == [
        e.seed for e in found
    ]
    plain = Recorded(dataclasses.replace(player.config, resample=0), table)
    plain._episodes(None, 0)
    assert len(plain.asked) == 1
    hopeless = Recorded(dataclasses.replace(player.config, resample=2), dict.fromkeys(range(8), (0.0, 0.0)))
    found, played = hopeless._episodes(None, 0)
    assert len(found) == 4
    assert len(played) == 12


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_lost_share": 2.0}, r"max_lost_share must lie in \[0, 1\], got 2.0"),
        ({"resample": -1}, "resample must be >= 0, got -1"),
        ({"row_length": 41}, "row_length=41 is below 42, a prompt of episodes.max_prompt=40"),
        ({"eval_temperature": 0.0}, "eval_temperature must be > 0 or None, got 0.0"),
        ({"algorithm": "gigp"}, "gigpo"),
        (
            {"optimizer": ra.OptimizerConfig(schedule="linear", total_steps=3)},
            r"total_steps=3 ends the learning rate before the run's 4 updates \(steps \* epochs \* minibatches\)",
        ),
    ],
)
def test_settings_are_checked_when_they_are_made(change, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        config(tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "more", "text"),
    [
        (
            {"tasks_per_step": 3},
            {},
            "tasks_per_step=3 with episodes.copies=4 are 12 episodes at a time, the worlds have 8",
        ),
        ({}, {"tasks": []}, "tasks must be task seeds >= 0, at least one"),
        ({}, {"eval_tasks": [3]}, "task 3 is in tasks and in eval_tasks"),
        ({"episodes": dataclasses.replace(EPISODES, copies=1)}, {}, "episodes.copies=1: a group of one"),
        ({"episodes": dataclasses.replace(EPISODES, max_prompt=95), "row_length": 128}, {}, "max_positions is 96"),
        ({"algorithm": "sft"}, {}, "this algorithm learns from demonstrations: use gigpo"),
        ({"minibatches": 40}, {}, "8 episodes of at most 4 steps are fewer rows than 40 parts"),
        ({"num_rows": 25, "minibatches": 2}, {}, "num_rows=25 does not divide into 2 parts"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(change, more, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        run(config(tmp_path / "run", **change), **more)
    assert not (tmp_path / "run").exists()
