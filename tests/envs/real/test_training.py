"""Whole iterations of fit_agent in real environments; make test-envs. The policy knows hashes of words and says the
number of an action: what is tested is the machinery."""

import importlib.util
import shutil
import zlib

import numpy as np
import pytest

import rlalign as ra
from rlalign.envs.episodes import Episodes
from rlalign.envs.processes import WorkerWorlds
from rlalign.envs.prompting import rebuilt
from rlalign.envs.worlds import Worlds
from rlalign.io.agents import fit_agent
from rlalign.io.config import AgentConfig
from rlalign.io.files import fingerprint
from rlalign.io.metrics import read_metrics

EOS, IDS, CHOICES = 1, 256, 40
DECODER = ra.Decoder(
    ra.ModelConfig(
        vocab_size=IDS, width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp_width=32, max_positions=1024,
        tied_head=True,
    )
)  # fmt: skip


def encode(text):
    """A token a word, many words a token: the texts of these worlds are open."""
    return np.array([2 + zlib.crc32(word.encode()) % (IDS - 2) for word in text.lower().split()], np.int32)


def decode(ids):
    return " ".join(str(i % CHOICES) for i in ids)


def chosen(answer, admissible):
    """An answer is the number of an action; of more than there are none."""
    number = int(answer.split()[0]) if answer else len(admissible)
    return (admissible[number], True) if number < len(admissible) else ("", False)


def iterate(folder, worlds, tasks):
    """Two steps and their evaluations."""
    episodes = Episodes(copies=4, max_steps=5, max_prompt=960, sampling=ra.SampleConfig(1, 2, eos_ids=(EOS,)))
    config = AgentConfig(
        folder=str(folder), steps=2, tasks_per_step=2, episodes=episodes, row_length=1024, eval_every=1, eval_tasks=2,
        optimizer=ra.OptimizerConfig(learning_rate=1e-2),
    )  # fmt: skip
    how = {"form": rebuilt(encode, history=2), "parse": chosen, "decode": decode, "worlds": worlds}
    train, held_out = tasks
    result = fit_agent(
        config, decoder=DECODER, params=DECODER.init(0), tasks=train, eval_tasks=held_out,
        algorithm=ra.ALGORITHMS["gigpo"], **how,
    )  # fmt: skip
    return read_metrics(folder / "metrics.jsonl"), result


def check(rows, result):
    """Steps were taken, anchors found, and the policy has changed by what it was told."""
    steps = [row for row in rows if "environment_steps" in row]
    assert [row["step"] for row in steps] == [0, 1]
    for row in steps:
        assert row["episodes_played"] == 8
        assert row["episodes_lost"] == 0
        assert 8 <= row["environment_steps"] <= 40
        assert row["ratio_error"] <= 1e-4
        assert 0 < row["invalid_actions"] < 1, "or the penalty teaches nothing"
        assert row["anchor_share"] > 0
        assert np.isfinite(row["loss"])
    assert any(row["grad_norm"] > 0 for row in steps)
    assert sorted(result.accuracy) == [0, 1, 2]
    assert fingerprint(result.state.params) != fingerprint(DECODER.init(0))


@pytest.mark.skipif(
    importlib.util.find_spec("textworld_express") is None or shutil.which("java") is None,
    reason='pip install "rlalign[textworld-express]", and Java',
)
def test_gigpo_in_textworld_express(tmp_path):
    from rlalign.envs.textworld_express import TextWorldExpress

    arguments = {"game": "coin", "params": "numLocations=4", "horizon": 5}
    with Worlds(TextWorldExpress, copies=8, arguments=arguments) as worlds:
        check(*iterate(tmp_path, worlds, (range(16), range(100, 102))))


@pytest.mark.skipif(importlib.util.find_spec("alfworld") is None, reason='pip install "rlalign[alfworld]"')
def test_gigpo_in_alfworld_in_worker_processes(tmp_path):
    from rlalign.envs.alfworld import Alfworld
    from rlalign.envs.alfworld_games import generate_games

    generate_games(tmp_path / "games", 4, seed=3)
    arguments = {"games": str(tmp_path / "games"), "horizon": 5}
    with WorkerWorlds(Alfworld, copies=8, workers=2, arguments=arguments, step_limit=60.0) as worlds:
        check(*iterate(tmp_path / "run", worlds, (range(2), range(2, 4))))
