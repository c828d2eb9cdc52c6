"""Makes ALFWorld games without the download: python -m rlalign.envs.alfworld_games FOLDER --count 100 --seed 0

The wheel of alfworld ships the PDDL domain, the grammar of texts, the goals of ALFRED's six kinds of task, what each
receptacle can hold, and of each of AI2-THOR's 120 rooms the receptacles' places and the kinds of object. It does not
ship where ALFRED's annotators found the objects. So these games are played in ALFRED's rooms, by ALFWorld's rules and
in its words, on arrangements that are drawn here: good for training and for trying things out, not for comparing with
published numbers, which are those of alfworld-download's games. The layout of folders is the same.
"""

import argparse
import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlalign.envs.adapters import package
from rlalign.envs.alfworld import Alfworld

TASKS = {  # ALFWorld's kinds -> what can be done to the object (a set of constants.VAL_ACTION_OBJECTS), and where
    "look_at_obj_in_light": ("", ""),
    "pick_and_place_simple": ("", ""),
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave"),
    "pick_two_obj_and_place": ("", ""),
}
BASINS = ("Sink", "Bathtub")  # the layouts name what has a basin; things lie in the basin
STANDING = {"StoveBurner": 4, "CoffeeMachine": 1, "Toaster": 1}  # receptacles that the layouts leave out, and how many
LAMPS = ("DeskLamp", "FloorLamp")
LAMP_STANDS = ("Desk", "SideTable", "Dresser", "DiningTable", "CoffeeTable", "Shelf")
ATTEMPTS = 200  # rooms and tasks drawn for a game


class Room(NamedTuple):
    """What the wheel says of a room.

    Attributes:
      number: AI2-THOR's.
      receptacles: id -> location, x, z in steps of 0.25 m, a quarter turn, degrees up or down.
      kinds: of receptacle, sorted.
      objects: kinds that can be carried, sorted.
      lamps: kinds.
      free: x, z where one can stand, in the same steps.
    """

    number: int
    receptacles: dict[str, tuple[int, int, int, int]]
    kinds: list[str]
    objects: list[str]
    lamps: list[str]
    free: list[tuple[int, int]]


def generate_games(
    folder: str | Path, count: int, seed: int = 0, *, kinds: Sequence[str] = tuple(TASKS), unseen: bool = False
) -> list[Path]:
    """Write games that rlalign.envs.alfworld.Alfworld and alfworld itself can load, each with a solution.

    A game follows from (seed, its number, kinds, unseen): more games begin with the same ones. Two seconds a game.

    Args:
      folder: gets KIND-OBJECT-None-RECEPTACLE-ROOM/trial_SEED_NUMBER/game.tw-pddl, and beside each the
        initial_state.pddl and the traj_data.json that alfworld's hand-coded expert reads.
      count: how many.
      seed: >= 0.
      kinds: of task, some of TASKS; games take them in turn.
      unseen: in the 24 rooms that ALFRED keeps for tests instead of the 96 of its training.
    Returns:
      The game files, in the order of their numbers.
    Raises:
      ValueError: count below 1, seed below 0, an unknown kind.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"generate_games: count is {count}, seed is {seed}: must be at least 1, and at least 0")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(TASKS):
        raise ValueError(f"generate_games: kinds is {kinds!r}, must be some of {', '.join(TASKS)}")
    info, goals = package("alfworld.info", "alfworld"), package("alfworld.gen.goal_library", "alfworld").gdict
    domain, grammar = (Path(path).read_text() for path in (info.ALFRED_PDDL_PATH, info.ALFRED_TWL2_PATH))
    world = Alfworld(["-"])  # one for all games, as a planner's library stays loaded
    paths = []
    for number in range(count):
        rng = random.Random(f"{seed} {number} {unseen}")  # of random, only random() is the same in every Python
        kind = kinds[number % len(kinds)]
        room, target, place = _task(rng, kind, unseen)
        lamp = _pick(rng, room.lamps) if kind == "look_at_obj_in_light" else ""
        parts = {"obj": target, "recep": place, "toggle": lamp, "mrecep": ""}
        wanted = _pick(rng, goals[kind]["templates"]).format(**{part: what.lower() for part, what in parts.items()})
        problem = _problem(rng, room, kind, target, place, lamp)
        problem += goals[kind]["pddl"].replace("#", "-").format(**parts)
        game = {"pddl_domain": domain, "grammar": grammar.replace("UNKNOWN GOAL", wanted), "pddl_problem": problem}
        game |= {"solvable": True, "walkthrough": None}
        trial = Path(folder) / f"{kind}-{target}-None-{place or lamp}-{room.number}" / f"trial_{seed}_{number:06}"
        trial.mkdir(parents=True, exist_ok=True)
        (trial / "initial_state.pddl").write_text(problem)
        (trial / "traj_data.json").write_text(json.dumps(_trajectory(trial.name, kind, room, parts, wanted), indent=1))
        paths.append(trial / "game.tw-pddl")
        unfinished = trial / "game.unfinished"
        unfinished.write_text(json.dumps(game))
        game["walkthrough"] = _solution(world, str(unfinished))
        unfinished.write_text(json.dumps(game))
        unfinished.replace(paths[-1])
    return paths


def _pick(rng: random.Random, these: Sequence[str]) -> str:
    return these[int(rng.random() * len(these))]


def _task(rng: random.Random, kind: str, unseen: bool) -> tuple[Room, str, str]:
    """A room, a kind of object in it, and a kind of receptacle where it is wanted ("" to look at it)."""
    constants = package("alfworld.gen.constants", "alfworld")
    numbers = constants.TEST_SCENE_NUMBERS if unseen else constants.TRAIN_SCENE_NUMBERS
    rooms = {number for name in constants.GOALS_VALID[kind] for number in constants.SCENE_TYPE[name]}
    among = sorted(rooms & set(numbers))
    group, device = TASKS[kind]
    for _ in range(ATTEMPTS):
        room = _room(among[int(rng.random() * len(among))])
        things = [thing for thing in room.objects if not group or thing in constants.VAL_ACTION_OBJECTS[group]]
        if not things or (device and device not in room.kinds):
            continue
        thing = _pick(rng, things)
        homes = [name for name in room.kinds if thing in constants.VAL_RECEPTACLE_OBJECTS[name]]
        places = [name for name in homes if name != device]
        if kind == "look_at_obj_in_light":
            if room.lamps and any(name in room.kinds for name in LAMP_STANDS):
                return room, thing, ""
        elif places:
            place = _pick(rng, places)
            if any(name != place for name in homes):  # where it can be at the start
                return room, thing, place
    raise RuntimeError(f"{ATTEMPTS} rooms without a task of kind {kind}: another release of alfworld? use 0.4.2")


@functools.lru_cache(maxsize=128)
def _room(number: int) -> Room:
    constants, numpy = package("alfworld.gen.constants", "alfworld"), package("numpy", "alfworld")
    layouts = Path(constants.__file__).parent / "layouts"
    stem = f"FloorPlan{number}-"
    there = set(json.loads((layouts / f"{stem}objects.json").read_text()))
    fixed = set(constants.RECEPTACLES) - constants.MOVABLE_RECEPTACLES_SET
    receptacles = {}
    for name, (x, z, turn, tilt) in sorted(json.loads((layouts / f"{stem}openable.json").read_text()).items()):
        kind = name.split("|")[0]
        name, kind = (f"{name}|{kind}Basin", f"{kind}Basin") if kind in BASINS else (name, kind)
        if kind in fixed and kind in constants.VAL_RECEPTACLE_OBJECTS:
            receptacles[name] = round(4 * x), round(4 * z), round(turn / 90), round(tilt)
    free = sorted({(round(4 * x), round(4 * z)) for x, z in numpy.load(layouts / f"{stem}layout.npy")})
    for kind, most in STANDING.items():
        for i in range(most if kind in there else 0):
            x, z = free[(len(receptacles) * 7919 + number) % len(free)]
            receptacles[f"{kind}|{_metres(x)}|+00.90|{_metres(z)}|{i}"] = x, z, i, 45
    kinds = sorted({_kind(name) for name in receptacles})
    held = {thing for kind in kinds for thing in constants.VAL_RECEPTACLE_OBJECTS[kind]}
    return Room(number, receptacles, kinds, sorted(held & there), sorted(there.intersection(LAMPS)), free)


def _kind(name: str) -> str:
    return name.split("|")[-1] if name.endswith("Basin") else name.split("|")[0]


def _metres(steps: float) -> str:
    return f"{steps / 4:+06.2f}"


def _location(*at: int) -> str:
    return "loc|" + "|".join(map(str, at))


def _problem(rng: random.Random, room: Room, kind: str, target: str, place: str, lamp: str) -> str:
    """The state at the start, in PDDL without its goal: every kind of object lies about, `target` not in `place`."""
    constants = package("alfworld.gen.constants", "alfworld")
    facts, objects, locations = [], [], {_location(*at) for at in room.receptacles.values()}
    for name, at in room.receptacles.items():
        facts += [f"receptacleType {name} {_kind(name)}Type", f"receptacleAtLocation {name} {_location(*at)}"]
        facts += [f"openable {name}"] * (_kind(name) in constants.OPENABLE_CLASS_SET)

    def put(thing: str, homes: list[str], *extra: str) -> None:
        at = room.receptacles[home := _pick(rng, homes)]
        name = "|".join([thing, *(_metres(at[i] + rng.random()) for i in (0, 1)), _metres(len(objects))])
        objects.append(name)
        facts.extend([f"objectType {name} {thing}Type", f"inReceptacle {name} {home}"])
        facts.extend([f"objectAtLocation {name} {_location(*at)}", *(f"{fact} {name}" for fact in extra)])

    can = {"Cleanable": "cleanable", "Heatable": "heatable", "Coolable": "coolable", "Sliceable": "sliceable"}
    for thing in room.objects:
        holds = [name for name in room.receptacles if thing in constants.VAL_RECEPTACLE_OBJECTS[_kind(name)]]
        least = (2 if kind == "pick_two_obj_and_place" else 1) if thing == target else 0
        extra = [fact for group, fact in can.items() if thing in constants.VAL_ACTION_OBJECTS[group]]
        extra += ["isReceptacleObject"] * (thing in constants.MOVABLE_RECEPTACLES_SET)
        homes = [name for name in holds if thing != target or _kind(name) != place]
        for _ in range(max(least, int(rng.random() * (constants.MAX_NUM_OF_OBJ_INSTANCES + 1)))):
            put(thing, homes, "pickupable", *extra)
    for thing in room.lamps if lamp else ():
        stand = next(stand for stand in LAMP_STANDS if stand in room.kinds)
        put(thing, [name for name in room.receptacles if _kind(name) == stand], "toggleable")
    things = sorted({name.split("|")[0] for name in objects})
    for holder in room.kinds:
        kept = constants.VAL_RECEPTACLE_OBJECTS[holder]
        facts += [f"canContain {holder}Type {thing}Type" for thing in things if thing in kept]
    free = [start for start in (_location(*at, 0, 30) for at in room.free) if start not in locations]
    start = _pick(rng, free)
    declared = [("agent1", "agent")] + [(f"{thing}Type", "otype") for thing in things]
    declared += [(f"{holder}Type", "rtype") for holder in room.kinds] + [(name, "object") for name in objects]
    declared += [(name, "receptacle") for name in room.receptacles]
    declared += [(location, "location") for location in sorted(locations | {start})]
    declared_lines = "\n".join(f"        {_mangled(name)} - {sort}" for name, sort in declared)
    fact_lines = "\n".join(f"        ({_mangled(fact)})" for fact in [*facts, f"atLocation agent1 {start}"])
    return f"(define (problem plan)\n(:domain alfred)\n(:objects\n{declared_lines}\n)\n(:init\n{fact_lines}\n)\n"


def _mangled(text: str) -> str:
    """As alfworld writes names in PDDL."""
    for mark, word in (("-", "minus"), ("|", "bar"), ("+", "plus"), (".", "dot"), (",", "comma")):
        text = text.replace(mark, f"_{word}_")
    return text


def _solution(world: Alfworld, game: str) -> list[str]:
    """What the expert does until it has won."""
    world.games, actions = (game,), []
    world.reset(0)
    while (action := world.expert()) is not None:
        actions.append(action)
        if world.step(action).terminated:
            return actions
    raise RuntimeError(f"{game} has no solution after {actions}: a fault of generate_games, please report it")


def _trajectory(trial: str, kind: str, room: Room, parts: dict[str, str], wanted: str) -> dict[str, Any]:
    """What alfworld reads of a traj_data.json."""
    goal = {"object_target": parts["obj"], "parent_target": parts["recep"], "toggle_target": parts["toggle"]}
    return {
        "task_id": trial,
        "task_type": kind,
        "pddl_params": goal | {"mrecep_target": "", "object_sliced": False},
        "scene": {"floor_plan": f"FloorPlan{room.number}", "scene_num": room.number},
        "turk_annotations": {"anns": [{"task_desc": wanted}]},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make ALFWorld games without the download.")
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unseen", action="store_true", help="in ALFRED's test rooms")
    print(f"{len(generate_games(**vars(parser.parse_args())))} games")
