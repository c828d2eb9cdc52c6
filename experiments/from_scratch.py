"""What gigpo_house.py and gigpo_shop.py share: a tiny transformer that begins with nothing, and learns to act in a
small embedded world.

    noisy expert ─▶ imitation of every word, then of actions ─▶ episodes, rewards, GiGPO or what it is compared with

A prompt is words: the task, steps taken, the last observations and actions, what is seen now and what can be done; an
answer is an action.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from one_loss import Name, objective

import rlalign as ra
from rlalign.envs.episodes import Episodes
from rlalign.envs.imitation import shown_by_expert
from rlalign.envs.prompting import Form, Turn, bare, rebuilt
from rlalign.envs.protocol import Observation
from rlalign.envs.words import EOS, Words
from rlalign.envs.worlds import Worlds
from rlalign.io.agents import check_agent, fit_agent
from rlalign.io.comparison import at_equal_cost, comparison_svg, comparison_table, write_comparison
from rlalign.io.config import AgentConfig
from rlalign.io.experiment import earlier_result, with_preset
from rlalign.io.files import fingerprint, write_atomic
from rlalign.io.metrics import read_metrics

TRAIN, HELD_OUT = range(4096), range(1 << 20, (1 << 20) + 256)  # task seeds
COST = "environment_steps"  # at equal numbers of which algorithms are compared
BATCH = 64  # examples of a step of imitation
STAGES: tuple[tuple[Literal["all", "action"], float], ...] = (("all", 3e-3), ("action", 2e-3))  # learning rates


@dataclasses.dataclass(frozen=True)
class World:
    """Where the policy acts.

    Args:
      name: of the experiment.
      title: of its page.
      make: the class of the environment.
      levels: number -> its arguments; each has a horizon.
      vocabulary: all that it says.
      max_prompt, max_action: tokens.
      row: tokens of a row of the forest.
      split: level -> (task seeds to train on, held-out ones).
    """

    name: str
    title: str
    make: Callable[..., Any]
    levels: dict[int, dict]
    vocabulary: tuple[str, ...]
    max_prompt: int
    max_action: int
    row: int
    split: Callable[[int], tuple[Sequence[int], Sequence[int]]] = lambda level: (TRAIN, HELD_OUT)

    @functools.cached_property
    def words(self) -> Words:
        longest = max(arguments["horizon"] for arguments in self.levels.values())
        return Words(sorted({*self.vocabulary, "did", "can", ";", *map(str, range(longest + 1))}))

    def decoder(self) -> ra.Decoder:
        """0.2 million parameters."""
        return ra.Decoder(
            ra.ModelConfig(
                vocab_size=len(self.words),
                width=64,
                layers=2,
                heads=4,
                kv_heads=4,
                head_width=16,
                mlp_width=256,
                max_positions=self.max_prompt + self.max_action,
                tied_head=True,
                qk_norm=True,
            )
        )


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every field is a flag.

    Args:
      level: of the world's curriculum.
      history: turns before this one that a prompt shows.
      warm_tasks: whose episodes the expert shows.
      warm_steps: of imitation, half of every word, half of actions alone.
      noise: share of the expert's actions that a random one replaces.
      tasks_per_step, copies: groups a step, and episodes of each.
      penalty: of an invalid action; success is worth 10.
      scale: of advantages, where the algorithm has a choice. "std" makes an invalid action as bad as a failed task in
        groups where nobody succeeds.
      sweep: `algorithms` with `seeds` seeds each, and the page that sets them beside each other.
    """

    algorithm: Name = "gigpo"
    seed: int = 0
    preset: Literal["smoke", "laptop"] = "laptop"
    level: int = 1
    history: int = 2
    warm_tasks: int = 2048
    warm_steps: int = 500
    noise: float = 0.3
    steps: int = 160
    tasks_per_step: int = 8
    copies: int = 8
    scale: Literal["none", "std"] = "none"
    penalty: float = 1.0
    learning_rate: float = 3e-4
    minibatches: int = 2
    kl_coef: float = 0.0
    eval_every: int = 20
    sweep: bool = False
    seeds: int = 3
    algorithms: tuple[Name, ...] = ("gigpo", "grpo")
    folder: str = "runs/from-scratch"

    def __post_init__(self):
        for name, least in (("warm_tasks", 1), ("warm_steps", 4), ("steps", 2), ("seeds", 1), ("copies", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}, must be at least {least}")
        if self.warm_tasks > len(TRAIN):
            raise ValueError(f"warm_tasks={self.warm_tasks}, there are {len(TRAIN)} tasks to train on")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise={self.noise}, must lie in [0, 1]")
        if not self.algorithms:
            raise ValueError("algorithms is empty: give at least one to compare")


PRESETS = {
    "smoke": {"warm_tasks": 16, "warm_steps": 4, "steps": 2, "tasks_per_step": 2, "copies": 2, "eval_every": 1},
    "laptop": {},
}


def shown(past: Sequence[Turn], taken: int, observation: Observation) -> str:
    """The prompt's text."""
    before = " ".join(f"{turn.observation.text} did {turn.action} ;" for turn in past)
    return f"{observation.task} {taken} ; {before} {observation.text} can {' ; '.join(observation.admissible)} did"


def warm_policy(world: World, config: Settings, form: Form, tasks: Sequence[int]) -> ra.types.Params:
    """The policy after imitating the noisy expert: first every word of what it saw and did, then what it did alone."""
    decoder = world.decoder()
    policy = decoder.init(config.seed, deviation="fan_in")
    encode = lambda action: np.append(world.words.encode(action), np.int32(EOS))
    how = {"form": form, "encode": encode, "noise": config.noise}
    steps = config.warm_steps // 2
    for learn, rate in STAGES:
        environment = world.make(**world.levels[config.level])
        examples = shown_by_expert(environment, tasks[: config.warm_tasks], learn=learn, **how)
        run = ra.OfflineConfig(
            folder=f"{config.folder}/seed{config.seed}/warm-{learn}",
            algorithm="sft",
            examples_per_step=BATCH,
            optimizer=ra.OptimizerConfig(
                learning_rate=rate, warmup_steps=min(20, steps // 2), schedule="cosine", total_steps=steps + 1
            ),
            row_length=world.row,
            epochs=steps * BATCH / len(examples),
            seed=config.seed,
            eval_every=10 * steps,
            checkpoint_every=steps,
            keep=1,
        )
        policy = ra.fit_offline(run, decoder=decoder, params=policy, examples=examples).state.params
    return policy


def run_config(world: World, config: Settings, held_out: int) -> AgentConfig:
    """What fit_agent does in this experiment, with so many held-out tasks."""
    episodes = Episodes(
        copies=config.copies,
        max_steps=world.levels[config.level]["horizon"],
        max_prompt=world.max_prompt,
        sampling=ra.SampleConfig(1, world.max_action, eos_ids=(EOS,)),
        penalty=config.penalty,
    )
    return AgentConfig(
        folder=f"{config.folder}/seed{config.seed}/{config.algorithm}",
        algorithm=config.algorithm,
        steps=config.steps,
        tasks_per_step=config.tasks_per_step,
        episodes=episodes,
        optimizer=ra.OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=min(5, config.steps // 2)),
        row_length=world.row,
        minibatches=config.minibatches,
        seed=config.seed,
        eval_every=config.eval_every,
        eval_tasks=held_out if config.preset != "smoke" else 4,
        checkpoint_every=config.steps,
        keep=1,
    )


def one_run(world: World, config: Settings) -> dict[str, Any]:
    """Warm up, then reinforce; what exists of it is taken from the folder."""
    if config.level not in world.levels:
        raise ValueError(f"level={config.level}, {world.title} has {', '.join(map(str, world.levels))}")
    tasks, held_out = world.split(config.level)
    run = run_config(world, config, len(held_out))
    algorithm = objective(config.algorithm, scale=config.scale, kl_coef=config.kl_coef)
    room, arguments = max(config.tasks_per_step * config.copies, 64), world.levels[config.level]
    check_agent(run, world.decoder(), algorithm, room, tasks, held_out, None)  # before minutes of imitation
    done = Path(run.folder, "result.json")
    if (found := earlier_result(done, config, ignore=("sweep", "seeds", "algorithms"))) is not None:
        return found
    form = rebuilt(world.words.encode, history=config.history, render=shown)
    begin, cpu = time.perf_counter(), time.process_time()
    policy = warm_policy(world, config, form, tasks)
    warm = time.perf_counter() - begin
    with Worlds(world.make, copies=room, arguments=arguments) as worlds:
        how = {"form": form, "parse": bare, "decode": world.words.decode, "algorithm": algorithm}
        result = fit_agent(
            run,
            decoder=world.decoder(),
            params=policy,
            worlds=worlds,
            tasks=tasks,
            eval_tasks=held_out,
            **how,
        )
    rows = read_metrics(Path(run.folder, "metrics.jsonl"))
    found = {
        "experiment": world.name,
        **dataclasses.asdict(config),
        "success": {str(step): value for step, value in result.accuracy.items()},
        "success_before": result.accuracy[0],
        "success_after": result.accuracy[config.steps],
        "environment_steps": int(sum(row.get("environment_steps", 0) for row in rows)),
        "params_sha256": fingerprint(result.state.params),
        "seconds_warm_up": round(warm, 1),  # little where another run with this seed has warmed up before
        "seconds": round(time.perf_counter() - begin, 1),  # of the last part, where a run was continued
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    write_atomic(done, json.dumps(found))
    return found


def sweep(world: World, config: Settings) -> dict[str, Any]:
    """All algorithms and seeds, compared at equal numbers of environment steps."""
    results = []
    for seed in range(config.seeds):
        for name in config.algorithms:
            results.append(one_run(world, dataclasses.replace(config, sweep=False, seed=seed, algorithm=name)))
            last = results[-1]
            print(f"seed {seed} {name}: {last['success_after']:.1%} in {last['seconds']} s", file=sys.stderr)
    folder, title = Path(config.folder), f"{world.title}, level {config.level}"
    curves = {name: [folder / f"seed{s}" / name for s in range(config.seeds)] for name in config.algorithms}
    write_comparison(folder, world.title, {title: curves}, cost=COST)
    write_atomic(folder / "curves.svg", comparison_svg(curves, f"{title}: held-out success", cost=COST))
    found = {"experiment": world.name, **summary(curves), "runs": results}
    write_atomic(folder / "results.json", json.dumps(found, indent=1))
    return found


def summary(curves: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Success at equal environment steps: means over seeds with their intervals, and curves."""
    table = comparison_table({"": curves}, cost=COST)[""]
    equal = at_equal_cost(curves, "eval_accuracy", COST)
    steps = [round(row["step"]) for row in next(iter(equal.values()))[0]]
    finite = lambda estimate: {k: round(v, 4) if math.isfinite(v) else None for k, v in estimate._asdict().items()}
    mean = lambda seeds, i: round(sum(rows[i]["eval_accuracy"] for rows in seeds) / len(seeds), 4)
    return {
        "environment_steps_compared_at": steps[-1],
        "success_at_equal_environment_steps": {name: finite(estimate) for name, estimate in table.items()},
        "curves": {name: {step: mean(seeds, i) for i, step in enumerate(steps)} for name, seeds in equal.items()},
    }


def main(world: World, config: Settings) -> None:
    """One run, or all of them; the last line on stdout is JSON."""
    config = with_preset(config, PRESETS)
    if config.sweep:
        print(json.dumps(sweep(world, config)))
        return
    found = one_run(world, config)
    print(f"held-out success {found['success_before']:.1%} -> {found['success_after']:.1%}", file=sys.stderr)
    print(json.dumps(found))
