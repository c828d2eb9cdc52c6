"""TextWorld's games, those that `tw-make` makes (pip install "rlalign[textworld]").

    tw-make tw-simple --rewards dense --goal detailed --seed 3 --output games/3.z8      # 20 s; it works offline
    world = TextWorld("games"); world.reset(7); world.step("open chest drawer")

tw-make writes a .json beside each .z8; both are needed: the one has the story's texts, the other what is admissible.
"""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlalign.envs.adapters import Clock, package
from rlalign.envs.protocol import Info, Observation, Transition

REWARD = 10.0
NOTHING = "Nothing happens."
WANTED = ("admissible_commands", "description", "inventory", "lost", "max_score", "objective", "policy_commands")
WANTED += ("score", "won")


class TextWorld:
    """One game an episode; reward 10 when it is won, `info.score` the share of its points.

    Only admissible commands reach the game, as its interpreter also knows "undo", "quit" and several commands in one.

    Args:
      games: .z8 files or their .json, or a folder with them, at any depth. Sorted by path; a seed s is game
        s % number of games.
      horizon: steps until an episode is truncated.

    Raises:
      FileNotFoundError: no games there, or one without its .json or .z8.
      ValueError: another kind of file (.ulx needs textworld < 1.7), horizon below 1.
      ImportError: without textworld.
      RuntimeError: a step before `reset` or after the end.
    """

    def __init__(self, games: str | Path | Sequence[str | Path], *, horizon: int = 50):
        self._clock = Clock("TextWorld", horizon)
        self.games = _found(games)
        textworld = package("textworld", "textworld")
        self._start, self._infos = textworld.start, textworld.EnvInfos(**dict.fromkeys(WANTED, True))
        self._env: Any = None
        self._loaded, self._task, self._plan = "", "", []
        self._can: tuple[str, ...] = ()

    def reset(self, seed: int) -> Observation:
        """Begin game seed % len(games)."""
        seed = self._clock.start(seed)
        game = self.games[seed % len(self.games)]
        if game != self._loaded:
            self.close()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Game .* is not fully supported")  # by jericho; textworld sees to it
                self._env = self._start(game, self._infos)
            self._loaded = game
        shown = self._env.reset()
        self._task = " ".join(shown.objective.split())
        self._clock.run()
        return self._observation(shown.description, shown)

    def step(self, action: str) -> Transition:
        """Do what is admissible; anything else gets "Nothing happens." """
        last, action = self._clock.tick(action), action.strip()
        if action not in self._can:
            return Transition(self._seen._replace(text=NOTHING), 0.0, False, last, self._info._replace(valid=False))
        shown, _, _ = self._env.step(action)
        won, ended = bool(shown.won), bool(shown.won or shown.lost)
        if ended:
            self._clock.stop()
        observation = self._observation(shown.feedback.rpartition("\n>")[0] or shown.feedback, shown)
        return Transition(observation, REWARD if won else 0.0, ended, last and not ended, self._info)

    def expert(self) -> str | None:
        """The next action of the game's own solution from here; None where it has none."""
        return self._plan[0] if self._plan and self._clock.running else None

    def close(self) -> None:
        """Let the interpreter go."""
        if self._env is not None:
            self._env.close()
        self._env, self._loaded = None, ""
        self._clock.stop()

    def _observation(self, text: str, shown: Any) -> Observation:
        self._can, self._plan = tuple(shown.admissible_commands), list(shown.policy_commands or ())
        won, points = bool(shown.won), (shown.score or 0) / (shown.max_score or 1)
        self._info = Info(won=won, score=1.0 if won else min(max(points, 0.0), 1.0))
        anchor = _tidy(shown.description), _tidy(shown.inventory)
        self._seen = Observation(_tidy(text), self._task, self._can, anchor)
        return self._seen


def _tidy(text: str | None) -> str:
    """A text without blank lines, which the interpreter leaves many of."""
    return re.sub(r"\s*\n\s*", "\n", (text or "").strip())


def _found(games: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """The story files, sorted; each has its .json beside it."""
    if isinstance(games, str | Path):
        place = Path(os.path.expanduser(os.path.expandvars(games)))
        paths = sorted(place.rglob("*.z8")) if place.is_dir() else [place]
    else:
        paths = sorted(Path(game) for game in games)
    if not paths:
        raise FileNotFoundError(f"TextWorld: {games!s:.200} has no game: tw-make tw-simple --output {games!s:.80}/1.z8")
    for path in paths:
        if path.suffix not in (".z8", ".json"):
            raise ValueError(f"TextWorld: {path} is no game that textworld plays with texts: make a .z8 with tw-make")
        for other in (path.with_suffix(".z8"), path.with_suffix(".json")):
            if not other.is_file():
                raise FileNotFoundError(f"TextWorld: there is no {other}: tw-make writes it beside {path.name}")
    return tuple(str(path.with_suffix(".z8")) for path in paths)
