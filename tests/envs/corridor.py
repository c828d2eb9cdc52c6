"""A corridor whose end is the task, and actions that do to their process what environments do."""

import os
import time

import numpy as np

from rlalign.envs.protocol import Info, Observation, Transition


class Corridor:
    """Walk `length` steps right within `horizon`: the seed says where the way begins."""

    def __init__(self, length=3, horizon=6, broken=False):
        if broken:
            raise RuntimeError("no corridor here")
        self.length, self.horizon = length, horizon
        self.at = self.taken = None

    def reset(self, seed):
        if seed == 666:
            raise KeyError("no such task")
        self.at, self.taken = seed % 2, 0
        return self.seen()

    def seen(self):
        return Observation(f"at {self.at}", f"go to {self.length}", ("left", "right"), ("at", self.at, (self.taken,)))

    def step(self, action):
        if action == "hang":
            time.sleep(60)
        if action == "raise":
            raise ValueError("out of order")
        if action == "exit":
            raise SystemExit(3)
        if action == "die":
            os.kill(os.getpid(), 9)
        if action == "stray":
            print("not for the channel", flush=True)
        valid = action in ("left", "right")
        self.at = max(0, self.at + {"left": -1, "right": 1}.get(action, 0))
        self.taken += 1
        won = self.at == self.length
        info = Info(valid, won, self.at / self.length)
        return Transition(self.seen(), 10.0 * won, won, self.taken == self.horizon and not won, info)


class Careless(Corridor):
    """Returns NumPy's numbers; and for some actions what no environment may return."""

    closed = 0

    def step(self, action):
        done = super().step(action if action in ("left", "right") else "left")
        wrong = {"short": done[:4], "nan": done._replace(reward=float("nan")), "none": None}
        numbers = done._replace(reward=np.float32(done.reward), terminated=np.bool_(done.terminated))
        return wrong.get(action, numbers)

    def close(self):
        type(self).closed += 1


class Drifting(Corridor):
    """Shows which process it is in: not the same when it is brought back."""

    def seen(self):
        return super().seen()._replace(text=f"at {self.at} in {os.getpid()}")


def no_environment():
    """Loads, but not in a worker."""
    if os.environ.get("RLALIGN_REWARD_WORKER"):
        raise OSError("java is not installed")
    return Corridor()
