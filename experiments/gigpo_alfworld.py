"""A language model learns ALFWorld's chores by GiGPO: the paper's setup (arXiv 2505.10978), for a GPU or TPU machine.

    make test-envs                                             # sets up .venv-envs, with ALFWorld in it
    .venv-envs/bin/python -m rlalign.envs.alfworld_games games --count 400 --seed 0
    .venv-envs/bin/python -m rlalign.envs.alfworld_games held-out --count 64 --seed 1 --unseen
    .venv-envs/bin/python experiments/gigpo_alfworld.py --model path/to/Qwen2.5-1.5B-Instruct
    ... --games '$ALFWORLD_DATA/json_2.1.1/train' --held-out '$ALFWORLD_DATA/json_2.1.1/valid_seen'  # alfworld-download
    ... --preset smoke                                         # two tasks of four steps, for the machinery
    ... --preset paper --topology v5p:2x2x4                    # planned, not run

16 groups of 8 copies, 50 steps, prompts that show the last two turns, answers of up to 512 tokens with <think> and
<action>; reward 10 for a task that is done, 0.1 less for an invalid action. The paper reports, after 150 iterations of
Qwen2.5-1.5B, 86.7 % of the tasks (GRPO 72.8). This script has not been run at that size: we have no number yet.

Writes RUN/report.html and RUN/trajectories.html; the last line on stdout is the result as JSON.
"""

import dataclasses
import json
import os

import tyro
from language_agents import Settings, ready, reinforce

from rlalign.envs.alfworld import Alfworld


@dataclasses.dataclass(frozen=True)
class GigpoAlfworld(Settings):
    """Settings, with the defaults of this world.

    Args:
      games, held_out: folders of game files.
    """

    games: str = "games"
    held_out: str = "held-out"
    folder: str = "runs/gigpo-alfworld"


def main(config: GigpoAlfworld) -> dict:
    """Reinforce; returns the result."""
    games = {split: Alfworld(folder).games for split, folder in (("train", config.games), ("held", config.held_out))}
    every = sorted({*games["train"], *games["held"]})  # task seeds are places in it
    tasks, held_out = ([i for i, game in enumerate(every) if game in games[split]] for split in ("train", "held"))
    data = {"ALFWORLD_DATA": os.environ["ALFWORLD_DATA"]} if "ALFWORLD_DATA" in os.environ else {}
    how = {"arguments": {"games": every, "horizon": config.max_steps}, "environment": data, "reset_limit": 120.0}
    return reinforce("gigpo_alfworld", config, Alfworld, tasks=tasks, held_out=held_out, **how)


if __name__ == "__main__":
    print(json.dumps(main(ready(tyro.cli(GigpoAlfworld), "gigpo_alfworld.toml"))))
