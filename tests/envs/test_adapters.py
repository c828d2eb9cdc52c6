"""What adapters refuse, and what needs no package of theirs."""

import doctest
import sys

import pytest

from rlalign.envs import alfworld, alfworld_expert, page
from rlalign.envs.adapters import Clock
from rlalign.envs.alfworld import Alfworld
from rlalign.envs.alfworld_games import generate_games
from rlalign.envs.textworld import TextWorld
from rlalign.envs.textworld_express import TextWorldExpress


@pytest.mark.parametrize("module", [alfworld, alfworld_expert])
def test_examples(module):
    done = doctest.testmod(module)
    assert done.attempted
    assert not done.failed


@pytest.mark.parametrize(
    ("modules", "make", "extra"),
    [
        (["alfworld", "alfworld.agents.utils.misc"], lambda folder: Alfworld([folder / "1"]), "alfworld"),
        (["alfworld", "alfworld.info"], lambda folder: generate_games(folder, 1), "alfworld"),
        (["textworld"], lambda folder: TextWorld(folder), "textworld"),
        (["textworld_express"], lambda _: TextWorldExpress("coin"), "textworld-express"),
    ],
)
def test_the_extra_to_install_is_named(modules, make, extra, tmp_path, monkeypatch):
    for suffix in (".z8", ".json"):
        (tmp_path / f"1{suffix}").touch()
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "rlalign\[{extra}\]"'):
        make(tmp_path)


def test_folders_without_games(tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"Alfworld: {tmp_path} has 0 files game.tw-pddl, none that can be"):
        Alfworld("$HERE")
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/\.cache/alfworld/json_2\.1\.1/train has 0 files"):
        Alfworld()
    with pytest.raises(FileNotFoundError, match="names no file"):
        Alfworld([])
    with pytest.raises(FileNotFoundError, match=r"has no game: tw-make tw-simple --output"):
        TextWorld(tmp_path)
    (tmp_path / "1.z8").touch()
    with pytest.raises(FileNotFoundError, match=r"there is no .*1\.json: tw-make writes it beside 1\.z8"):
        TextWorld(tmp_path)
    with pytest.raises(ValueError, match=r"1\.ulx is no game that textworld plays with texts"):
        TextWorld([tmp_path / "1.ulx"])


def test_games_that_alfworld_leaves_out(tmp_path):
    kept = "pick_and_place_simple-Mug-None-Desk-301"
    for name, solvable in (
        (kept, "true"),
        ("pick_and_place_simple-Pen-None-Desk-301", "false"),
        ("pick_and_place_with_movable_recep-Pen-Mug-Desk-301", "true"),
        ("pick_and_place_simple-AppleSliced-None-Fridge-1", "true"),
    ):
        (tmp_path / name / "trial_1").mkdir(parents=True)
        (tmp_path / name / "trial_1" / "game.tw-pddl").write_text(f'{{"solvable": {solvable}, "walkthrough": []}}')
    assert alfworld._found(str(tmp_path)) == (str(tmp_path / kept / "trial_1" / "game.tw-pddl"),)


def test_settings_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="anchor is 'all', must be 'carried', 'text' or 'state'"):
        Alfworld(tmp_path, anchor="all")
    with pytest.raises(ValueError, match="Alfworld: horizon is 0, must be at least 1"):
        Alfworld(tmp_path, horizon=0)
    with pytest.raises(ValueError, match="count is 0, seed is 0"):
        generate_games(tmp_path, 0)
    with pytest.raises(
        ValueError, match="kinds is 'pick', must be some of look_at_obj_in_light, pick_and_place_simple"
    ):
        generate_games(tmp_path, 1, kinds="pick")


def test_a_clock():
    clock = Clock("World", 2)
    with pytest.raises(RuntimeError, match=r"World\.step\('go'\) before reset: call reset\(seed\) first"):
        clock.tick("go")
    with pytest.raises(ValueError, match=r"World\.reset: seed is -1"):
        clock.start(-1)
    with pytest.raises(TypeError):
        clock.start("0")
    clock.start(0)
    clock.run()
    assert [clock.tick("go"), clock.running, clock.tick("go"), clock.running] == [False, True, True, False]
    with pytest.raises(RuntimeError, match="after the end of the episode"):
        clock.tick("go")


SLICE = "(:goal (isSliced ?o) (objectType ?o EggType) (receptacleType ?r DeskType))"
LOOK = (
    "(:goal (objectType ?ot DeskLampType) (isToggled ?ot) (inReceptacle ?ot ?r) (objectType ?o PenType) (holds ?a ?o))"
)


@pytest.mark.parametrize(
    ("problem", "goal"),
    [
        (LOOK, ("pen", "", "desklamp", "", 1)),
        (SLICE, None),
        ("(:goal (and))", None),
        (
            "(:init (isHot x)) (:goal (objectType ?o1 CupType) (receptacleType ?r ShelfType) (objectType ?o2 CupType))",
            ("cup", "shelf", "", "", 2),
        ),
    ],
)
def test_goals(problem, goal):
    assert alfworld_expert.goal_of(problem) == goal


def test_pages_are_read_as_they_are_marked():
    shown = page.Page(
        "http://127.0.0.1/a",
        "<p hidden>no</p><p>yes<br>too</i></p><style>p {}</style><div style='display: none'><p>no</div>"
        "<form action='b'><button class='x btn'>Go</button></form><button class='btn'>Nowhere</button>",
    )
    assert shown.texts == ["yes", "too", "Go", "Nowhere"]
    assert shown.clickable == {"go": page.Link("http://127.0.0.1/b", {})}
    assert (shown.task, shown.search, shown.reward) == ("", None, None)
