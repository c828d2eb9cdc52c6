"""ALFWorld's text games: household chores in ALFRED's rooms, by the package alfworld (pip install "rlalign[alfworld]").

    world = Alfworld("$ALFWORLD_DATA/json_2.1.1/train")       # what alfworld-download brings, or:
    generate_games("games", 100); world = Alfworld("games")   # made here, of what the package ships: alfworld_games.py
    world.reset(7); world.step("go to fridge 1")

One copy is one planner library and one state, about 4 MiB in a process of 80: dozens share a process. Texts are
ALFWorld's, with two things done to them: lists ("you see a mug 2, and a apple 1") are sorted, because their order would
follow the state's hashes, and the first text does not repeat the task. The grammar of a game file is evaluated as
Python by textworld: load only files that you would run.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rlalign.envs.adapters import Clock, package
from rlalign.envs.alfworld_expert import Goal, goal_of, next_action
from rlalign.envs.protocol import Info, Observation, Transition

REWARD = 10.0
NOTHING = "Nothing happens."  # what the grammar says where nothing does
FILE = "game.tw-pddl"
TASK = re.compile(r"\s*Your task is to: (.*?)\.?\s*\Z", re.DOTALL)
LISTS = re.compile(r"(?<=you see )(.*?)(?=\.)|(?<=You are facing the )(.*?)(?=\.)|(?<=You are carrying: )(.*?)(?=\.)")
CONDITIONS = ("isclean", "ishot", "iscool")
PASSING = ("checked", "examined")  # facts that say what was looked at: no part of a state
GAMES = 8  # of so many the translations and commands are remembered: copies of a group play the same one


class Alfworld:
    """One game an episode; reward 10 when it is won.

    Args:
      games: game files, or a folder with them, at any depth; environment variables are expanded. Sorted by path; a seed
        s is game s % number of games. Of a folder, games that alfworld itself leaves out are left out: those marked
        unsolvable, and tasks with movable receptacles or slices.
      anchor: what makes two states one for step-level groups: "carried", the text with what is carried and its
        condition; "text" alone, as in GiGPO's code; "state", everything, whatever was said.
      horizon: steps until an episode is truncated.

    Raises:
      FileNotFoundError: no games there.
      ValueError: an unknown anchor, horizon below 1.
      ImportError: without alfworld.
      RuntimeError: a step before `reset` or after the end; a game file that is none.
    """

    def __init__(
        self,
        games: str | Path | Sequence[str | Path] = "$ALFWORLD_DATA/json_2.1.1/train",
        *,
        anchor: Literal["carried", "text", "state"] = "carried",
        horizon: int = 50,
    ):
        if anchor not in ("carried", "text", "state"):
            raise ValueError(f"Alfworld: anchor is {anchor!r}, must be 'carried', 'text' or 'state'")
        self._clock, self._anchor = Clock("Alfworld", horizon), anchor
        if isinstance(games, str | Path):
            data = os.environ.get("ALFWORLD_DATA", "~/.cache/alfworld")  # as alfworld has it
            games = os.path.expandvars(str(games).replace("$ALFWORLD_DATA", data))
            self.games = _found(os.path.abspath(os.path.expanduser(games)))  # workers have a folder of their own
        else:
            self.games = tuple(sorted(os.path.abspath(game) for game in games))
        if not self.games:
            raise FileNotFoundError("Alfworld: games names no file: give some, or a folder")
        self._names = package("alfworld.agents.utils.misc", "alfworld").Demangler
        self._env = package("textworld.envs.pddl", "alfworld").PddlEnv()
        self._loaded, self._task = "", ""
        self._goal: Goal | None = None
        self._facts: list[Any] = []
        self._can: tuple[str, ...] = ()

    def reset(self, seed: int) -> Observation:
        """Begin game seed % len(games)."""
        seed = self._clock.start(seed)
        game = self.games[seed % len(self.games)]
        with _translations_remembered():
            if game != self._loaded:
                self._load(game)
            shown = self._env.reset()
        text = shown.feedback.partition("=-")[2] or shown.feedback
        found = TASK.search(text)
        if found is None:
            raise RuntimeError(f"{game} says no task ('Your task is to: ...'): make it anew with alfworld-generate")
        self._task = found[1]
        self._clock.run()
        return self._observation(text[: found.start()].strip(), shown)

    def step(self, action: str) -> Transition:
        """Do something; what is not admissible gets "Nothing happens." """
        last, action = self._clock.tick(action), action.strip()
        shown, _, _ = self._env.step(action)
        valid, won = action in self._can, bool(shown["won"])
        if won:
            self._clock.stop()
        observation = self._observation(shown.feedback, shown)
        info = Info(valid, won, float(won))
        return Transition(observation, REWARD if won else 0.0, won, last and not won, info)

    def expert(self) -> str | None:
        """The next action of somebody who knows the room; None where no episode goes on, and where there is no way."""
        if not self._clock.running or self._goal is None:
            return None
        names = {name: info.name for name, info in self._env._entity_infos.items()}
        action = next_action(self._goal, self._facts, names)
        return action if action in self._can else None

    def close(self) -> None:
        """Let the planner free its game. Its library stays loaded: unloading it crashes the process."""
        if self._loaded:
            self._env.downward_lib.cleanup()
            self._loaded = ""
        self._clock.stop()

    def _load(self, game: str) -> None:
        self._loaded = ""
        try:
            data = json.loads(Path(game).read_bytes())
            self._env.load(data)
        except FileNotFoundError:
            raise
        except (Exception, SystemExit) as error:  # its parsers raise anything, and exit
            raise RuntimeError(f"{game} is no game of ALFWorld ({error!r}): generate or download it again") from error
        self._goal = goal_of(data["pddl_problem"])
        infos = self._env._entity_infos
        names = self._names(game_infos=infos)
        for info in infos.values():
            info.name = names.demangle_alfred_name(info.id).strip()
        grammar = self._env._logic.grammar
        grammar.derive = _commands_remembered(grammar.derive, _commands(game))
        self._loaded = game

    def _observation(self, text: str, shown: Any) -> Observation:
        text = LISTS.sub(lambda found: _sorted_list(found[0]), text)
        self._can, self._facts = tuple(shown["admissible_commands"]), shown["_facts"]
        return Observation(text, self._task, self._can, self._state(text, self._facts))

    def _state(self, text: str, facts: Sequence[Any]) -> Hashable:
        infos = self._env._entity_infos
        if self._anchor == "text":
            return None
        if self._anchor == "state":
            known = sorted(str(fact) for fact in facts if fact.name not in PASSING)
            return hashlib.blake2b("\n".join(known).encode(), digest_size=16).hexdigest()
        held = [fact.arguments[-1].name for fact in facts if fact.name == "holds"]
        carried = [(fact.name, fact.arguments[-1].name) for fact in facts if fact.name in ("holds", *CONDITIONS)]
        return text, tuple(sorted(f"{how} {infos[name].name}" for how, name in carried if name in held))


@functools.lru_cache(maxsize=16)
def _found(folder: str) -> tuple[str, ...]:
    """The games of a folder, which copies in one process look for once."""
    paths = sorted(str(path) for path in Path(folder).rglob(FILE)) if Path(folder).is_dir() else []
    games = tuple(path for path in paths if "movable" not in path and "Sliced" not in path and _is_solvable(path))
    if not games:
        raise FileNotFoundError(
            f"Alfworld: {folder} has {len(paths)} files {FILE}, none that can be played: run alfworld-download, or "
            f"make some: python -m rlalign.envs.alfworld_games {folder} --count 100"
        )
    return games


def _is_solvable(path: str) -> bool:
    return re.search(rb'"solvable":\s*true', Path(path).read_bytes()) is not None


def _sorted_list(text: str) -> str:
    """Names with their articles as the grammar lists them, by kind and number.

    >>> _sorted_list("a mug 10, a mug 2, and a apple 1")
    'a apple 1, a mug 2, and a mug 10'
    """
    names = re.split(r", and |, ", text)
    if len(names) < 2:
        return text
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    return ", ".join(names[:-1]) + ", and " + names[-1]


@functools.lru_cache(maxsize=4 * GAMES)
def _commands(game: str) -> dict[Any, str]:
    """What `_commands_remembered` knows of a game, for all copies that play it."""
    return {}


def _commands_remembered(derive: Any, known: dict[Any, str]) -> Any:
    """A grammar's `derive` that writes each command once: it names things, and names stay.

    Most of a step's time would go into writing the same admissible commands again.
    """

    def remembered(start: str, context: dict[str, Any]) -> str:
        if "#" in start or not context["mapping"]:  # a feedback, which tells of the state
            return derive(start, context)
        words = set(re.findall(r"\w+", start))
        key = start, *(thing.name for role, thing in context["mapping"].items() if role.name in words)
        if key not in known:
            known[key] = derive(start, context)
        return known[key]

    return remembered


@contextlib.contextmanager
def _translations_remembered() -> Iterator[None]:
    """Let textworld translate a game once where it would four times, and leave sys.argv, which it changes, alone."""
    module, arguments = package("fast_downward", "alfworld"), sys.argv
    plain, module.pddl2sas = module.pddl2sas, _translated
    try:
        yield
    finally:
        module.pddl2sas, sys.argv = plain, arguments


@functools.lru_cache(maxsize=GAMES)
def _translation(domain: str, problem: str) -> Any:
    return package("fast_downward.interface", "alfworld").pddl2sas(domain, problem)


def _translated(domain: str, problem: str, **_: Any) -> Any:
    """The same also where `optimize` asks for one that planning is faster with: nothing here plans."""
    return _translation(domain, problem)


def __getattr__(name: str) -> Any:
    if name == "generate_games":
        from rlalign.envs.alfworld_games import generate_games

        return generate_games
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
