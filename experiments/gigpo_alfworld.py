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
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import tyro

import rlalign as ra
from rlalign.cli import plan_paper
from rlalign.envs.alfworld import Alfworld
from rlalign.io.experiment import with_preset


@dataclasses.dataclass(frozen=True)
class GigpoAlfworld:
    """Settings of the experiment; every field is a flag.

    Args:
      model: a Hugging Face folder with a chat template.
      games, held_out: folders of game files.
      transcript: prompts are the episode so far, token by token, in place of the last two turns written anew.
      workers: processes that the copies share.
      topology: devices that the paper's run is planned for (preset "paper": nothing is run).
    """

    model: str = ""
    games: str = "games"
    held_out: str = "held-out"
    algorithm: Literal["gigpo", "grpo", "rloo", "hgpo"] = "gigpo"
    preset: Literal["smoke", "paper", "run"] = "run"
    seed: int = 0
    steps: int = 150
    tasks_per_step: int = 16
    copies: int = 8
    max_steps: int = 50
    max_prompt: int = 2048
    max_new_tokens: int = 512
    minibatches: int = 25
    eval_tasks: int = 64
    learning_rate: float = 1e-6
    transcript: bool = False
    workers: int = 4
    folder: str = "runs/gigpo-alfworld"
    topology: str = "v5p:2x2x4"


SMOKE = {"steps": 1, "tasks_per_step": 2, "copies": 2, "max_steps": 4, "max_new_tokens": 16, "minibatches": 1}
PRESETS = {"run": {}, "smoke": SMOKE | {"eval_tasks": 2, "workers": 2, "folder": "runs/gigpo-alfworld-smoke"}}


def main(config: GigpoAlfworld) -> dict:
    """Reinforce; returns the result."""
    if not Path(config.model, "config.json").is_file():
        raise SystemExit(f"--model {config.model!r} is no Hugging Face folder: rlalign.models.download(NAME, FOLDER)")
    begin = time.perf_counter()
    mesh = ra.make_mesh(fsdp=jax.device_count()) if jax.device_count() > 1 else None
    tokenizer = ra.load_tokenizer(config.model)
    decoder, params = ra.load_pretrained(config.model, mesh=mesh)
    form = ra.rebuilt(lambda text: tokenizer.chat([{"role": "user", "content": text}]), history=2)
    if config.transcript:
        form = ra.chat_transcript(tokenizer)
    games = {split: Alfworld(folder).games for split, folder in (("train", config.games), ("held", config.held_out))}
    every = sorted({*games["train"], *games["held"]})  # task seeds are places in it
    tasks, held_out = ([i for i, game in enumerate(every) if game in games[split]] for split in ("train", "held"))
    run = ra.AgentConfig(
        folder=config.folder,
        algorithm=config.algorithm,
        steps=config.steps,
        tasks_per_step=config.tasks_per_step,
        episodes=ra.Episodes(
            copies=config.copies,
            max_steps=config.max_steps,
            max_prompt=config.max_prompt,
            sampling=ra.SampleConfig(1, config.max_new_tokens, eos_ids=tokenizer.eos_ids),
        ),
        optimizer=ra.OptimizerConfig(learning_rate=config.learning_rate),
        row_length=config.max_prompt + config.max_new_tokens,
        minibatches=config.minibatches,
        seed=config.seed,
        eval_every=10,
        eval_tasks=min(config.eval_tasks, len(held_out)),
        eval_temperature=0.4,
        keep_params=False,
    )
    data = {"ALFWORLD_DATA": os.environ["ALFWORLD_DATA"]} if "ALFWORLD_DATA" in os.environ else {}
    how = {"workers": config.workers, "arguments": {"games": every}, "environment": data, "reset_limit": 120.0}
    with ra.WorkerWorlds(Alfworld, copies=config.tasks_per_step * config.copies, **how) as worlds:
        result = ra.fit_agent(
            run,
            decoder=decoder,
            params=params,
            worlds=worlds,
            tasks=tasks,
            eval_tasks=held_out,
            form=form,
            parse=ra.tagged,
            decode=tokenizer.decode,
            mesh=mesh,
        )
    return {
        "experiment": "gigpo_alfworld",
        **dataclasses.asdict(config),
        "success": result.accuracy,
        "seconds": round(time.perf_counter() - begin, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    flags = tyro.cli(GigpoAlfworld)
    if flags.preset == "paper":
        sys.exit(plan_paper(Path(__file__).parent / "plans" / "gigpo_alfworld.toml", flags.topology))
    print(json.dumps(main(with_preset(flags, PRESETS))))
