"""TextWorldExpress's games: cooking, tidying up, finding coins and others (pip install "rlalign[textworld-express]").

    world = TextWorldExpress("coin", "numLocations=5,includeDoors=0")
    world.reset(7); world.step("move north")

The games run in Java, which the package does not bring: `apt-get install default-jre-headless`. All copies of a
process share one Java machine, of 100 MiB and what its heap grows to, which JAVA_TOOL_OPTIONS="-Xmx128m" bounds; a copy
takes a tenth of a MiB. It listens on a port of 127.0.0.1 without a password, as py4j's do.
"""

import contextlib
import json
import os
import shutil
import subprocess
import weakref
from typing import Any

from rlalign.envs.adapters import Clock, package
from rlalign.envs.protocol import Info, Observation, Transition

REWARD = 10.0
SECONDS = 5  # for Java to end by itself
FOLDS = ("train", "dev", "test")


class TextWorldExpress:
    """One game an episode; reward 10 when it is won, `info.score` what the game itself gives, in [0, 1].

    Args:
      game: its name, such as "cookingworld", "twc", "coin", "mapreader", "arithmetic", "sorting", "simonsays",
        "peckingorder".
      params: its settings, such as "numLocations=5,includeDoors=0"; "" for its defaults.
      fold: "train", "dev" or "test"; a seed s is the package's seed s % 1000 of it.
      expert: whether `reset` also finds the game's own solution, which takes longer.
      horizon: steps until an episode is truncated.

    Raises:
      ValueError: an unknown game, setting or fold, horizon below 1.
      ImportError: without textworld-express.
      RuntimeError: no java; a step before `reset` or after the end.
    """

    def __init__(self, game: str, params: str = "", fold: str = "train", *, expert: bool = False, horizon: int = 50):
        if fold not in FOLDS:
            raise ValueError(f"TextWorldExpress: fold is {fold!r}, must be one of {', '.join(FOLDS)}")
        self._clock, self._fold, self._gold = Clock("TextWorldExpress", horizon), fold, expert
        self._java: Any = _java()
        self._server: Any = self._java.gateway.jvm.textworldexpress.runtime.PythonInterface()
        if refused := self._server.load(game, params):
            known = ", ".join(self._server.getGameNames())
            raise ValueError(f"TextWorldExpress: game {game!r} with {params!r} is refused ({refused}); games: {known}")
        self._seeds = list(getattr(self._server, f"getSeeds{fold.title()}")())
        self._task, self._path = "", []
        self._can: tuple[str, ...] = ()

    def reset(self, seed: int) -> Observation:
        """Begin the game of a seed."""
        seed = self._clock.start(seed)
        seed = self._seeds[seed % len(self._seeds)]
        shown = json.loads(self._server.generateNewGameJSON(seed, self._fold, self._gold))
        self._task = self._server.getTaskDescription()
        self._path = list(self._server.getGoldActionSequence()) if self._gold else []
        self._clock.run()
        return self._observation(shown)

    def step(self, action: str) -> Transition:
        """Do something; the game says what it does not understand."""
        last, action = self._clock.tick(action), action.strip()
        valid = action in self._can
        shown = json.loads(self._server.stepJSON(action))
        self._path = self._path[1:] if self._path[:1] == [action] else []
        score, won = min(max(float(shown["score"]), 0.0), 1.0), bool(shown["tasksuccess"])
        ended = won or bool(shown["taskfailure"])
        if ended:
            self._clock.stop()
        info = Info(valid, won, score)
        return Transition(self._observation(shown), REWARD if won else 0.0, ended, last and not ended, info)

    def expert(self) -> str | None:
        """The next action of the game's own solution; None without `expert`, and once another action was taken."""
        return self._path[0] if self._path and self._clock.running else None

    def close(self) -> None:
        """Let go of the Java machine; it ends with its last copy."""
        self._server = self._java = None
        self._clock.stop()

    def _observation(self, shown: dict[str, Any]) -> Observation:
        self._can = tuple(sorted(set(shown["validActions"])))  # theirs come in the order of hashes
        text, seen = shown["observation"].strip(), shown["look"].strip()
        return Observation(text, self._task, self._can, (seen or text, shown["inventory"].strip()))


class _Java:
    """A Java machine, until nothing refers to it."""

    def __init__(self):
        express = package("textworld_express", "textworld-express")
        if shutil.which("java") is None:
            raise RuntimeError("TextWorldExpress: there is no java in PATH: apt-get install default-jre-headless")
        environment = express.TextWorldExpressEnv()
        self.gateway = environment._gateway
        weakref.finalize(self, _end, environment, os.getpid())


def _end(environment: Any, owner: int) -> None:
    if os.getpid() != owner:  # a fork of it
        return
    process = environment._gateway.java_process
    with contextlib.suppress(OSError):  # it is gone already
        environment.close()
        process.stdin.close()
    try:
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_running: dict[int, Any] = {}  # process id -> weak reference to its Java machine


def _java() -> _Java:
    """The Java machine of this process, which its copies keep."""
    running = _running.get(os.getpid(), lambda: None)()
    if running is None:
        running = _Java()
        _running[os.getpid()] = weakref.ref(running)
    return running
