"""TextWorld's games, made here; make test-envs."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jericho", reason='pip install "rlalign[textworld]"')
pytest.importorskip("textworld", reason='pip install "rlalign[textworld]"')

from rlalign.envs.textworld import NOTHING, TextWorld


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    folder = tmp_path_factory.mktemp("games")
    make = str(Path(sys.executable).with_name("tw-make"))
    for seed in (1, 2):
        size = ["--world-size", "2", "--nb-objects", "4", "--quest-length", "3", "--seed", str(seed)]
        subprocess.run([make, "custom", *size, "--output", folder / f"{seed}.z8", "--silent"], check=True, timeout=300)
    return folder


def test_its_own_solution_wins(games):
    world = TextWorld(games)
    assert len(world.games) == 2
    for task in (0, 1):
        seen = world.reset(task)
        assert "TextWorld" in seen.task
        assert seen.text.startswith("-= ")
        done = None
        while (action := world.expert()) is not None:
            assert action in seen.admissible
            done = world.step(action)
            seen = done.observation
        assert done.terminated
        assert done.reward == 10.0
        assert done.info == (True, True, 1.0)
        with pytest.raises(RuntimeError, match="call reset"):
            world.step("look")
    world.close()


def test_equal_seeds_and_actions_show_the_same(games):
    one, other = TextWorld(games), TextWorld(sorted(str(path) for path in games.glob("*.json")))
    for task in (0, 1, 1):
        rng, seen = random.Random(task), one.reset(task)
        assert other.reset(task) == seen
        for _ in range(15):
            action = rng.choice(seen.admissible)
            done = one.step(action)
            assert other.step(action) == done
            assert "\n\n" not in done.observation.text
            seen = done.observation
            if done.terminated:
                break


def test_what_is_not_admissible_never_reaches_the_game(games):
    world = TextWorld(games, horizon=4)
    seen = world.reset(0)
    for action in ("quit", "undo", f"{seen.admissible[0]}. {seen.admissible[0]}"):
        done = world.step(action)
        assert done.observation == seen._replace(text=NOTHING)
        assert not done.info.valid
    assert world.step("look").truncated
