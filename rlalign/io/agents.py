"""fit_agent: a policy that acts in environments of texts, by GiGPO, HGPO or what compares whole episodes.

    tasks -> episodes of many steps -> a row each step -> advantage -> pack -> train_step -> checkpoint, metrics, pages

Every random choice is a function of (seed, step, task, copy, turn) and environments are deterministic, so a run that is
killed and started again ends in the same bits.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from rlalign import hosts
from rlalign.algorithms import ALGORITHMS, Algorithm, try_out
from rlalign.envs.prompting import Form, Parse
from rlalign.envs.rows import of_steps
from rlalign.envs.worlds import Copies
from rlalign.io.config import AgentConfig
from rlalign.io.identity import plain, run_identity
from rlalign.io.player import Player
from rlalign.io.report import write_report
from rlalign.io.session import Result, result, train_steps
from rlalign.io.trajectories import write_trajectories
from rlalign.models.decoder import Decoder
from rlalign.models.lora import without_lora
from rlalign.rollout import sample
from rlalign.train.mesh import AnyMesh, row_shards
from rlalign.train.optimizer import make_optimizer
from rlalign.train.step import init_state
from rlalign.types import Params, Prompt, Rollouts


def fit_agent(
    config: AgentConfig,
    *,
    decoder: Decoder,
    params: Params,
    worlds: Copies,
    tasks: Sequence[int],
    eval_tasks: Sequence[int],
    form: Form,
    parse: Parse,
    decode: Callable[[np.ndarray], str],
    algorithm: Algorithm | None = None,
    write: Callable[[str], Iterable[int]] | None = None,
    sampler: Callable[..., Rollouts] = sample,
    mesh: Mesh | None = None,
    allow_change: Sequence[str] = (),
) -> Result:
    """Train a policy on episodes; continue the run in config.folder if there is one.

    Args:
      config: the run.
      decoder, params: the policy to begin with; also the frozen reference, where the algorithm has a KL. With
        config.keep_params=False the run uses the arrays up.
      worlds: Worlds, or WorkerWorlds, with room for tasks_per_step * episodes.copies copies.
      tasks: task seeds to train on, each once an epoch.
      eval_tasks: held out.
      form: what the policy is shown: rebuilt(...), transcript(...), or a function of your own.
      parse: what its answer does: tagged, bare, or a function of your own.
      decode: token ids without the end token -> text.
      algorithm: in place of ALGORITHMS[config.algorithm].
      write: see play: answers are one of what is admissible, and training renormalises over it too.
      sampler: what answers prompts, called as `sample` is; its log-probs must be the trainer's.
      mesh: see make_mesh; `params` must lie on it.
      allow_change: dotted names of settings that may differ from those that the run in config.folder was started with.

    Returns:
      Result; its accuracy is the share of held-out tasks that were done.

    Raises:
      ValueError: settings that do not go together, before anything is played or written; ConfigMismatch where the run
        in config.folder was started with other settings, another model, algorithm, reference or other tasks.
      RunAborted: too many episodes lost to their environments in a step, or non-finite gradients in a row.
    """
    algorithm = of_steps(algorithm or ALGORITHMS[config.algorithm])
    check_agent(config, decoder, algorithm, worlds.copies, tasks, eval_tasks, mesh)
    if algorithm.max_length is None:
        algorithm = dataclasses.replace(algorithm, max_length=config.episodes.sampling.max_new_tokens)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    reference = without_lora(params) if algorithm.needs_reference else None
    named = [Prompt(task, np.array([task])) for task in tasks]
    shown = {**worlds.made_from, "form": form, "parse": parse, "decode": decode}
    shown |= {} if write is None else {"write": write}
    known = run_identity(decoder, algorithm, params, named, None) | {"worlds": plain(shown)}
    known |= {"eval_seeds": list(map(int, eval_tasks))}
    saved = json.loads(json.dumps(dataclasses.asdict(config) | known))
    optimizer = make_optimizer(config.optimizer)
    how = {"form": form, "parse": parse, "decode": decode, "write": write, "sampler": sampler}
    run = Player(
        config, algorithm, decoder, reference, worlds, tasks, eval_tasks, optimizer=optimizer, mesh=mesh, **how
    )
    with hosts.failing_together(f"{folder} has checkpoints"):
        state = train_steps(
            config,
            run,
            init_state(decoder, params, optimizer, copy=config.keep_params or reference is not None),
            total=config.steps,
            saved=saved,
            decoder=decoder,
            allow_change=allow_change,
        )
    write_report(folder)
    write_trajectories(folder)
    return result(state, folder)


def check_agent(
    config: AgentConfig,
    decoder: Decoder,
    algorithm: Algorithm,
    room: int,
    tasks: Sequence[int],
    eval_tasks: Sequence[int],
    mesh: AnyMesh | None,
) -> None:
    """Refuses, before anything is written or played, what would fail later; `room` is how many copies the worlds have.

    Raises:
      ValueError: no tasks or negative ones, too few copies, an episode that is longer than the model, an end token
        outside the vocabulary, another temperature than the algorithm's, groups of one, or several processes.
    """
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes: episodes are played in one; use a mesh of one process")
    for name, some in (("tasks", tasks), ("eval_tasks", eval_tasks)):
        if not len(some) or min(some) < 0:
            raise ValueError(f"{name} must be task seeds >= 0, at least one; got {list(some)[:3]}")
    if both := set(tasks) & set(eval_tasks):
        raise ValueError(f"task {min(both)} is in tasks and in eval_tasks: what is trained on is not held out")
    episodes, sampling = config.episodes, config.episodes.sampling
    copies = config.tasks_per_step * episodes.copies
    if copies > room:
        raise ValueError(
            f"tasks_per_step={config.tasks_per_step} with episodes.copies={episodes.copies} are {copies} episodes at a "
            f"time, the worlds have {room} copies: make them with more"
        )
    if episodes.copies < 2:
        raise ValueError(f"episodes.copies={episodes.copies}: a group of one compares nothing; use at least 2")
    need = episodes.max_prompt + sampling.max_new_tokens
    if need > decoder.config.max_positions:
        raise ValueError(
            f"episodes.max_prompt={episodes.max_prompt} with max_new_tokens={sampling.max_new_tokens} is {need}, the "
            f"model's max_positions is {decoder.config.max_positions}: lower one of them"
        )
    beyond = [i for i in sampling.eos_ids if not 0 <= i < decoder.config.vocab_size]
    if beyond:
        raise ValueError(f"sampling.eos_ids holds {beyond[0]}, the vocabulary has {decoder.config.vocab_size}")
    if sampling.temperature != algorithm.temperature:
        raise ValueError(
            f"sampling.temperature={sampling.temperature} but the algorithm trains at {algorithm.temperature}: both "
            "sides of the importance ratio need one temperature"
        )
    parts = config.minibatches * config.microbatches * row_shards(mesh)
    if parts > copies * episodes.max_steps:
        raise ValueError(
            f"{copies} episodes of at most {episodes.max_steps} steps are fewer rows than {parts} parts (minibatches * "
            "microbatches * data * fsdp): play more"
        )
    if config.num_rows is not None and config.num_rows % parts:
        raise ValueError(f"num_rows={config.num_rows} does not divide into {parts} parts")
    try_out(algorithm)
