"""ALFWorld's games, made here from what its wheel ships; make test-envs."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fast_downward", reason='pip install "rlalign[alfworld]"')
pytest.importorskip("alfworld", reason='pip install "rlalign[alfworld]"')

from rlalign.envs.alfworld import NOTHING, Alfworld
from rlalign.envs.alfworld_games import TASKS, generate_games
from rlalign.envs.processes import WorkerWorlds
from rlalign.envs.worlds import Lost


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    folder = tmp_path_factory.mktemp("games")
    generate_games(folder, len(TASKS), seed=3)
    return folder


def played(world, task, steps):
    """All that an episode of random admissible actions shows."""
    rng, seen = random.Random(task), [world.reset(task)]
    for _ in range(steps):
        done = world.step(rng.choice(seen[-1].admissible))
        seen.append(done.observation)
        if done.terminated or done.truncated:
            break
    return seen


def digest(folder):
    """Of what random episodes show."""
    world = Alfworld(folder)
    return hashlib.sha256(repr([played(world, task, 12) for task in range(3)]).encode()).hexdigest()


def test_the_expert_solves_a_game_of_each_kind(games):
    world = Alfworld(games)
    assert len(world.games) == len(TASKS)
    for task in range(len(TASKS)):
        seen = world.reset(task)
        assert seen.text.startswith("You are in the middle of a room.")
        assert seen.task
        assert "Your task" not in seen.text
        assert {"inventory", "look"} < set(seen.admissible)
        while True:
            action = world.expert()
            assert action in seen.admissible
            seen, reward, terminated, truncated, info = world.step(action)
            assert not truncated
            assert (reward == 10.0) == terminated == info.won == bool(info.score)
            if terminated:
                break
        assert world.expert() is None
        with pytest.raises(RuntimeError, match="after the end of the episode: call reset"):
            world.step("look")
    world.close()


def test_the_expert_goes_on_from_anywhere(games):
    world = Alfworld(games, horizon=200)
    for task in range(len(TASKS)):
        rng, seen = random.Random(task), world.reset(task)
        for _ in range(25):
            done = world.step(rng.choice(seen.admissible))
            seen = done.observation
            if done.terminated:
                break
        while not (done.terminated or done.truncated):
            done = world.step(world.expert())
        assert done.info.won, seen.task


def test_equal_seeds_and_actions_show_the_same(games):
    one, other = Alfworld(games), Alfworld(games)
    for task in (0, 3, 3):
        assert played(one, task, 15) == played(other, task, 15)
    one.reset(1), other.reset(1)  # side by side, with another game before
    for action in ("look", "inventory", one.expert()):
        assert one.step(action) == other.step(action)
    one.close()
    assert one.reset(1) == other.reset(1)  # a closed one can begin again


def test_other_processes_show_the_same(games):
    here = digest(games)
    for hashes in ("1", "2"):
        code = (
            f"import sys; sys.path[:0] = {sys.path!r}; from test_alfworld import digest; print(digest({str(games)!r}))"
        )
        environ = {**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": os.path.dirname(__file__)}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == here, done.stderr[-2000:]


def test_what_is_not_admissible_changes_nothing(games):
    world = Alfworld(games, anchor="state", horizon=4)
    seen = world.reset(0)
    for action in ("fly away", "", "take moon 1 from sky 1"):
        done = world.step(action)
        assert done.observation.text == NOTHING
        assert done.observation[1:] == seen[1:]
        assert not done.info.valid
        assert not done.truncated
    done = world.step("look")
    assert done.info.valid
    assert done.truncated
    assert not done.terminated


def test_anchors(games):
    carried, text, state = (Alfworld(games, anchor=kind) for kind in ("carried", "text", "state"))
    worlds = carried, text, state
    first = [world.reset(1) for world in worlds]
    assert first[1].anchor is None
    assert first[0].anchor == (first[0].text, ())
    for action in ("look", "inventory"):
        assert state.step(action).observation.anchor == first[2].anchor
    while not carried.step(carried.expert()).observation.anchor[1]:
        pass
    assert carried.step("look").observation.anchor[1][0].startswith("holds ")


def resident(worlds):
    """MiB of all workers."""
    pids = [worker._process.pid for worker in worlds._workers]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_128_copies_in_four_processes_do_not_grow(games):
    """2,048 steps, twice from the start: what grows with steps or with resets would show."""
    with WorkerWorlds(Alfworld, copies=128, workers=4, arguments={"games": str(games)}, step_limit=60.0) as worlds:
        sizes = []
        for round_ in range(2):
            seen = worlds.reset({copy: copy % len(TASKS) for copy in range(128)})
            for step in range(8):
                rngs = {copy: random.Random(f"{copy} {step}") for copy in seen}
                after = worlds.step({copy: rngs[copy].choice(one.admissible) for copy, one in seen.items()})
                assert not any(isinstance(one, Lost) for one in after.values())
                seen = {copy: done.observation for copy, done in after.items() if not done.terminated}
                sizes.append(resident(worlds))
            assert len(seen) > 100, round_
        assert worlds.restarts == 0
        print(f"workers: {sizes[0]:.0f} MiB after 128 steps, {sizes[7]:.0f} after 1,024, {sizes[-1]:.0f} after 2,048")
        assert sizes[-1] < 1.1 * sizes[7]


def test_made_games_follow_from_their_seed(games, tmp_path):
    again = generate_games(tmp_path, 2, seed=3)
    for path in again:
        for file in path.parent.iterdir():
            assert file.read_bytes() == (games / path.parent.relative_to(tmp_path) / file.name).read_bytes()


def test_games_that_are_none(games, tmp_path):
    (tmp_path / "game.tw-pddl").write_text('{"solvable": true, "pddl_domain": "", "grammar": "", "pddl_problem": ""}')
    with pytest.raises(RuntimeError, match=r"game\.tw-pddl is no game of ALFWorld"):
        Alfworld(tmp_path).reset(0)
