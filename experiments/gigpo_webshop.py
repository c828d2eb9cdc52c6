"""A language model learns to shop in WebShop by GiGPO: the paper's setup (arXiv 2505.10978), for a GPU or TPU machine.

    cd WebShop && ./setup.sh -d all && python -m web_agent_site.app       # princeton-nlp/WebShop, on port 3000
    python experiments/gigpo_webshop.py --model path/to/Qwen2.5-1.5B-Instruct
    ... --url http://127.0.0.1:3000 --goals 6910
    ... --preset smoke                                         # two tasks of four steps, for the machinery
    ... --preset paper --topology v5p:2x2x4                    # planned, not run

16 groups of 8 copies, 15 steps, prompts of up to 4096 tokens that show the last two turns, answers of up to 512 with
<think> and <action>; reward 10 for a purchase that scores 1, 0.1 less for an invalid action; advantages are not divided
by deviations. The paper reports, after 150 iterations of Qwen2.5-1.5B, 67.4 % of the tasks (GRPO 56.8). WebShop's goals
0 to 499 are held out. This script has not been run against WebShop itself: we have no number yet.

Writes RUN/report.html and RUN/trajectories.html; the last line on stdout is the result as JSON.
"""

import dataclasses
import json
from typing import Literal

import tyro
from language_agents import Settings, ready, reinforce

from rlalign.envs.webshop import WebShop

HELD_OUT = 500  # WebShop's own test goals come first


@dataclasses.dataclass(frozen=True)
class GigpoWebshop(Settings):
    """Settings, with the defaults of this world.

    Args:
      url: of WebShop's server.
      goals: how many it has, those of the test among them.
    """

    url: str = "http://127.0.0.1:3000"
    goals: int = 6910
    max_steps: int = 15
    max_prompt: int = 4096
    minibatches: int = 30
    scale: Literal["std", "none"] = "none"
    folder: str = "runs/gigpo-webshop"


def main(config: GigpoWebshop) -> dict:
    """Reinforce; returns the result."""
    if config.goals <= HELD_OUT:
        raise SystemExit(f"--goals {config.goals}: the first {HELD_OUT} are held out, none is left to train on")
    tasks, held_out = range(HELD_OUT, config.goals), range(HELD_OUT)
    arguments = {"url": config.url, "goals": config.goals, "horizon": config.max_steps}
    return reinforce("gigpo_webshop", config, WebShop, tasks=tasks, held_out=held_out, arguments=arguments)


if __name__ == "__main__":
    print(json.dumps(main(ready(tyro.cli(GigpoWebshop), "gigpo_webshop.toml"))))
