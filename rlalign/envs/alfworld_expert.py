"""Somebody who knows where everything is in an ALFWorld game, from any state: demonstrations, and solutions of games.

alfworld's own two are a planner, which takes minutes in large rooms, and a searcher that takes what it cannot see for
unknown; this one reads the facts of the state, and takes some microseconds.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

DEVICES = {"isclean": ("clean", "sinkbasin"), "ishot": ("heat", "microwave"), "iscool": ("cool", "fridge")}


class Goal(NamedTuple):
    """What a game asks for.

    Attributes:
      thing: the kind of object.
      place: the kind of receptacle; "" where it is to be looked at.
      lamp: the kind of lamp that it is to be looked at under; else "".
      condition: what it must be, of DEVICES; "" for none.
      count: how many, all in one receptacle.
    """

    thing: str
    place: str
    lamp: str
    condition: str
    count: int


def goal_of(problem: str) -> Goal | None:
    """The goal of a PDDL problem; None for one that ALFWorld leaves out (slices, things in things).

    >>> goal_of("(:goal (and (isHot ?o) (inReceptacle ?o ?r) (objectType ?o EggType) (receptacleType ?r DeskType)))")
    Goal(thing='egg', place='desk', lamp='', condition='ishot', count=1)
    """
    text = problem.lower().rpartition("(:goal")[2]
    kinds = dict(re.findall(r"objecttype \?(\w+) (\w+)type", text))
    places = re.findall(r"receptacletype \?\w+ (\w+)type", text)
    conditions = [condition for condition in DEVICES if f"({condition} " in text]
    held, lit = re.search(r"holds \?\w+ \?(\w+)", text), re.search(r"istoggled \?(\w+)", text)
    if "inreceptacleobject" in text or "issliced" in text:
        return None
    if held and lit and {held[1], lit[1]} <= set(kinds):
        return Goal(kinds[held[1]], "", kinds[lit[1]], "", 1)
    if not places or len(set(kinds.values())) != 1:
        return None
    return Goal(next(iter(kinds.values())), places[0], "", "".join(conditions[:1]), len(kinds))


class _State:
    """A state's facts, by what is asked of them."""

    def __init__(self, facts: Iterable[Any], names: Mapping[str, str]):
        self.names = names
        self.of = collections.defaultdict(set)  # predicate -> its arguments
        for fact in facts:
            self.of[fact.name].add(tuple(argument.name for argument in fact.arguments))
        self.at = next(location for _, location in self.of["atlocation"])
        self.location = dict(sorted(self.of["receptacleatlocation"]))
        self.sort = dict(self.of["receptacletype"]) | dict(self.of["objecttype"])
        self.held = next((thing for _, thing in sorted(self.of["holds"])), "")
        self.homes = collections.defaultdict(list)  # thing -> receptacles; a mug in a machine is on the table too
        for thing, home in sorted(self.of["inreceptacle"]):
            self.homes[thing].append(home)

    def is_(self, predicate: str, thing: str) -> bool:
        return (thing,) in self.of[predicate]

    def kind(self, name: str) -> str:
        return self.sort.get(name, "").removesuffix("type")

    def receptacles(self, kind: str) -> list[str]:
        return [name for name in self.location if self.kind(name) == kind]

    def near(self, receptacles: Sequence[str]) -> list[str]:
        """Those here before others."""
        return sorted(receptacles, key=lambda name: (self.location[name] != self.at, name))

    def there(self, home: str, action: str, *, inside: bool = True) -> str:
        """The action, or what must come before it at another place or a closed one."""
        if self.location[home] != self.at:
            return f"go to {self.names[home]}"
        closed = inside and self.is_("openable", home) and not self.is_("opened", home)
        return f"open {self.names[home]}" if closed else action


def next_action(goal: Goal, facts: Iterable[Any], names: Mapping[str, str]) -> str | None:
    """What to do next towards a goal; None where the room has no way.

    Args:
      goal: of the game.
      facts: all of the state, textworld's.
      names: of what the facts are about, as commands name it.
    """
    state = _State(facts, names)
    held = state.held
    if held and state.kind(held) != goal.thing:
        return _put_away(state)
    if goal.lamp:
        lamp = next((lamp for lamp in sorted(state.homes) if state.kind(lamp) == goal.lamp), None)
        if held:
            return lamp and state.there(state.near(state.homes[lamp])[0], f"use {names[lamp]}")
        return _take(state, _within_reach(state, goal, ()))
    targets = state.receptacles(goal.place)
    if not targets:
        return None
    ready = [
        thing
        for thing in sorted(state.sort)
        if state.kind(thing) == goal.thing and (not goal.condition or state.is_(goal.condition, thing))
    ]
    best = max(state.near(targets), key=lambda home: sum(home in state.homes[thing] for thing in ready))
    if not held:
        return _take(state, _within_reach(state, goal, [thing for thing in ready if best in state.homes[thing]]))
    if held not in ready:
        verb, kind = DEVICES[goal.condition]
        device = next(iter(state.near(state.receptacles(kind))), None)
        return device and state.there(device, f"{verb} {names[held]} with {names[device]}", inside=False)
    return state.there(best, f"move {names[held]} to {names[best]}")


def _within_reach(state: _State, goal: Goal, done: Sequence[str]) -> list[str]:
    """Things of the goal's kind that can be taken and are not where they should be."""
    return [
        thing
        for thing in sorted(state.homes)
        if state.kind(thing) == goal.thing and state.is_("pickupable", thing) and thing not in done
    ]


def _take(state: _State, things: Sequence[str]) -> str | None:
    """Take the first of the nearest things."""
    homes = {home: thing for thing in reversed(things) for home in state.homes[thing]}
    if not homes:
        return None
    home = state.near(list(homes))[0]
    return state.there(home, f"take {state.names[homes[home]]} from {state.names[home]}")


def _put_away(state: _State) -> str | None:
    """Put what is carried somewhere near that can hold it."""
    sort = state.sort.get(state.held, "")
    homes = [home for home in state.location if (state.sort.get(home, ""), sort) in state.of["cancontain"]]
    home = next(iter(state.near(homes)), None)
    return home and state.there(home, f"move {state.names[state.held]} to {state.names[home]}")
