"""fit: the loop of the README plus checkpoints, metrics and a report; short enough to copy.

    prompts -> rollout -> reward -> advantage -> pack -> train_step -> checkpoint, metrics, report

Every random choice is a function of (seed, step), so a run that is killed and started again ends in the same bits.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlalign import hosts
from rlalign.algorithms import ALGORITHMS, Algorithm
from rlalign.io.config import RunConfig
from rlalign.io.identity import everywhere, plain, run_identity
from rlalign.io.report import write_report
from rlalign.io.runner import Runner, check_run, resolve
from rlalign.io.session import (
    Result,
    result,
    train_steps,
)
from rlalign.models.decoder import Decoder
from rlalign.models.lora import without_lora
from rlalign.rewards import RewardGuard
from rlalign.rollout import sample
from rlalign.train.optimizer import make_optimizer
from rlalign.train.score import Judge
from rlalign.train.step import init_state
from rlalign.types import Params, Prompt, Rollouts

Sampler = Callable[..., Rollouts]
Judging = Callable[[Sequence[Prompt], Rollouts], np.ndarray]


def fit(
    config: RunConfig,
    *,
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
    reward: Callable[[Any, dict], Any] | None = None,
    decode: Callable[[list[int]], str] | None = None,
    algorithm: Algorithm | None = None,
    sampler: Sampler = sample,
    judge: Judging | None = None,
    mesh: Mesh | None = None,
    allow_change: Sequence[str] = (),
) -> Result:
    """Train a policy by reinforcement learning; continue the run in config.folder if there is one.

    Args:
      config: the run.
      decoder, params: the policy to begin with; also the frozen reference, where the algorithm has a KL. With
        config.keep_params=False the run uses the arrays up.
      prompts: to train on, each once an epoch; or several sets of them, mixed by weights (`mix`).
      eval_prompts: held out; evaluated with seeds of their own, before, between and after.
      reward: (completion, example) -> number, a plain top-level function, run in killable worker processes; or -> its
        terms by name with their "total", which is the reward: term_NAME and eval_term_NAME of the metrics. None where
        a reward model is all there is: then no accuracy is counted, and no checkpoint is the best.
      decode: token ids -> text; None hands the ids to the reward.
      algorithm: in place of ALGORITHMS[config.algorithm].
      sampler: what answers prompts, called as `sample` is: an outside engine (engine_sampler), or one of your own. Its
        log-probs are not the trainer's, so config.recompute_logp must be set.
      judge: rewards of training samples in place of `reward`, which then counts the held-out answers alone: a reward
        model (make_judge), whose mean of those is eval_judge, a judge that compares answers (make_pairwise_judge), or a
        function of your own, (prompts, rollouts) -> f[N], NaN where there is none. Of several processes each
        calls it, and each must get the same.
      mesh: see make_mesh; `params` must lie on it.
      allow_change: dotted names of settings that may differ from those that the run in config.folder was started with.
        What does not touch the numbers (HARMLESS) always may.

    Returns:
      Result.

    Raises:
      ValueError: settings that do not go together, before anything is sampled or written; ConfigMismatch where the run
        in config.folder was started with other settings, another model, algorithm, reference, reward or other prompts.
      RunAborted: too many invalid rewards in a step, or non-finite gradients in a row.
    """
    algorithm = resolve(config, algorithm or ALGORITHMS[config.algorithm])
    check_run(config, decoder, prompts, eval_prompts, mesh, sampler)
    if reward is None and not isinstance(judge, Judge):
        raise ValueError(
            "nothing says how good a held-out answer is: give reward=, a function of an answer, or "
            "judge=make_judge(...), a reward model; another judge may know answers by comparison alone"
        )
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    reference = without_lora(params) if algorithm.needs_reference else None
    known = run_identity(decoder, algorithm, params, prompts, judge)
    known |= {"decode": plain(decode), "reward": plain(reward)}
    saved = json.loads(json.dumps(dataclasses.asdict(config) | known))
    hosts.check_same_everywhere(saved | everywhere(prompts, eval_prompts, mesh))
    hosts.check_shared(folder)
    optimizer = make_optimizer(config.optimizer)
    with hosts.failing_together(f"{folder} has checkpoints"), contextlib.ExitStack() as stack:
        guard = None
        if reward is not None:
            limits = {"workers": config.reward_workers, "time_limit": config.reward_limit}
            guard = stack.enter_context(RewardGuard(reward, decode=decode, **limits))
        how = {"optimizer": optimizer, "mesh": mesh, "guard": guard, "sampler": sampler, "judge": judge}
        run = Runner(config, algorithm, decoder, reference, prompts, eval_prompts, decode=decode, **how)
        # A reference of the policy's own dtype is the caller's arrays: the first step must not use them up.
        shared = reference is not None and config.reference_dtype in (None, decoder.config.dtype)
        state = train_steps(
            config,
            run,
            init_state(decoder, params, optimizer, copy=config.keep_params or shared),
            total=config.steps,
            saved=saved,
            decoder=decoder,
            allow_change=allow_change,
        )
    if hosts.first():
        write_report(folder)
    hosts.wait_for_all("report")
    return result(state, folder)
