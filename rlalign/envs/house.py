"""House: chores in a small room, in the manner of ALFWorld, in plain Python.

    environment = House(**LEVELS[2])
    observation = environment.reset(task_seed)
    observation, reward, terminated, truncated, info = environment.step("go to countertop 1")

A room has 4 to 8 receptacles. Some are closed and show what they hold once they are opened; nothing closes them again.
One object can be carried. Fridge and microwave cool and heat without being opened, as ALFWorld's do. Commands and texts
are ALFWorld's in lower case, except that arriving and opening also say what is carried: a policy that remembers two
steps then sees what it needs. Every text is made of the tables below, so VOCABULARY is all that can be said, word by
word, and with NAMES and PHRASES beside it in fewer tokens.
"""

import functools
import operator
import random
from collections.abc import Sequence

from rlalign.envs.protocol import Info, Observation, Transition
from rlalign.envs.words import phrases, vocabulary

REWARD = 10.0  # of the step that ends a task
LIMITS = {"receptacles": range(4, 9), "objects": range(2, 7), "horizon": range(12, 1001)}

FIXTURES = {  # kind -> in or on, whether it must be opened, how many a room has at most
    "cabinet": ("in", True, 2),
    "countertop": ("on", False, 2),
    "desk": ("on", False, 1),  # with the lamp
    "drawer": ("in", True, 2),
    "fridge": ("in", True, 1),
    "microwave": ("in", True, 1),
    "shelf": ("on", False, 2),
    "sinkbasin": ("in", False, 1),
    "table": ("on", False, 2),
}
TARGETS = ("cabinet", "countertop", "drawer", "fridge", "shelf", "table")
LAMP = "desklamp 1"
TREATMENTS = {  # verb -> where, what remains of the object's condition, what is added
    "clean": ("sinkbasin", 0b111, 0b001),
    "cool": ("fridge", 0b001, 0b010),
    "heat": ("microwave", 0b001, 0b100),
}
CONDITIONS = {0b000: "", 0b001: "clean ", 0b010: "cool ", 0b011: "clean cool ", 0b100: "hot ", 0b101: "clean hot "}
ABLE = {  # what can be done -> to which kinds of objects
    "clean": "apple bowl cup egg fork knife lettuce mug pan plate potato spoon tomato",
    "cool": "apple bowl bread cup egg lettuce mug pan plate potato tomato",
    "heat": "apple bread cup egg mug plate potato tomato",
    "look": "book bowl mug pen plate",
}
THINGS = tuple(sorted({kind for kinds in ABLE.values() for kind in kinds.split()}))
TASKS = ("put", "look", "clean", "heat", "cool", "two")  # ALFWorld's six kinds
DOABLE = {task: tuple(ABLE[task].split()) if task in ABLE else THINGS for task in TASKS}
LEVELS: dict[int, dict] = {  # a curriculum: House(**LEVELS[1]) ...
    1: {"receptacles": 4, "objects": 2, "tasks": ("put",), "horizon": 15},
    2: {"receptacles": 4, "objects": 3, "tasks": ("put", "clean", "cool", "heat"), "horizon": 15},
    3: {"receptacles": 5, "objects": 4, "tasks": ("put", "clean", "cool", "heat", "look"), "horizon": 15},
    4: {"receptacles": 6, "objects": 5, "tasks": TASKS, "horizon": 15},
    5: {"receptacles": 8, "objects": 6, "tasks": TASKS, "horizon": 12},
}
PUT, LOOK_AT, PUT_TWO = "put %s %s %s.", "look at %s under the desklamp.", "put two %s %s %s."
GO, OPEN, USE = "go to %s", "open %s", "use %s"
TAKE, MOVE, TREAT = "take %s from %s", "move %s to %s", "%s %s with %s"
LOOK, INVENTORY = "look", "inventory"  # understood, but never admissible: they change nothing
ROOM = "you are in the middle of a room. you see %s."
CLOSED = "the %s is closed."
SEEN = "%s the %s, you see %s."
CARRIED = "you carry %s."
NOTHING = "nothing happens."
DONE = {  # first word of a command -> what it says
    "go": "you arrive at %s. %s",
    "open": "you open the %s. %s",
    "take": "you pick up the %s from the %s.",
    "move": "you move the %s to the %s.",
    "clean": "you clean the %s using the %s.",
    "cool": "you cool the %s using the %s.",
    "heat": "you heat the %s using the %s.",
    "use": "you turn on the %s.",
}


TEMPLATES = (
    *(PUT, LOOK_AT, PUT_TWO, GO, OPEN, USE, TAKE, MOVE, TREAT, LOOK, INVENTORY),
    *(ROOM, CLOSED, SEEN, CARRIED, NOTHING, *DONE.values()),
)
VOCABULARY = vocabulary(
    (
        *(*FIXTURES, *THINGS, *TREATMENTS, *CONDITIONS.values(), LAMP, "in on a an, and nothing"),
        *TEMPLATES,
        *map(str, range(1, LIMITS["objects"].stop)),
    )
)
NAMES = (
    *(f"{kind} {i}" for kind, (_, _, most) in FIXTURES.items() for i in range(1, most + 1)),
    *(f"{kind} {i}" for kind in THINGS for i in range(1, LIMITS["objects"].stop)),
    LAMP,
)
# What stands between the names, "you pick up the": with NAMES, texts in fewer tokens; see Words.
PHRASES = phrases(TEMPLATES)
TREATED_AT = {place: verb for verb, (place, _, _) in TREATMENTS.items()}
SLOTS = [kind for kind, (_, _, most) in FIXTURES.items() for _ in range(most)]
VALID, INVALID, WON = Info(), Info(valid=False), Info(won=True, score=1.0)


def a(name: str) -> str:
    """A name with its article: an egg 1, a clean egg 1."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def listed(names: tuple[str, ...]) -> str:
    """Names as a sentence has them.

    >>> listed(()), listed(("egg 1", "mug 1", "pan 1"))
    ('nothing', 'an egg 1, a mug 1 and a pan 1')
    """
    *first, last = map(a, names) if names else ("nothing",)
    return f"{', '.join(first)} and {last}" if first else last


@functools.lru_cache(maxsize=1 << 14)
def opened(kind: str, name: str, inside: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """What is seen at an open receptacle, and how to take what it holds."""
    seen = SEEN % (FIXTURES[kind][0], name, listed((LAMP, *inside) if kind == "desk" else inside))
    return seen, tuple(TAKE % (thing, name) for thing in inside)


def numbered(kinds: list[str]) -> list[str]:
    """Names of sorted kinds: cabinet 1, cabinet 2, desk 1."""
    return [f"{kind} {i - kinds.index(kind) + 1}" for i, kind in enumerate(kinds)]


class House:
    """One room with one task an episode; a rlalign.envs.protocol.TextEnvironment.

    Args:
      receptacles: of a room, 4 to 8.
      objects: in a room, 2 to 6.
      tasks: the kinds, of TASKS, that seeds draw from.
      horizon: steps until an episode is truncated, at least 12: somebody who knows the room needs 11 at most.

    Its observations' anchor is (what is seen here, what is carried, the rest): the rest is what the agent opened,
    moved and treated, so that equal anchors of one task are one state, whatever was said last. The first one or two
    of its parts are coarser anchors.

    Raises:
      ValueError: an argument out of range; a seed below 0.
      RuntimeError: a step before `reset` or after the end.

    >>> room = House(**LEVELS[1])
    >>> room.reset(0).task, room.expert()
    ('put a plate in drawer.', 'go to countertop 1')
    >>> room.step("go to countertop 1").observation.text
    'you arrive at countertop 1. on the countertop 1, you see a plate 1.'
    >>> room.step("eat plate 1")[1:]
    (0.0, False, False, Info(valid=False, won=False, score=0.0))
    """

    def __init__(self, receptacles: int = 6, objects: int = 5, tasks: Sequence[str] = TASKS, horizon: int = 15):
        for value, (name, allowed) in zip((receptacles, objects, horizon), LIMITS.items(), strict=True):
            if not isinstance(value, int) or value not in allowed:
                raise ValueError(f"House: {name} is {value!r}, must be an int in [{allowed[0]}, {allowed[-1]}]")
        if not tasks or not set(tasks) <= set(TASKS):
            raise ValueError(f"House: tasks is {tasks!r}, must be some of {', '.join(TASKS)}, such as ('put', 'clean')")
        self._settings = receptacles, objects, tuple(tasks), horizon
        self._slots = [kind for kind in SLOTS if kind != "desk" or "look" in tasks]
        self._random = random.Random()
        self._left = 0  # steps until the horizon; 0 where no episode is going on
        self._started = False

    def reset(self, seed: int) -> Observation:
        """Begin the task that `seed` >= 0 names."""
        if seed < 0:
            raise ValueError(f"House.reset: seed is {seed}, must be at least 0")
        self._random.seed(operator.index(seed))
        self._started, (receptacles, objects, tasks, self._left) = True, self._settings
        draw = self._random.random  # of random, only this is the same in every version of Python
        task = tasks[int(draw() * len(tasks))]
        kind = DOABLE[task][int(draw() * len(DOABLE[task]))]
        target = TARGETS[int(draw() * len(TARGETS))] if task != "look" else "desk"
        device, _, self._needed = TREATMENTS.get(task, (target, 0, 0))

        self._count = 2 if task == "two" else 1
        self._furnish([target] if device == target else [target, device], receptacles)
        self._scatter(kind, target, objects)
        self._device = self._kinds.index(device)
        self._targets = [i for i, name in enumerate(self._kinds) if name == target]
        self._wanted = [i for i, name in enumerate(self._sorts) if name == kind]
        self._look, self._lit = task == "look", False
        self._here = self._held = -1
        where, named = (FIXTURES[target][0], target), a(CONDITIONS[self._needed] + kind)
        put = PUT_TWO % (kind, *where) if task == "two" else PUT % (named, *where)
        self._task = LOOK_AT % named if self._look else put
        self._change()
        return Observation(self._settle(), self._task, self._admissible, self._anchor)

    def _furnish(self, kinds: list[str], count: int) -> None:
        """Draw the receptacles: those of `kinds` and others."""
        slots, draw = self._slots.copy(), self._random.random
        for needed in kinds:
            slots.remove(needed)
        while len(kinds) < count:
            kinds.append(slots.pop(int(draw() * len(slots))))
        kinds.sort()
        self._kinds, self._names = kinds, numbered(kinds)
        self._go = tuple([GO % name for name in self._names])
        self._going = {action: i for i, action in enumerate(self._go)}
        self._open = [not FIXTURES[name][1] for name in kinds]
        self._views: list = [None] * count + [(ROOM % listed(tuple(self._names)), (), self._go)]  # the last is place -1

    def _scatter(self, kind: str, target: str, count: int) -> None:
        """Draw the objects and their places: enough of one kind elsewhere than at the target, and others."""
        things, draw = [kind] * self._count, self._random.random
        while len(things) < count:
            things.append(THINGS[int(draw() * len(THINGS))])
        things.sort()
        self._sorts, self._things = things, numbered(things)
        everywhere = range(len(self._kinds))
        elsewhere = [i for i in everywhere if self._kinds[i] != target]
        self._place = []  # of each thing; -1 where it is carried
        for name in things:
            places = elsewhere if name == kind else everywhere
            self._place.append(places[int(draw() * len(places))])
        self._condition = [0] * count

    def step(self, action: str) -> Transition:
        """Do something: what is admissible, or "look" or "inventory"; anything else changes nothing."""
        if not self._left:
            when = "after the end of the episode" if self._started else "before reset"
            raise RuntimeError(f"House.step({action!r}) {when}: call reset(seed) first")
        self._left -= 1
        info, reward = VALID, 0.0
        if action in self._admissible:
            there = self._going.get(action)
            text = self._do(action) if there is None else self._go_to(there)
            if self._done:
                self._left, info, reward = 0, WON, REWARD
        elif action == LOOK:
            text = self._anchor[0] + self._burden
        elif action == INVENTORY:
            text = CARRIED % self._carried
        else:
            text, info = NOTHING, INVALID
        observation = Observation(text, self._task, self._admissible, self._anchor)
        return Transition(observation, reward, info is WON, not self._left and info is not WON, info)

    def _go_to(self, there: int) -> str:
        """Do what most steps do; returns what it says."""
        self._here = there
        self._done = self._look and self._won()
        return DONE["go"] % (self._names[there], self._settle()) + self._burden

    def _do(self, action: str) -> str:
        """Do anything else that is admissible; returns what it says."""
        verb, *rest = action.split()
        here, name = self._here, self._names[self._here]
        self._views[here] = None
        if verb == "open":
            self._open[here] = True
            self._change()
            return DONE[verb] % (name, self._settle()) + self._burden
        thing = f"{rest[0]} {rest[1]}"
        if verb == "use":
            self._lit = True
        elif verb == "take":
            self._held = self._things.index(thing)
            self._place[self._held] = -1
        elif verb == "move":
            self._place[self._held] = here
            self._held = -1
        else:
            _, kept, added = TREATMENTS[verb]
            self._condition[self._held] = self._condition[self._held] & kept | added
        self._change()
        self._settle()
        return DONE[verb] % ((LAMP,) if verb == "use" else (thing, name))

    def _change(self) -> None:
        """After more than going somewhere: what is carried, the rest of the anchor, and whether the task is done."""
        held = self._held
        self._carried = a(CONDITIONS[self._condition[held]] + self._things[held]) if held >= 0 else "nothing"
        self._burden = f" {CARRIED % self._carried}" if held >= 0 else ""
        self._rest = (*self._open, self._lit, *self._place, *self._condition)
        self._done = self._won()

    def _settle(self) -> str:
        """What is seen here; also finds what is admissible, and the anchor."""
        here, held = self._here, self._held
        seen, others, actions = self._views[here] or self._view(here)
        if held >= 0:
            thing, name, kind = self._things[held], self._names[here], self._kinds[here]
            actions = (*others, MOVE % (thing, name) if self._open[here] else OPEN % name)
            verb = TREATED_AT.get(kind)
            if verb and self._sorts[held] in DOABLE[verb] and not self._condition[held] & TREATMENTS[verb][2]:
                actions += (TREAT % (verb, thing, name),)
            if kind == "desk" and not self._lit:
                actions += (USE % LAMP,)
        self._anchor, self._admissible = (seen, self._carried, self._rest), actions
        return seen

    def _view(self, here: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """What is seen at a receptacle, where to go from it, what free hands can do; kept until something changes."""
        name, kind = self._names[here], self._kinds[here]
        others = self._go[:here] + self._go[here + 1 :]
        if self._open[here]:
            inside = tuple([self._things[i] for i, place in enumerate(self._place) if place == here])
            seen, actions = opened(kind, name, inside)
        else:
            seen, actions = CLOSED % name, (OPEN % name,)
        if kind == "desk" and not self._lit:
            actions += (USE % LAMP,)
        self._views[here] = view = seen, others, others + actions
        return view

    def _is_done(self, i: int) -> bool:
        """Whether a wanted thing is where and as the task has it."""
        return self._place[i] in self._targets and self._condition[i] & self._needed == self._needed

    def _won(self) -> bool:
        if self._look:
            return self._lit and self._here == self._device and self._held in self._wanted
        return sum([self._is_done(i) for i in self._wanted]) >= self._count

    def expert(self) -> str | None:
        """The next action of somebody who knows where everything is, from any state; None where no episode goes on."""
        if not self._left:
            return None
        held = self._held
        if held < 0:
            missing = [i for i in self._wanted if self._look or not self._is_done(i)]
            i = min(missing, key=lambda i: self._place[i] != self._here)
            return self._at(self._place[i], TAKE % (self._things[i], self._names[self._place[i]]))
        thing = self._things[held]
        if held not in self._wanted:
            return self._at(self._here, MOVE % (thing, self._names[self._here]))
        if self._look:
            return self._at(self._device, USE % LAMP)
        for verb, (_, _, added) in TREATMENTS.items():
            if added == self._needed and not self._condition[held] & added:
                name = self._names[self._device]
                return TREAT % (verb, thing, name) if self._here == self._device else GO % name
        target = min(self._targets, key=lambda i: (i != self._here, not self._open[i]))
        return self._at(target, MOVE % (thing, self._names[target]))

    def _at(self, place: int, action: str) -> str:
        """The action, or what must come before it at another place or a closed one."""
        name = self._names[place]
        return GO % name if self._here != place else action if self._open[place] else OPEN % name
