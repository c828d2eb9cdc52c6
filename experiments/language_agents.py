"""What gigpo_alfworld.py and gigpo_webshop.py share: a language model from a Hugging Face folder that learns in worlds
of texts with the settings of GiGPO's paper (arXiv 2505.10978)."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
from one_loss import Name, objective

import rlalign as ra
from rlalign.cli import plan_paper
from rlalign.envs.worlds import Make
from rlalign.io.experiment import with_preset


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every field is a flag.

    Args:
      model: a Hugging Face folder with a chat template.
      preset: "paper" plans the paper's run for `topology` and runs nothing; "smoke" is a step of two tasks.
      tasks_per_step, copies: groups a step, and episodes of each.
      max_prompt, max_new_tokens: of a turn.
      minibatches: optimizer steps an iteration takes, at most.
      scale: of advantages: "std", or "none".
      transcript: prompts are the episode so far, token by token, in place of the last two turns written anew; give a
        max_prompt for all of an episode, or it ends where it fills its prompt.
      workers: processes that the copies share.
      topology: devices that the paper's run is planned for.
    """

    model: str = ""
    algorithm: Name = "gigpo"
    preset: Literal["smoke", "paper", "run"] = "run"
    seed: int = 0
    steps: int = 150
    tasks_per_step: int = 16
    copies: int = 8
    max_steps: int = 50
    max_prompt: int = 2048
    max_new_tokens: int = 512
    minibatches: int = 25
    scale: Literal["std", "none"] = "std"
    eval_tasks: int = 64
    learning_rate: float = 1e-6
    transcript: bool = False
    workers: int = 4
    folder: str = "runs/language-agents"
    topology: str = "v5p:2x2x4"


SMOKE = {"steps": 1, "tasks_per_step": 2, "copies": 2, "max_steps": 4, "max_new_tokens": 16, "minibatches": 1}
PRESETS = {"run": {}, "smoke": SMOKE | {"eval_tasks": 2, "workers": 2}}
T = TypeVar("T", bound=Settings)


def run_config(config: Settings, eos_ids: tuple[int, ...], held_out: int) -> ra.AgentConfig:
    """What fit_agent does in these experiments."""
    return ra.AgentConfig(
        folder=config.folder,
        algorithm=config.algorithm,
        steps=config.steps,
        tasks_per_step=config.tasks_per_step,
        episodes=ra.Episodes(
            copies=config.copies,
            max_steps=config.max_steps,
            max_prompt=config.max_prompt,
            sampling=ra.SampleConfig(1, config.max_new_tokens, eos_ids=eos_ids),
        ),
        optimizer=ra.OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=min(10, config.steps // 2)),
        row_length=config.max_prompt + config.max_new_tokens,
        minibatches=config.minibatches,
        seed=config.seed,
        eval_every=10,
        eval_tasks=min(config.eval_tasks, held_out),
        eval_temperature=0.4,
        keep_params=False,
    )


def reinforce(
    name: str,
    config: Settings,
    make: Make,
    *,
    tasks: Sequence[int],
    held_out: Sequence[int],
    **how: Any,
) -> dict[str, Any]:
    """The run and its result.

    Args:
      name: of the experiment.
      config: its settings.
      make: the environment.
      tasks, held_out: task seeds.
      how: of WorkerWorlds: arguments, limits, environment.
    """
    begin = time.perf_counter()
    mesh = ra.make_mesh(fsdp=jax.device_count()) if jax.device_count() > 1 else None
    tokenizer = ra.load_tokenizer(config.model)
    decoder, params = ra.load_pretrained(config.model, mesh=mesh)
    form = ra.rebuilt(lambda text: tokenizer.chat([{"role": "user", "content": text}]), history=2)
    if config.transcript:
        form = ra.chat_transcript(tokenizer)
    run = run_config(config, tokenizer.eos_ids, len(held_out))
    with ra.WorkerWorlds(make, copies=config.tasks_per_step * config.copies, workers=config.workers, **how) as worlds:
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
            algorithm=objective(config.algorithm, scale=config.scale),
            mesh=mesh,
        )
    return {
        "experiment": name,
        **dataclasses.asdict(config),
        "success": result.accuracy,
        "seconds": round(time.perf_counter() - begin, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def ready(config: T, plan: str) -> T:
    """The settings with those of the preset; plans, and leaves, where the preset is "paper".

    Raises:
      SystemExit: after a plan, or where there is no model.
    """
    if config.preset == "paper":
        sys.exit(plan_paper(Path(__file__).parent / "plans" / plan, config.topology))
    if not Path(config.model, "config.json").is_file():
        raise SystemExit(f"--model {config.model!r} is no Hugging Face folder: rlalign.models.download(NAME, FOLDER)")
    return with_preset(config, PRESETS)
