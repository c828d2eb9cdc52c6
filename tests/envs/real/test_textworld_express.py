"""TextWorldExpress's games, in Java; make test-envs."""

import random
import shutil

import pytest

pytest.importorskip("textworld_express", reason='pip install "rlalign[textworld-express]"')
if shutil.which("java") is None:
    pytest.skip("no java: apt-get install default-jre-headless", allow_module_level=True)

from rlalign.envs.textworld_express import TextWorldExpress


@pytest.mark.parametrize(("game", "params"), [("coin", "numLocations=5"), ("twc", ""), ("cookingworld", "")])
def test_its_own_solution_wins(game, params):
    world = TextWorldExpress(game, params, expert=True)
    seen = world.reset(1)
    assert seen.task
    while (action := world.expert()) is not None:
        done = world.step(action)
    assert done.terminated
    assert done.reward == 10.0
    assert done.info == (True, True, 1.0)
    with pytest.raises(RuntimeError, match="call reset"):
        world.step("look around")
    world.close()


def test_copies_of_one_java_machine_do_not_meet():
    worlds = [TextWorldExpress("twc") for _ in range(3)]
    assert len({id(world._java) for world in worlds}) == 1

    def alone(world, task):
        rng, seen = random.Random(task), [world.reset(task)]
        for _ in range(20):
            seen.append(world.step(rng.choice(seen[-1].admissible)).observation)
        return seen

    apart = [alone(worlds[0], task) for task in (0, 1, 1)]
    rngs = [random.Random(task) for task in (0, 1, 1)]
    together = [[world.reset(task)] for world, task in zip(worlds, (0, 1, 1), strict=True)]
    for _ in range(20):
        for world, rng, seen in zip(worlds, rngs, together, strict=True):
            seen.append(world.step(rng.choice(seen[-1].admissible)).observation)
    assert together == apart
    assert together[1] == together[2]


def test_what_is_not_admissible_changes_nothing():
    world = TextWorldExpress("coin", "numLocations=3", "dev", expert=True, horizon=3)
    seen = world.reset(0)
    done = world.step("fly away")
    assert not done.info.valid
    assert done.observation[1:] == seen[1:]
    assert world.expert() is None  # the path was left
    assert [world.step("look around").truncated for _ in range(2)] == [False, True]


def test_refusals():
    with pytest.raises(ValueError, match=r"'chess' with '' is refused.*games: cookingworld, twc"):
        TextWorldExpress("chess")
    with pytest.raises(ValueError, match="fold is 'all', must be one of train, dev, test"):
        TextWorldExpress("twc", fold="all")
