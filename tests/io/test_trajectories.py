"""The page of what agents did."""

import itertools
import json
import random
import re
import shutil
import subprocess

import pytest

from rlalign import cli
from rlalign.envs.protocol import End
from rlalign.io import trajectory_group
from rlalign.io.trajectories import write_trajectories
from tests.io.episodes import Page, episode, page_of, three_copies, turn, turns_of, without, write

HOSTILE = (
    "</script></pre><img src=x onerror=\"document.title='owned'\">"
    '<script>document.title="owned"</script>\x1b\u202e\ud800'
)
CHROMIUM = shutil.which("chromium")


def test_every_turn_is_there_once_with_what_happened(tmp_path):
    page = page_of(tmp_path, three_copies())
    assert [one["id"] for one in turns_of(page)] == [
        *("train-40-0-c0-t1", "train-40-0-c0-t2", "train-40-0-c0-t3", "train-40-0-c1-t1", "train-40-0-c2-t1"),
        "held-out-40-0-c0-t1",
    ]
    assert not page.one("body").classes  # "js" hides: nothing does before the script has run
    first = turns_of(page)[0]
    assert first.one("pre", "seen").text == "you see state 5."
    assert first.one("p", "act").text == "go to fridge 1"
    assert first.one("li", "taken").text == "go to fridge 1 ← taken"
    assert [one.text for one in first.one("ul", "admissible").all("li")][1] == "go to sinkbasin 1"
    answer, admissible = first.all("details")
    assert (answer["open"], admissible["open"]) == (None, None)
    assert answer.text == "answer · 87 tokens <think>well</think><action>go to fridge 1</action>"
    group = page.one("section", id="train-40-0")
    assert group.one("h2").text == "put a clean apple in the fridge"
    assert group.one("ul", "chips").text == "seed 12 1 of 3 copies won mean return 10 1 lost 5 steps 2 states, 1 shared"
    assert page.one("details", id="train-40-0-c0").one("h3").parent.text == (
        "Copy 0 ✓ won score 1 · return 10 · 3 steps"
    )
    assert "exit code 9" in page.one("details", id="train-40-0-c2").text
    assert page.one("details", id="train-40-0-c0").text.endswith("end you put it there.")
    assert page.one("nav").text == ("copies that won, of each task group 0 step 40 train 1/3 step 40 held-out 1/1")


@pytest.mark.parametrize("end", End)
def test_every_end_has_words(tmp_path, end):
    tag = page_of(tmp_path, [episode(end=end.name)]).one("details", id="train-40-0-c0").one("span", "tag")
    assert end.name.lower().replace("_", " ") in tag.text
    assert tag["title"].startswith("lost") == end.lost
    assert ("right" in tag.classes) == (end == End.WON)


def test_advantages_are_numbers_and_bars(tmp_path):
    turns = [turn(advantage=0.31, episode=0.2, step=0.11), turn(advantage=-1.5, episode=0.25, step=-1.75)]
    turns += [turn(advantage=2.0, episode=None, step=None), turn(advantage=None, episode=None, step=None)]
    page = page_of(tmp_path, [episode(turns)])
    up, down, whole, none = turns_of(page)
    assert up.one("p", "adv")["title"] == "advantage +0.31, episode +0.2, step +0.11"
    assert up.one("p", "adv").text == "+0.310 episode +0.200 step +0.110"
    assert down.one("p", "adv").text == "−1.500 episode +0.250 step −1.750"
    assert whole.one("p", "adv").text == "+2.000"
    assert not list(none.all("p", "adv"))
    # 58 units are the largest number, 2; a bar lies on its side of the line at 60.
    bars = [(one["class"], float(one["x"]), float(one["width"])) for one in down.all("rect")]
    assert bars == [
        ("e", 60.0, pytest.approx(0.25 * 29, abs=0.1)),
        ("s", pytest.approx(60 - 1.75 * 29, abs=0.1), pytest.approx(1.75 * 29, abs=0.1)),
    ]
    assert [one["class"] for one in whole.all("rect")] == ["whole"]
    cells = list(page.one("span", "cells").all("a"))
    assert [[i["class"] for i in one.all("i")] for one in cells] == [["above"], ["below"], ["above"], []]
    assert [one["style"] for one in cells[1].all("i")] == ["height:38%"]
    assert cells[1]["aria-label"] == "copy 0, turn 2: go to fridge 1; advantage −1.500; state 0, 4 turns"
    legend = page.one("ul", "legend").text
    assert "episode part" in legend
    assert "step part" in legend


def test_invalid_actions_rewards_and_short_answers_are_told(tmp_path):
    turns = [
        turn("eat", valid=False, answer="eat", reward=-0.5, admissible=[]),
        turn("", valid=False, answer="<action></action>", reward=10.0),
        turn("fly", valid=False, tokens=None),
    ]
    first, second, third = turns_of(page_of(tmp_path, [episode(turns)]))
    assert first.one("p", "act").text == "eat ✗ invalid reward −0.500"
    assert not list(first.all("details"))  # the answer is the action, and nothing is known of what is admissible
    assert second.one("p", "act").text == "(no action) ✗ invalid reward 10"
    assert "the action taken is none of these" in third.text
    assert "tokens" not in third.text


def test_states_and_turns_link_each_other_inside_their_group(tmp_path):
    page = page_of(tmp_path, three_copies())
    ids = [one["id"] for one in page.all() if one["id"]]
    assert len(ids) == len(set(ids))
    links = {one["href"] for one in page.all("a")}
    assert {link.removeprefix("#") for link in links} <= set(ids)
    for one in turns_of(page):
        link = one.one("a", "state")["href"].removeprefix("#")
        state = page.one(id=link)
        assert state["data-anchor"] == one["data-anchor"]
        assert f"#{one['id']}" in [a["href"] for a in state.all("a")]
        assert state["id"].split("-s")[0] == one["id"].split("-c")[0]
    assert "state 5, 4 turns" in turns_of(page)[0].text
    assert "state 5, 1 turn" in turns_of(page)[-1].text


def test_a_state_says_what_each_action_was_worth(tmp_path):
    page = page_of(tmp_path, three_copies())
    state = page.one(id="train-40-0-s5")
    assert state.one("h4").text == "State 5 4 turns in 3 copies"
    best, worst = state.all("li")
    assert best.text == (  # the copy that was lost counts in no mean
        "go to fridge 1 (3, 1 lost) +0.510 episode +0.200 step +0.300 copy.turn 0.1 0.3 2.1"
    )
    assert worst.text == "go to sinkbasin 1 (1) −0.400 episode +0.200 step −0.600 copy.turn 1.1"
    assert page.one(id="train-40-0-s7").parent.parent.tag == "details"  # of one turn: folded
    assert page.one(id="held-out-40-0-s5").one("ul").text == "go to fridge 1 (1) copy.turn 0.1"


def test_without_states_there_is_no_list(tmp_path):
    page = page_of(tmp_path, [episode([turn(anchor=None)]), episode(copy=1, end="RAISED")])
    assert not list(page.all("aside"))
    assert not list(page.all("a", "state"))
    lean = {k: v for k, v in turn().items() if k not in ("anchor", "advantage", "episode", "step", "tokens")}
    assert len(turns_of(page_of(tmp_path, [episode([lean])]))) == 1


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    turns = [
        turn(HOSTILE, observation=HOSTILE, answer=HOSTILE + ".", admissible=[HOSTILE], anchor=i) for i in (1, 1, 2)
    ]
    (tmp_path / "a<b>").mkdir()
    folder = write(tmp_path / "a<b>", [episode(turns, task=HOSTILE, last=HOSTILE, reason=HOSTILE, end="RAISED")])
    text = write_trajectories(folder).read_text(encoding="utf-8")
    page = Page(text).root
    assert len(list(page.all("script"))) == 1
    tags = {one.tag for one in page.all()}
    assert tags.isdisjoint({"img", "iframe", "link", "object", "base", "form", "button", "b>"})
    assert not any(name.startswith("on") for one in page.all() for name in one.attributes)
    assert page.one("h1").text == "a<b>"
    assert page.text.count('<script>document.title="owned"</script>') >= 10
    assert not any(character in text for character in "\x1b\u202e\ud800")


def test_the_page_loads_nothing_and_runs_one_script(tmp_path):
    page = page_of(tmp_path, [episode([turn(observation="https://example.org/a.js")])])
    (policy,) = [one["content"] for one in page.all("meta") if one["http-equiv"]]
    assert re.fullmatch(r"default-src 'none'; script-src 'sha256-[\w+/]{43}='; style-src 'unsafe-inline'", policy)
    assert not [one for one in page.all() if one["src"] or one["srcset"] or one["action"]]
    assert all(one["href"].startswith("#") for one in page.all() if one["href"])
    style, script = page.one("style").text, page.one("script").text
    assert "url(" not in style
    assert "@import" not in style
    for word in ("innerHTML", "eval", "fetch", "import", "http"):
        assert word not in script


def test_huge_texts_and_episodes_are_cut_with_a_note(tmp_path):
    long = turn(observation="a" * 9000, answer="b" * 4001, admissible=[f"do {i}" for i in range(500)], action="do 499")
    page = page_of(tmp_path, [episode([long, *[turn(anchor=i // 2) for i in range(2, 301)]])])
    first = turns_of(page)[0]
    assert first.one("pre", "seen").text == "a" * trajectory_group.MAX_TEXT + "… 5,000 characters more"
    assert "b… 1 character more" in first.text
    items = [one.text for one in first.one("ul", "admissible").all("li")]
    assert len(items) == trajectory_group.MAX_ACTIONS + 2
    assert items[-2:] == ["do 499 ← taken", "and 299 more"]
    assert len(turns_of(page)) == trajectory_group.MAX_TURNS
    assert [one.text for one in page.one("ol").inside if one["class"] == "note"] == ["100 turns left out"]
    assert len(list(page.one("span", "cells").all("a"))) == trajectory_group.MAX_TURNS
    targets = {one["id"] for one in page.all() if one["id"]}
    assert {one["href"][1:] for one in page.all("a")} <= targets


def test_the_first_and_last_steps_are_kept_and_the_rest_is_told(tmp_path):
    episodes = [episode([turn()], step=s, group=g) for s in range(12) for g in range(2)]
    episodes += [episode([turn()], step=s, split="held-out") for s in (3, 9)]
    random.Random(0).shuffle(episodes)
    page = page_of(tmp_path, episodes, edge_steps=2)
    kept = [one["id"] for one in page.all("section", "group")]
    assert kept == [f"train-{s}-{g}" for s in (0, 1, 10, 11) for g in (0, 1)] + ["held-out-3-0", "held-out-9-0"]
    note = "Left out, so that the page stays small: 16 of 24 training groups (steps 2 to 9)."
    assert page.one("header").text.endswith(note)
    assert page.one("header").one("ul", "chips").text == "26 episodes"
    assert page.one("nav")["data-first"] == "train-11-0"


def test_the_page_is_bounded(tmp_path):
    long = turn(observation="é" * 2000, answer="é" * 2000)
    places = itertools.product(range(6), range(3), range(4))
    episodes = [episode([long] * 5, step=s, group=g, copy=c) for s, g, c in places]
    write(tmp_path, episodes)
    limit = 1 << 20
    path = write_trajectories(tmp_path, max_bytes=limit)
    assert limit / 2 < path.stat().st_size < 1.1 * limit
    page = Page(path.read_text()).root
    kept = [one["id"] for one in page.all("section", "group")]
    assert {"train-5-0", "train-0-0"} <= set(kept)
    assert f"{18 - len(kept)} of 18 training groups (steps 0 to 5)" in page.one("header").text
    tiny = Page(write_trajectories(tmp_path, max_bytes=1).read_text()).root
    assert [one["id"] for one in tiny.all("details", "copy")] == ["train-5-0-c0"]  # at least one
    assert "Left out, so that the page stays small: copies 1, 2, 3." in tiny.one("section").text
    assert "20 turns in 4 copies" in tiny.one("aside").text
    targets = {one["id"] for one in tiny.all() if one["id"]}
    assert {one["href"][1:] for one in tiny.all("a")} <= targets


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e308, 0.0, 5e-324, -0.0])
def test_extreme_numbers_have_finite_bars(tmp_path, value):
    turns = [
        turn(advantage=value, episode=-value, step=value, reward=value),
        turn(advantage=1.0),
        turn(advantage=1e308),
    ]
    page = page_of(tmp_path, [episode(turns, score=value, **{"return": value})])
    drawn = [one[name] for one in page.all() for name in ("x", "width", "d") if one[name]]
    drawn += [one["style"] for one in page.all("i") if one["style"]]
    assert drawn
    assert not any("nan" in one or "inf" in one for one in drawn)


def test_a_resumed_run_shows_what_was_written_last(tmp_path):
    page = page_of(tmp_path, [episode([turn()], seed=1), episode([turn(), turn()], seed=1, end="FAILED")])
    assert len(turns_of(page)) == 2
    assert "✗ failed" in page.one("details", "copy").text


def test_a_torn_last_line_is_left_out_and_told(tmp_path):
    line = json.dumps(episode(copy=1))
    for cut in (1, len(line) // 2, len(line) - 1):
        page = page_of(tmp_path, [episode([turn()])], line[:cut])
        assert len(list(page.all("details", "copy"))) == 1
        assert "The last line of episodes.jsonl is cut off" in page.one("header").text
    assert "cut off" not in page_of(tmp_path, [episode()]).one("header").text


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"step": 1, "spl', "broken JSON"),
        ("[1]", "an array, not an object"),
        (without(episode(), "task"), "no field 'task'"),
        ({"step": 3, "reward": 0.5}, "no field 'group'"),
        (episode(step=-1), "step is -1, must be an integer >= 0"),
        (episode(copy=True), "copy is True, must be an integer >= 0"),
        (episode(group=2**70), "must be an integer >= 0"),
        (episode(split="eval"), "split is 'eval', must be 'train' or 'held-out'"),
        (episode(split=["train"]), "split is an array, must be"),
        (episode(end="won"), "end is 'won', must be one of WON, FAILED"),
        (episode(end={}), "end is an object, must be one of"),
        (episode(score="1"), "score is '1', must be a number or null"),
        (episode(last=3), "last is 3, must be a text or null"),
        (episode() | {"turns": {}}, "turns is an object, must be an array"),
        (episode(["go"]), "turn 1 is a text, must be an object"),
        (episode([turn(), turn(valid=1)]), "turn 2: valid is 1, must be true or false"),
        (episode([turn(admissible=["a", 3])]), "turn 1: admissible is an array, must be an array of texts"),
        (episode([turn(anchor="x")]), "turn 1: anchor is 'x', must be an integer or null"),
        (episode([turn(anchor=1.0)]), "turn 1: anchor is 1.0, must be an integer or null"),
        (episode([turn(advantage=10**400)]), "must be a number or null"),
        (episode([without(turn(), "answer")]), "turn 1: no field 'answer'"),
    ],
)
def test_damaged_and_foreign_lines_are_named(tmp_path, line, complaint):
    bad = line if isinstance(line, str) else json.dumps(line)
    write(tmp_path, [episode()], f"\n{bad}\n{json.dumps(episode(copy=1))}\n")
    with pytest.raises(ValueError, match=r"episodes\.jsonl:3: .*; mend or remove the line") as error:
        write_trajectories(tmp_path)
    assert complaint in str(error.value)
    assert not (tmp_path / "trajectories.html").exists()
    write(tmp_path, [episode()], f"\n{bad}")  # a last line that is whole is not taken for a torn one
    if "broken" not in complaint:
        with pytest.raises(ValueError, match=r"episodes\.jsonl:3: "):
            write_trajectories(tmp_path)


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"episodes\.jsonl: no such file .*give the folder of an agent's run"):
        write_trajectories(tmp_path)
    write(tmp_path, [], '{"step": 1')
    with pytest.raises(ValueError, match=r"episodes\.jsonl has no episode to show"):
        write_trajectories(tmp_path)
    write(tmp_path, [episode()])
    with pytest.raises(ValueError, match="edge_steps is 0, must be positive"):
        write_trajectories(tmp_path, edge_steps=0)


def test_the_command_prints_the_path(tmp_path, capsys):
    write(tmp_path, [episode([turn()])])
    assert cli.main(["trajectories", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'trajectories.html'}\n"
    assert cli.main(["trajectories", str(tmp_path / "none")]) == 2
    assert "rlalign trajectories: " in capsys.readouterr().err


def browsed(path, fragment, profile):
    """The page's tree after its script has run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri() + fragment], capture_output=True, check=True, timeout=100)
    return Page(done.stdout.decode()).root


def lit(page, name="on"):
    return [one["id"] for one in turns_of(page) if name in one.classes]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_in_a_browser_the_address_chooses_the_group_and_the_state(tmp_path):
    episodes = three_copies()
    episodes[0]["turns"][1]["observation"] = HOSTILE
    path = write_trajectories(write(tmp_path, episodes))
    page = browsed(path, "#train-40-0-s5", tmp_path / "profile")
    assert "js" in page.one("body").classes
    assert page.one("title").text == tmp_path.name  # and not "owned"
    four = [f"train-40-0-{place}" for place in ("c0-t1", "c0-t3", "c1-t1", "c2-t1")]
    assert lit(page) == four
    assert [one["id"] for one in page.all("section", "on")] == ["train-40-0"]
    assert [one["href"] for one in page.all("a", **{"aria-current": "true"})] == ["#train-40-0"]
    assert [one["id"] for one in page.all("li", "st") if "on" in one.classes] == ["train-40-0-s5"]
    assert len(list(page.all("a", "on"))) == 4  # cells of the overview

    page = browsed(path, "#held-out-40-0-c0-t1", tmp_path / "profile")
    assert lit(page) == ["held-out-40-0-c0-t1"]
    assert [one["id"] for one in page.all("section", "on")] == ["held-out-40-0"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_in_a_browser_a_click_highlights_and_pointing_does_too(tmp_path):
    path = write_trajectories(write(tmp_path, [episode(step=3), *three_copies()]))
    hook = """<script>addEventListener("load", () => {
      const turn = document.querySelector("#train-40-0-c0-t3 .act");
      const lit = () => document.querySelectorAll(".turn.on").length;
      const first = document.querySelector(".group.on").id;
      document.title = [first, ...[1, 2, 3].map(() => (turn.click(), lit()))];
      document.querySelector("#train-40-0-c0-t2 .seen").dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
    });</script>"""
    text = re.sub("script-src '[^']*'", "script-src 'unsafe-inline'", path.read_text())
    path.write_text(text.replace("</body>", hook + "</body>"))
    page = browsed(path, "", tmp_path / "profile")
    # Before a click the last training step is shown; a second click takes the first one back.
    assert page.one("title").text == "train-40-0,4,0,4"
    assert lit(page) == [f"train-40-0-{place}" for place in ("c0-t1", "c0-t3", "c1-t1", "c2-t1")]
    assert lit(page, "near") == ["train-40-0-c0-t2"]
