"""A tiny transformer learns chores in a House: GiGPO beside GRPO and RLOO of whole episodes, from scratch on two cores.

    python experiments/gigpo_house.py                                # one run: gigpo, seed 0
    python experiments/gigpo_house.py --algorithm grpo --seed 2
    python experiments/gigpo_house.py --sweep                        # all algorithms and seeds, and the page of results
    python experiments/gigpo_house.py --preset smoke                 # a few steps, for the machinery

A policy first imitates an expert of whose actions most are replaced by random ones, so that it knows the words and does
few tasks. Then it learns from success alone: 10 at the end of an episode that did its task. A prompt is words: the
task, steps taken, the last two observations and actions, what is seen now and what can be done; an answer is an action.
Tasks that count are held out.

Measured so far, one seed on two shared AMD EPYC cores (jax 0.10.2, float32): with a penalty of .1 and learning rate
2e-4, success on held-out tasks went from 10 to 52 % in 60 steps, 51,351 environment steps, 448 s beside other work. The
defaults are those of runs that were not finished; GRPO beside it and other seeds are to be run.

Writes RUN/report.html and RUN/trajectories.html, with --sweep also FOLDER/index.html; the last line on stdout is JSON.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

import rlalign as ra
from rlalign.envs.episodes import Episodes
from rlalign.envs.house import LEVELS, NAMES, PHRASES, VOCABULARY, House
from rlalign.envs.imitation import shown_by_expert
from rlalign.envs.prompting import Turn, bare, rebuilt
from rlalign.envs.protocol import Observation
from rlalign.envs.words import EOS, Words
from rlalign.envs.worlds import Worlds
from rlalign.io.agents import fit_agent
from rlalign.io.comparison import write_comparison
from rlalign.io.config import AgentConfig
from rlalign.io.experiment import earlier_result, with_preset
from rlalign.io.files import fingerprint, write_atomic
from rlalign.io.metrics import read_metrics

WORDS = Words(sorted({*VOCABULARY, *NAMES, *PHRASES, "did", "can", ";", *map(str, range(16))}))
MAX_PROMPT, MAX_ACTION = 128, 8
ROW = 640  # tokens a row of the forest
TRAIN, HELD_OUT = range(4096), range(1 << 20, (1 << 20) + 256)  # task seeds


@dataclasses.dataclass(frozen=True)
class GigpoHouse:
    """Settings of the experiment; every field is a flag.

    Args:
      level: of the House; see house.LEVELS.
      warm_tasks: whose episodes the expert shows.
      noise: share of the expert's actions that a random one replaces.
      tasks_per_step, copies: groups a step, and episodes of each.
      penalty: of an invalid action; success is worth 10.
      scale: of advantages, where the algorithm has a choice. "std" makes an invalid action as bad as a failed task in
        groups where nobody succeeds, which are most at the beginning.
      sweep: all algorithms and `seeds`.
    """

    algorithm: Literal["gigpo", "grpo", "rloo", "hgpo"] = "gigpo"
    seed: int = 0
    preset: Literal["smoke", "laptop"] = "laptop"
    level: int = 1
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
    folder: str = "runs/gigpo-house"


PRESETS = {
    "smoke": {"warm_tasks": 16, "warm_steps": 4, "steps": 2, "tasks_per_step": 2, "copies": 2, "eval_every": 1},
    "laptop": {},
}
MODEL = ra.ModelConfig(
    vocab_size=len(WORDS),
    width=64,
    layers=2,
    heads=4,
    kv_heads=4,
    head_width=16,
    mlp_width=256,
    max_positions=MAX_PROMPT + MAX_ACTION,
    tied_head=True,
    qk_norm=True,
)


def shown(past: Sequence[Turn], taken: int, observation: Observation) -> str:
    """The prompt's text."""
    before = " ".join(f"{turn.observation.text} did {turn.action} ;" for turn in past)
    return f"{observation.task} {taken} ; {before} {observation.text} can {' ; '.join(observation.admissible)} did"


def warm_policy(config: GigpoHouse, decoder: ra.Decoder) -> ra.types.Params:
    """The policy after imitating the noisy expert: first every word of what it saw and did, then what it did alone."""
    policy = decoder.init(config.seed, deviation="fan_in")
    for learn, rate in (("all", 3e-3), ("action", 2e-3)):
        policy = imitated(config, decoder, policy, learn, rate)
    return policy


def imitated(
    config: GigpoHouse, decoder: ra.Decoder, policy: ra.types.Params, learn: Literal["all", "action"], rate: float
) -> ra.types.Params:
    """The policy after half of the warm-up."""
    form = rebuilt(WORDS.encode, history=2, render=shown)
    encode = lambda action: np.append(WORDS.encode(action), np.int32(EOS))
    tasks = TRAIN[: config.warm_tasks]
    how = {"form": form, "encode": encode, "noise": config.noise, "learn": learn}
    examples = shown_by_expert(House(**LEVELS[config.level]), tasks, **how)
    size, steps = 64, config.warm_steps // 2
    run = ra.OfflineConfig(
        folder=f"{config.folder}/seed{config.seed}/warm-{learn}",
        algorithm="sft",
        examples_per_step=size,
        optimizer=ra.OptimizerConfig(
            learning_rate=rate, warmup_steps=min(20, steps // 2), schedule="cosine", total_steps=steps + 1
        ),
        row_length=ROW,
        epochs=steps * size / len(examples),
        seed=config.seed,
        eval_every=10 * steps,
        checkpoint_every=steps,
        keep=1,
    )
    return ra.fit_offline(run, decoder=decoder, params=policy, examples=examples).state.params


def objective(config: GigpoHouse) -> ra.Algorithm:
    """The algorithm with the scale and KL of this experiment."""
    entry = dataclasses.replace(ra.ALGORITHMS[config.algorithm], kl_coef=config.kl_coef)
    if config.algorithm in ("gigpo", "grpo"):
        assert entry.advantage is not None
        entry = dataclasses.replace(entry, advantage=functools.partial(entry.advantage, scale=config.scale))
    return entry


def one_run(config: GigpoHouse) -> dict:
    """Warm up, then reinforce; what exists of it is taken from the folder."""
    folder = Path(config.folder, f"seed{config.seed}", config.algorithm)
    done = folder / "result.json"
    if (found := earlier_result(done, config, ignore=("sweep", "seeds"))) is not None:
        return found
    decoder = ra.Decoder(MODEL)
    policy = warm_policy(config, decoder)
    episodes = Episodes(
        copies=config.copies,
        max_steps=LEVELS[config.level]["horizon"],
        max_prompt=MAX_PROMPT,
        sampling=ra.SampleConfig(1, MAX_ACTION, eos_ids=(EOS,)),
        penalty=config.penalty,
    )
    run = AgentConfig(
        folder=str(folder),
        algorithm=config.algorithm,
        steps=config.steps,
        tasks_per_step=config.tasks_per_step,
        episodes=episodes,
        optimizer=ra.OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=min(5, config.steps // 2)),
        row_length=ROW,
        minibatches=config.minibatches,
        seed=config.seed,
        eval_every=config.eval_every,
        eval_tasks=len(HELD_OUT) if config.preset != "smoke" else 4,
        checkpoint_every=config.steps,
        keep=1,
    )
    begin, cpu = time.perf_counter(), time.process_time()
    with Worlds(House, copies=max(config.tasks_per_step * config.copies, 64), arguments=LEVELS[config.level]) as worlds:
        result = fit_agent(
            run,
            decoder=decoder,
            params=policy,
            worlds=worlds,
            tasks=TRAIN,
            eval_tasks=HELD_OUT,
            form=rebuilt(WORDS.encode, history=2, render=shown),
            parse=bare,
            decode=WORDS.decode,
            algorithm=objective(config),
        )
    rows = read_metrics(folder / "metrics.jsonl")
    found = {
        "experiment": "gigpo_house",
        **dataclasses.asdict(config),
        "success": {str(step): value for step, value in result.accuracy.items()},
        "success_before": result.accuracy[0],
        "success_after": result.accuracy[config.steps],
        "environment_steps": int(sum(row.get("environment_steps", 0) for row in rows)),
        "params_sha256": fingerprint(result.state.params),
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    write_atomic(done, json.dumps(found))
    return found


def main(config: GigpoHouse) -> dict:
    """One run, or all of them."""
    if not config.sweep:
        found = one_run(config)
        print(f"held-out success {found['success_before']:.1%} -> {found['success_after']:.1%}", file=sys.stderr)
        return found
    results = []
    algorithms = ("gigpo", "grpo")
    for seed in range(config.seeds):
        for algorithm in algorithms:
            results.append(one_run(dataclasses.replace(config, sweep=False, seed=seed, algorithm=algorithm)))
            last = results[-1]
            print(f"seed {seed} {algorithm}: {last['success_after']:.1%} in {last['seconds']} s", file=sys.stderr)
    write_atomic(Path(config.folder, "results.json"), json.dumps(results, indent=1))
    curves = {name: [f"{config.folder}/seed{s}/{name}" for s in range(config.seeds)] for name in algorithms}
    write_comparison(Path(config.folder), "Chores in a House", {f"level {config.level}": curves})
    return {"experiment": "gigpo_house", "runs": len(results), "folder": config.folder}


if __name__ == "__main__":
    flags = tyro.cli(GigpoHouse)
    print(json.dumps(main(with_preset(flags, PRESETS))))
