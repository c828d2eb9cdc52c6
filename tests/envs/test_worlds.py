"""Copies side by side: what happens to one of them is its own affair, in this process and in workers."""

import os
import time

import pytest

from rlalign.envs.processes import WorkerWorlds
from rlalign.envs.protocol import End, Observation
from rlalign.envs.worlds import Lost, Worlds
from tests.envs.corridor import Careless, Corridor, Drifting, no_environment

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def both(**how):
    """The two kinds, with room for six copies."""
    yield Worlds(Corridor, copies=6, **how)
    yield WorkerWorlds(Corridor, copies=6, workers=2, step_limit=1.0, environment={"PYTHONPATH": ROOT}, **how)


@pytest.mark.parametrize("kind", [0, 1])
def test_copies_play_their_own_episodes(kind):
    with list(both(arguments={"length": 2}))[kind] as worlds:
        seen = worlds.reset({0: 0, 1: 1, 4: 0})
        assert {copy: s.text for copy, s in seen.items()} == {0: "at 0", 1: "at 1", 4: "at 0"}
        assert seen[0] == Observation("at 0", "go to 2", ("left", "right"), ("at", 0, (0,)))
        done = worlds.step({1: "right", 0: "right"})
        assert done[1].terminated
        assert done[1].info == (True, True, 1.0)
        assert done[1].reward == 10
        assert not done[0].terminated
        assert worlds.step({4: "jump"})[4].info.valid is False
        assert worlds.step({0: "right"})[0].info.won
        assert worlds.reset({1: 0})[1].text == "at 0"


@pytest.mark.parametrize("kind", [0, 1])
def test_what_raises_costs_its_own_episode(kind):
    with list(both())[kind] as worlds:
        seen = worlds.reset({0: 0, 1: 666, 2: 1})
        assert seen[1] == Lost(End.RAISED, seen[1].reason)
        assert "no such task" in seen[1].reason
        done = worlds.step({0: "raise", 2: "right"})
        assert done[0].end is End.RAISED
        assert "ValueError: out of order" in done[0].reason
        assert done[2].observation.text == "at 2"
        again = worlds.reset({0: 0, 1: 1})
        assert [again[0].text, again[1].text] == ["at 0", "at 1"]


@pytest.mark.parametrize(("action", "end"), [("hang", End.HUNG), ("die", End.DIED), ("exit", End.RAISED)])
def test_the_others_of_a_lost_worker_are_brought_back(action, end):
    """Copies 0, 2 and 4 share a worker; 2 has made steps, 4 waits behind the one that is lost."""
    with list(both())[1] as worlds:
        worlds.reset({0: 0, 2: 0, 4: 1})
        worlds.step({2: "right"})
        begin = time.monotonic()
        done = worlds.step({0: action, 2: "right", 4: "right"})
        assert time.monotonic() - begin < 20  # the limit is one second; the rest is starting a worker
        assert done[0].end is end
        assert done[2].observation.anchor == ("at", 2, (2,))
        assert done[4].observation.anchor == ("at", 2, (1,))
        assert worlds.restarts == (end is not End.RAISED)
        assert worlds.step({2: "right", 4: "right"})[2].info.won
        with pytest.raises(ValueError, match="copy 0 has no episode: reset it first"):
            worlds.step({0: "right"})
        assert worlds.reset({0: 0})[0].text == "at 0"


def test_a_copy_that_comes_back_otherwise_is_lost():
    how = {"copies": 3, "workers": 1, "step_limit": 1.0, "environment": {"PYTHONPATH": ROOT}}
    with WorkerWorlds(Drifting, **how) as worlds:
        worlds.reset({0: 0, 1: 0, 2: 0})
        done = worlds.step({0: "die", 1: "right"})
        assert done[0].end is done[1].end is End.DIED
        assert "another observation" in done[1].reason
        assert worlds.step({2: "right"})[2].end is End.DIED  # nobody had asked for it meanwhile
        assert isinstance(worlds.reset({0: 1})[0], Observation)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    ("action", "text"), [("short", "not a Transition"), ("none", "None"), ("nan", "must be finite")]
)
def test_what_an_environment_may_not_return_costs_its_episode(kind, action, text):
    make = (Worlds, WorkerWorlds)[kind]
    with make(Careless, copies=2, **(({}, {"workers": 1, "environment": {"PYTHONPATH": ROOT}})[kind])) as worlds:
        worlds.reset({0: 1, 1: 1})
        done = worlds.step({0: action, 1: "right"})
        assert done[0].end is End.RAISED
        assert text in done[0].reason
        assert type(done[1].reward) is float
        assert type(done[1].terminated) is bool


def test_copies_are_closed():
    Careless.closed = 0
    with Worlds(Careless, copies=3) as worlds:
        worlds.reset({0: 0, 1: 0})
        worlds.step({0: "none"})
        assert Careless.closed == 1
        worlds.reset({0: 0})
    assert Careless.closed == 3


def test_what_prints_disturbs_nothing():
    with list(both())[1] as worlds:
        worlds.reset({0: 0})
        assert worlds.step({0: "stray"})[0].info.valid is False
        assert worlds.restarts == 0


def test_closing_ends_the_processes():
    worlds = list(both())[1]
    pids = [worker._process.pid for worker in worlds._workers]
    worlds.close()
    worlds.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        worlds.reset({0: 0})


def test_refusals():
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        Worlds(Corridor, copies=0)
    with pytest.raises(RuntimeError, match="no corridor here"):
        Worlds(Corridor, copies=1, arguments={"broken": True})
    with pytest.raises(ValueError, match=r"the environment .*<lambda> .* is a lambda; it runs in other"):
        WorkerWorlds(lambda: Corridor(), copies=1, workers=1)
    with pytest.raises(ValueError, match="step_limit is 0; it must be positive and finite"):
        WorkerWorlds(Corridor, copies=1, workers=1, step_limit=0)
    with pytest.raises(ValueError, match=r"could not make the environment .*no_environment: OSError: java"):
        WorkerWorlds(no_environment, copies=1, workers=1, environment={"PYTHONPATH": ROOT})
    with Worlds(Corridor, copies=2) as worlds, pytest.raises(ValueError, match=r"copy 2 is not in \[0, 2\)"):
        worlds.reset({2: 0})
