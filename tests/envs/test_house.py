"""House: whole episodes by their texts, and what any environment of texts must keep to.

The helpers below know no world; test_shop.py uses them too.
"""

import copy
import doctest
import inspect
import itertools
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlalign.envs import house
from rlalign.envs.house import LEVELS, House
from rlalign.envs.protocol import Info
from rlalign.envs.words import Words, words

ROOT = Path(__file__).parents[2]
LEVEL = [pytest.param(settings, id=str(level)) for level, settings in LEVELS.items()]


def transcript(world, seed, scripted=()):
    """An episode as text: what is said, what is admissible, what is done, first as scripted and then as the expert."""
    observation = world.reset(seed)
    lines, script = ["task: " + observation.task], iter(scripted)
    while True:
        lines += [observation.text, "| " + "; ".join(observation.admissible)]
        action = next(script, None) or world.expert()
        if action is None:
            break
        observation, reward, terminated, truncated, info = world.step(action)
        end = f" = {reward:g}, score {info.score:.3g}" if terminated else ", too late" if truncated else ""
        lines.append(f"> {action}{end}{' (not understood)' * (not info.valid)}")
    return "\n".join("\n".join(textwrap.wrap(line, 112, subsequent_indent="    ")) for line in lines) + "\n"


def play(world, seed, choose, *, most=10**6):
    """The transitions of an episode whose actions are chosen from observations."""
    observation, found = world.reset(seed), []
    while len(found) < most and not (found and (found[-1].terminated or found[-1].truncated)):
        found.append(world.step(choose(observation)))
        observation = found[-1].observation
    return found


def any_of(draw):
    """Chooses among what is admissible."""
    return lambda observation: observation.admissible[int(draw.random() * len(observation.admissible))]


def rate(world, seeds, choose):
    """The share of episodes that are won, and the longest of them."""
    episodes = [play(world, seed, choose) for seed in range(seeds)]
    assert all(e[-1].terminated or e[-1].truncated for e in episodes)
    assert all(e[-1].info.won == (e[-1].reward == 10) and not any(t.reward for t in e[:-1]) for e in episodes)
    return sum(e[-1].info.won for e in episodes) / seeds, max(map(len, episodes))


def after(world, seed, actions):
    """The last transition of so many actions."""
    world.reset(seed)
    return [world.step(action) for action in actions][-1]


def eager(draw):
    """Chooses the last of what is admissible, every other time: House names what changes things behind where to go."""
    return lambda seen: seen.admissible[-1] if draw.random() < 0.5 else any_of(draw)(seen)


def aliases(world, seeds, walks, choose, anchor=lambda observation: observation.anchor):
    """How often states of equal anchors differ in what is admissible, or in what an admissible action does.

    Also checks that every admissible action is understood and changes something.
    """
    found = 0
    for seed in range(seeds):
        known = {}
        for _ in range(walks):
            observation, path = world.reset(seed), []
            for _ in range(10):
                does = {a: after(world, seed, [*path, a]) for a in observation.admissible}
                assert all(t.info.valid for t in does.values())
                assert all(t.terminated or t.observation.anchor != observation.anchor for t in does.values())
                seen = observation.admissible, {a: t._replace(truncated=False) for a, t in does.items()}
                found += known.setdefault(anchor(observation), seen) != seen
                path.append(choose(observation))
                if does[path[-1]].terminated:
                    break
                observation = does[path[-1]].observation
    return found


def nonsense_changes_nothing(world, seed, nonsense, draw):
    """An episode in which every step is preceded by nonsense is the one without."""
    plain = play(world, seed, any_of(copy.copy(draw)), most=15)
    observation, choose = world.reset(seed), any_of(draw)
    for expected in plain:
        for action in nonsense:
            said = world.step(action)
            assert said[1:] == (0.0, False, False, Info(valid=False)), action
            assert said.observation == observation._replace(text="nothing happens."), action
        transition = world.step(choose(observation))
        assert transition == expected
        observation = transition.observation


def spoken(world, seeds, choose):
    """The words of everything that is said and can be done."""
    said = {}
    for seed in range(seeds):
        observation = world.reset(seed)
        said |= dict.fromkeys((observation.task, observation.text, *observation.admissible))
        for transition in play(world, seed, choose):
            said |= dict.fromkeys((transition.observation.text, *transition.observation.admissible))
    return {word for text in said for word in words(text)}


def digest(name, seeds):
    """A number that follows from everything that a module's world says at every level."""
    import importlib
    import random
    import zlib

    module = importlib.import_module(f"rlalign.envs.{name.lower()}")
    draw, crc = random.Random(0), 0
    for level, seed in ((level, seed) for level in module.LEVELS for seed in seeds):
        world = getattr(module, name)(**module.LEVELS[level])
        transition = (world.reset(seed), 0.0, False, False)
        while not (transition[2] or transition[3]):
            crc = zlib.crc32(repr(transition).encode(), crc)
            actions = transition[0].admissible
            transition = world.step(actions[int(draw.random() * len(actions))])
        crc = zlib.crc32(repr(transition).encode(), crc)
    return crc


def digest_elsewhere(name, seeds, hash_seed):
    """The same of another process."""
    code = f"{inspect.getsource(digest)}\nprint(digest({name!r}, {seeds!r}))"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout)


HEATED = """\
task: put a hot potato in drawer.
you are in the middle of a room. you see a countertop 1, a drawer 1, a microwave 1 and a shelf 1.
| go to countertop 1; go to drawer 1; go to microwave 1; go to shelf 1
> go to microwave 1
you arrive at microwave 1. the microwave 1 is closed.
| go to countertop 1; go to drawer 1; go to shelf 1; open microwave 1
> eat potato 1 (not understood)
nothing happens.
| go to countertop 1; go to drawer 1; go to shelf 1; open microwave 1
> open microwave 1
you open the microwave 1. in the microwave 1, you see a potato 1.
| go to countertop 1; go to drawer 1; go to shelf 1; take potato 1 from microwave 1
> take potato 1 from microwave 1
you pick up the potato 1 from the microwave 1.
| go to countertop 1; go to drawer 1; go to shelf 1; move potato 1 to microwave 1; heat potato 1 with microwave
    1
> inventory
you carry a potato 1.
| go to countertop 1; go to drawer 1; go to shelf 1; move potato 1 to microwave 1; heat potato 1 with microwave
    1
> heat potato 1 with microwave 1
you heat the potato 1 using the microwave 1.
| go to countertop 1; go to drawer 1; go to shelf 1; move potato 1 to microwave 1
> look
in the microwave 1, you see nothing. you carry a hot potato 1.
| go to countertop 1; go to drawer 1; go to shelf 1; move potato 1 to microwave 1
> go to drawer 1
you arrive at drawer 1. the drawer 1 is closed. you carry a hot potato 1.
| go to countertop 1; go to microwave 1; go to shelf 1; open drawer 1
> open drawer 1
you open the drawer 1. in the drawer 1, you see a fork 1 and a plate 1. you carry a hot potato 1.
| go to countertop 1; go to microwave 1; go to shelf 1; move potato 1 to drawer 1
> move potato 1 to drawer 1 = 10, score 1
you move the potato 1 to the drawer 1.
| go to countertop 1; go to microwave 1; go to shelf 1; take fork 1 from drawer 1; take plate 1 from drawer 1;
    take potato 1 from drawer 1
"""
TWO = """\
task: put two plate in drawer.
you are in the middle of a room. you see a countertop 1, a countertop 2, a drawer 1, a drawer 2, a microwave 1
    and a sinkbasin 1.
| go to countertop 1; go to countertop 2; go to drawer 1; go to drawer 2; go to microwave 1; go to sinkbasin 1
> go to sinkbasin 1
you arrive at sinkbasin 1. in the sinkbasin 1, you see a plate 1.
| go to countertop 1; go to countertop 2; go to drawer 1; go to drawer 2; go to microwave 1; take plate 1 from
    sinkbasin 1
> take plate 1 from sinkbasin 1
you pick up the plate 1 from the sinkbasin 1.
| go to countertop 1; go to countertop 2; go to drawer 1; go to drawer 2; go to microwave 1; move plate 1 to
    sinkbasin 1; clean plate 1 with sinkbasin 1
> go to drawer 1
you arrive at drawer 1. the drawer 1 is closed. you carry a plate 1.
| go to countertop 1; go to countertop 2; go to drawer 2; go to microwave 1; go to sinkbasin 1; open drawer 1
> open drawer 1
you open the drawer 1. in the drawer 1, you see nothing. you carry a plate 1.
| go to countertop 1; go to countertop 2; go to drawer 2; go to microwave 1; go to sinkbasin 1; move plate 1 to
    drawer 1
> move plate 1 to drawer 1
you move the plate 1 to the drawer 1.
| go to countertop 1; go to countertop 2; go to drawer 2; go to microwave 1; go to sinkbasin 1; take plate 1
    from drawer 1
> go to microwave 1
you arrive at microwave 1. the microwave 1 is closed.
| go to countertop 1; go to countertop 2; go to drawer 1; go to drawer 2; go to sinkbasin 1; open microwave 1
> open microwave 1
you open the microwave 1. in the microwave 1, you see a plate 2.
| go to countertop 1; go to countertop 2; go to drawer 1; go to drawer 2; go to sinkbasin 1; take plate 2 from
    microwave 1
> take plate 2 from microwave 1
you pick up the plate 2 from the microwave 1.
| go to countertop 1; go to countertop 2; go to drawer 1; go to drawer 2; go to sinkbasin 1; move plate 2 to
    microwave 1; heat plate 2 with microwave 1
> go to drawer 1
you arrive at drawer 1. in the drawer 1, you see a plate 1. you carry a plate 2.
| go to countertop 1; go to countertop 2; go to drawer 2; go to microwave 1; go to sinkbasin 1; move plate 2 to
    drawer 1
> move plate 2 to drawer 1 = 10, score 1
you move the plate 2 to the drawer 1.
| go to countertop 1; go to countertop 2; go to drawer 2; go to microwave 1; go to sinkbasin 1; take plate 1
    from drawer 1; take plate 2 from drawer 1
"""
LOOKED = """\
task: look at a pen under the desklamp.
you are in the middle of a room. you see a countertop 1, a desk 1, a drawer 1, a fridge 1 and a microwave 1.
| go to countertop 1; go to desk 1; go to drawer 1; go to fridge 1; go to microwave 1
> go to desk 1
you arrive at desk 1. on the desk 1, you see a desklamp 1 and a plate 1.
| go to countertop 1; go to drawer 1; go to fridge 1; go to microwave 1; take plate 1 from desk 1; use desklamp
    1
> use desklamp 1
you turn on the desklamp 1.
| go to countertop 1; go to drawer 1; go to fridge 1; go to microwave 1; take plate 1 from desk 1
> take plate 1 from desk 1
you pick up the plate 1 from the desk 1.
| go to countertop 1; go to drawer 1; go to fridge 1; go to microwave 1; move plate 1 to desk 1
> move plate 1 to desk 1
you move the plate 1 to the desk 1.
| go to countertop 1; go to drawer 1; go to fridge 1; go to microwave 1; take plate 1 from desk 1
> go to fridge 1
you arrive at fridge 1. the fridge 1 is closed.
| go to countertop 1; go to desk 1; go to drawer 1; go to microwave 1; open fridge 1
> open fridge 1
you open the fridge 1. in the fridge 1, you see a pen 1.
| go to countertop 1; go to desk 1; go to drawer 1; go to microwave 1; take pen 1 from fridge 1
> take pen 1 from fridge 1
you pick up the pen 1 from the fridge 1.
| go to countertop 1; go to desk 1; go to drawer 1; go to microwave 1; move pen 1 to fridge 1
> go to desk 1 = 10, score 1
you arrive at desk 1. on the desk 1, you see a desklamp 1 and a plate 1. you carry a pen 1.
| go to countertop 1; go to drawer 1; go to fridge 1; go to microwave 1; move pen 1 to desk 1
"""


@pytest.mark.parametrize(
    ("level", "seed", "scripted", "text"),
    [
        (2, 0, ["", "eat potato 1", "", "", "inventory", "", "look"], HEATED),
        (4, 0, [], TWO),
        (3, 0, ["go to desk 1", "use desklamp 1", "take plate 1 from desk 1"], LOOKED),
    ],
)
def test_whole_episodes(level, seed, scripted, text):
    assert transcript(House(**LEVELS[level]), seed, scripted) == text


def test_the_expert_solves_every_task():
    for settings in LEVELS.values():
        room = House(**settings)
        won, longest = rate(room, 300, lambda observation, room=room: room.expert())
        assert won == 1
        assert 5 <= longest <= 11
        assert room.expert() is None


def test_the_expert_solves_every_task_from_anywhere():
    draw = random.Random(3)
    for settings in LEVELS.values():
        room = House(**settings | {"horizon": 100})
        for seed in range(100):
            begun = play(room, seed, any_of(draw), most=30)
            if not begun[-1].terminated:
                steps = [room.step(room.expert()) for _ in range(69) if room.expert()]
                assert steps[-1].info.won
                assert len(steps) <= 16  # 11, and putting away what is carried


def test_chance_solves_few_tasks():
    """Measured: 0.053, 0.019, 0.014, 0.008 and 0.002 of 3000 tasks of the levels."""
    rates = [rate(House(**settings), 300, any_of(random.Random(0)))[0] for settings in LEVELS.values()]
    assert 0.02 < rates[0] < 0.1
    assert all(0 <= r < 0.05 for r in rates[1:])


def test_tasks_are_of_all_kinds_and_none_is_done_at_the_start():
    for kind, begin in zip(
        house.TASKS, ("put a", "look at a", "put a clean", "put a hot", "put a cool", "put two"), strict=True
    ):
        room = House(receptacles=8, objects=6, tasks=[kind])
        tasks = {room.reset(seed).task for seed in range(200)}
        assert all(task.startswith(begin) for task in tasks)
        assert len(tasks) >= 5
        assert not any(room.reset(seed) and room._won() for seed in range(200))


def test_the_horizon_ends_an_episode():
    room = House(horizon=12)
    room.reset(0)
    steps = [room.step("look") for _ in range(12)]
    assert [t.truncated for t in steps] == [False] * 11 + [True]
    assert not any(t.terminated or t.reward for t in steps)
    with pytest.raises(
        RuntimeError, match=r"^House\.step\('look'\) after the end of the episode: call reset\(seed\) first$"
    ):
        room.step("look")


def test_a_win_at_the_horizon_is_a_win():
    room = House(**LEVELS[1])
    for seed in range(20):
        needed = len(play(room, seed, lambda observation: room.expert()))
        room.reset(seed)
        for _ in range(15 - needed):
            room.step("inventory")
        last = [room.step(room.expert()) for _ in range(needed)][-1]
        assert last[1:] == (10.0, True, False, Info(won=True, score=1.0))


def test_what_treatments_do_to_each_other():
    """Clean remains; hot and cool are one or the other."""
    room = House(receptacles=8, objects=2, tasks=["heat"], horizon=100)
    tried = 0
    for seed in range(200):
        names = room.reset(seed).text
        if "fridge 1" not in names or "sinkbasin 1" not in names or "bread" in room._task:
            continue
        while room._held < 0:
            room.step(room.expert())
        thing = room._things[room._held]
        said = []
        for verb, place in (("heat", "microwave"), ("clean", "sinkbasin"), ("cool", "fridge"), ("heat", "microwave")):
            room.step(f"go to {place} 1")
            do = f"{verb} {thing} with {place} 1"
            done = room.step(do).observation
            assert done.text == f"you {verb} the {thing} using the {place} 1."
            assert do not in done.admissible
            assert not room.step(do).info.valid
            said.append(room.step("inventory").observation.text)
        assert said == [f"you carry a {how} {thing}." for how in ("hot", "clean hot", "clean cool", "clean hot")]
        tried += 1
    assert tried > 10


def test_every_receptacle_and_every_object_of_the_kind_will_do():
    room, others = House(receptacles=8, objects=6, tasks=["put"], horizon=100), 0
    for seed in range(100):
        _, _, kind, _, target = room.reset(seed).task.removesuffix(".").split()
        things = {name: room._names[room._place[i]] for i, name in enumerate(room._things) if name.startswith(kind)}
        targets = [name for name in room._names if name.startswith(target)]
        for (thing, place), to in itertools.product(things.items(), targets):
            room.reset(seed)
            todo = f"go to {place}", f"open {place}", f"take {thing} from {place}"
            todo += f"go to {to}", f"open {to}", f"move {thing} to {to}"
            assert [room.step(action).info.won for action in todo] == [False] * 5 + [True]
        others += len(things) * len(targets) - 1
    assert others > 50


def test_equal_anchors_are_one_state():
    draw = random.Random(1)
    for settings in LEVELS.values():
        assert aliases(House(**settings | {"horizon": 100}), 5, 6, eager(draw)) == 0


@pytest.mark.parametrize(
    "coarser",
    [lambda seen: seen.text, lambda seen: seen.anchor[0], lambda seen: seen.anchor[:2]],
    ids=["text", "1", "2"],
)
def test_coarser_anchors_alias(coarser):
    room = House(**LEVELS[2] | {"horizon": 100})
    assert aliases(room, 5, 8, eager(random.Random(1)), coarser) > 0


def test_nonsense_changes_nothing():
    draw = random.Random(2)
    nonsense = [
        "",
        " ",
        "go",
        "go to",
        "go to moon 1",
        "GO TO TABLE 1",
        "look around",
        "take",
        "move it",
        "heat",
        "\n",
        "go to  table 1",
    ]
    for settings in LEVELS.values():
        room = House(**settings | {"horizon": 1000})
        for seed in range(10):
            nonsense_changes_nothing(room, seed, nonsense, draw)


def test_what_could_be_done_elsewhere_changes_nothing():
    room = House(**LEVELS[4] | {"horizon": 1000})
    draw = random.Random(4)
    for seed in range(5):
        every = {
            action
            for _ in range(10)
            for t in play(room, seed, any_of(draw), most=30)
            for action in t.observation.admissible
        }
        observation = room.reset(seed)
        for _ in range(5):
            for action in sorted(every - set(observation.admissible)):
                assert room.step(action).observation == observation._replace(text="nothing happens.")
            observation = room.step(any_of(draw)(observation)).observation


def test_looking_and_the_inventory_change_nothing_and_are_understood():
    room = House(**LEVELS[2] | {"horizon": 100})
    draw = random.Random(5)
    for seed in range(20):
        observation = room.reset(seed)
        assert room.step("look").observation == observation
        for _ in range(10):
            observation = room.step(any_of(draw)(observation)).observation
            looked, listed = room.step("look"), room.step("inventory")
            assert looked[1:] == listed[1:] == (0.0, False, False, Info())
            assert (
                looked.observation._replace(text="")
                == listed.observation._replace(text="")
                == observation._replace(text="")
            )
            assert listed.observation.text == f"you carry {observation.anchor[1]}."
            burden = f" you carry {observation.anchor[1]}." if observation.anchor[1] != "nothing" else ""
            assert looked.observation.text == observation.anchor[0] + burden
            if observation.text.startswith(("you arrive", "you open")):
                assert observation.text.endswith(looked.observation.text)


def test_every_word_is_in_the_vocabulary_and_every_word_of_it_is_said():
    draw = random.Random(6)
    extra = lambda seen: draw.choice(["look", "inventory", "what?"]) if draw.random() < 0.1 else any_of(draw)(seen)
    said = set().union(*(spoken(House(**settings), 120, extra) for settings in LEVELS.values()))
    assert said <= set(house.VOCABULARY)
    assert {word for word in house.VOCABULARY if word not in said} <= {*"3456", "inventory"}
    assert sorted(set(house.VOCABULARY)) == list(house.VOCABULARY)
    assert len(house.VOCABULARY) == 74


def test_names_and_phrases_are_said_and_shorten_texts():
    draw = random.Random(8)
    phrased = Words([*house.VOCABULARY, *house.NAMES, *house.PHRASES])
    used, count, short = set(), 0, 0
    for settings in LEVELS.values():
        room = House(**settings)
        for task in range(150):
            seen = room.reset(task)
            for _ in range(15):
                text = " ".join((seen.task, seen.text, *seen.admissible))
                ids = phrased.encode(text)
                assert words(phrased.decode(ids)) == words(text)
                used |= {" ".join(words(phrased.decode([i]))) for i in ids}
                count, short = count + len(words(text)), short + len(ids)
                after = room.step(draw.choice(seen.admissible))
                seen = after.observation
                if after.terminated or after.truncated:
                    break
    assert short < 0.65 * count
    rare = {f"{kind} {i}" for kind in house.THINGS for i in range(3, 7)}
    assert {name for name in house.NAMES if name not in used} <= rare
    assert {phrase for phrase in house.PHRASES if phrase not in used} <= {"nothing happens ."}


def test_prompts_stay_short():
    """Words of the task, the last two turns, the observation and what is admissible."""
    draw = random.Random(7)
    for level, limit in {1: 115, 2: 125, 3: 140, 4: 150}.items():
        room = House(**LEVELS[level])
        for seed in range(100):
            observation, turns = room.reset(seed), [0, 0]
            while True:
                now = len(words(f"{observation.task} {observation.text} {', '.join(observation.admissible)}"))
                assert now + sum(turns[-2:]) <= limit
                assert len(observation.admissible) <= 12
                action = any_of(draw)(observation)
                turns.append(len(words(f"{observation.text} {action}")))
                observation, _, terminated, truncated, _ = room.step(action)
                if terminated or truncated:
                    break


def test_the_same_in_every_process():
    assert digest("House", range(30)) == digest_elsewhere("House", range(30), "1") == DIGEST


DIGEST = 1328244942  # of all levels; changes with every text, draw and rule


def test_seeds_are_tasks_whatever_was_played_before():
    room = House(**LEVELS[3])
    first = [room.reset(seed) for seed in range(50)]
    play(room, 7, any_of(random.Random(0)))
    assert [room.reset(seed) for seed in reversed(range(50))] == first[::-1]
    assert len({observation.anchor for observation in first}) > 45


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"receptacles": 3}, r"^House: receptacles is 3, must be an int in \[4, 8\]$"),
        ({"receptacles": 4.0}, r"^House: receptacles is 4\.0, must be an int"),
        ({"objects": 7}, r"^House: objects is 7, must be an int in \[2, 6\]$"),
        ({"horizon": 11}, r"^House: horizon is 11, must be an int in \[12, 1000\]$"),
        (
            {"tasks": ()},
            r"^House: tasks is \(\), must be some of put, look, clean, heat, cool, two, such as \('put', 'cle",
        ),
        ({"tasks": ["put", "eat"]}, r"^House: tasks is \['put', 'eat'\], must be some of put"),
        ({"tasks": "put"}, r"^House: tasks is 'put', must be some of put"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        House(**arguments)


def test_seeds_and_steps_that_are_refused():
    room = House()
    assert room.expert() is None
    with pytest.raises(RuntimeError, match=r"^House\.step\('look'\) before reset: call reset\(seed\) first$"):
        room.step("look")
    with pytest.raises(ValueError, match=r"^House\.reset: seed is -1, must be at least 0$"):
        room.reset(-1)
    with pytest.raises(TypeError):
        room.reset(1.0)


def test_examples_in_docstrings():
    result = doctest.testmod(house)
    assert (result.failed, result.attempted > 4) == (0, True)
