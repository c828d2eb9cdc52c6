"""fit_offline: learn from demonstrations or preferences, in iterations whose reference is the policy they begin with.

    examples -> [answers of the policy -> log-probs of the reference] -> pack -> train_step -> checkpoint, metrics
                 once an iteration, kept on disk (iteration.py)

One loop for supervised fine-tuning (sft), GSIL and SPIN (demonstrations, of which the policy's own answers are told
apart), DPO, SimPO, KTO and reward models (preferences). Every random choice is a function of the seed, the iteration
and the step, so a run that is killed anywhere and started again ends in the same bits.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from rlalign import hosts
from rlalign.algorithms import ALGORITHMS, Algorithm
from rlalign.compat import CompileCounter
from rlalign.io.checkpoint import Checkpoints
from rlalign.io.config import OfflineConfig, traced_steps
from rlalign.io.files import fingerprint
from rlalign.io.identity import everywhere, run_identity
from rlalign.io.iteration import Examples, Prepared, tokens_sha256
from rlalign.io.learner import Learner, check_offline
from rlalign.io.mixture import Mixture
from rlalign.io.report import write_report
from rlalign.io.session import (
    Result,
    about_run,
    asked_to_stop,
    best_accuracy,
    profiler,
    recorder,
    restore,
    result,
    resume,
    save_step,
)
from rlalign.models.decoder import Decoder
from rlalign.rollout import sample
from rlalign.train.optimizer import make_optimizer
from rlalign.train.step import init_state
from rlalign.types import Params, TrainState

log = logging.getLogger(__name__)
Evaluate = Callable[[Decoder, Params], Mapping[str, float]]


def fit_offline(
    config: OfflineConfig,
    *,
    decoder: Decoder,
    params: Params,
    examples: Examples,
    evaluate: Evaluate | None = None,
    decode: Callable[[list[int]], str] | None = None,
    algorithm: Algorithm | None = None,
    sampler: Callable = sample,
    mesh: Mesh | None = None,
    allow_change: Sequence[str] = (),
) -> Result:
    """Train a policy, or a reward model, on examples; continue the run in config.folder if there is one.

    An iteration begins with its reference, which is the policy at that moment. Where config.generation is given, it
    answers the prompt of each demonstration; where the algorithm compares with a reference, it gives the log-probs of
    all responses. Both are found once, kept in folder/iterations, and the optimizer begins anew. So one iteration of
    Preferences is DPO, several of Demonstrations with generation are GSIL or SPIN.

    Args:
      config: the run.
      decoder, params: the model to begin with. With config.keep_params=False the run uses the arrays up.
      examples: Demonstrations, or Preferences; each is seen once an epoch.
      evaluate: (decoder, params) -> {name: number}, called before, between and after; logged as eval_NAME. "accuracy"
        decides which checkpoint is the best.
      decode: token ids -> text, for the generated answers that the report shows.
      algorithm: in place of ALGORITHMS[config.algorithm].
      sampler: what answers prompts, called as `sample` is.
      mesh: see make_mesh; `params` must lie on it.
      allow_change: dotted names of settings that may differ from those that the run in config.folder was started with.

    Returns:
      Result. The parameters that iteration k ended with stay in the checkpoint of its last step.

    Raises:
      ValueError: settings that do not go together, before anything is sampled or written; ConfigMismatch where the run
        in config.folder was started with other settings, another model, algorithm or other examples.
      RunAborted: non-finite gradients in a row.
    """
    algorithm = algorithm or ALGORITHMS[config.algorithm]
    check_offline(config, decoder, algorithm, examples, mesh)
    length = config.steps_per_iteration(len(examples))
    total = length * config.iterations
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [example.prompt for example in examples]
    known = run_identity(decoder, algorithm, params, prompts, None) | {
        "examples_sha256": tokens_sha256(examples),
        "mixture": examples.recipe() if isinstance(examples, Mixture) else None,
    }
    saved = json.loads(json.dumps(dataclasses.asdict(config) | known))
    hosts.check_same_everywhere(saved | everywhere(prompts, [], mesh))
    hosts.check_shared(folder)
    optimizer = make_optimizer(config.optimizer)
    with hosts.failing_together(f"{folder} has checkpoints"), contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep=config.keep, keep_every=length))
        fresh = init_state(decoder, params, optimizer, copy=config.keep_params)
        state, found = resume(checkpoints, fresh, saved, allow_change)
        del fresh  # a resumed run needs it no more
        start, reference = found["step"], found.get("reference", "")
        hosts.check_same_everywhere({"step": start})
        learn = Learner(config, algorithm, decoder, examples, optimizer=optimizer, mesh=mesh, sampler=sampler)
        compiles, highest = CompileCounter(), hosts.of_first(best_accuracy(folder, before=start))
        record = stack.enter_context(recorder(folder, total, start, about_run(saved, decoder)))
        asked = stack.enter_context(asked_to_stop())
        trace = stack.enter_context(profiler(folder / "profile", traced_steps(config.profile)))
        prepared: Prepared | None = None
        for step in range(start, total + 1):
            begin = time.perf_counter()
            metrics: dict[str, Any] = {}
            checkpoints.check()
            ends = step % length == 0
            if evaluate is not None and (ends or step % config.eval_every == 0):
                metrics |= {f"eval_{k}": float(v) for k, v in evaluate(decoder, state.params).items()}
            accuracy, stop = metrics.get("eval_accuracy", -1.0), hosts.agree(bool(asked))
            if accuracy > highest or step % config.checkpoint_every == 0 or ends or stop:
                meta, best = {"config": saved, "reference": reference}, accuracy if accuracy > highest else None
                metrics["seconds_save"] = save_step(checkpoints, step, state, meta, best=best)
            highest = max(highest, accuracy)
            if stop:
                checkpoints.wait()
                raise SystemExit(0)
            trace(step)
            if step < total:
                if ends:
                    reference = fingerprint(state.params)
                    state = learn.renew(state)
                if ends or prepared is None:
                    past = functools.partial(_reference, checkpoints, step - step % length, step, state, reference)
                    prepared = learn.prepare(step, length, reference, past)
                    if ends:
                        metrics |= learn.about(prepared, step, folder / "samples.jsonl", decode)
                state, trained = learn.step(state, step, length, prepared)
                metrics |= trained
            metrics |= {"seconds": time.perf_counter() - begin, "compiles": compiles.take()}
            record(step, metrics)
    if hosts.first():
        write_report(folder)
    hosts.wait_for_all("report")
    return result(state, folder)


def _reference(checkpoints: Checkpoints, begins: int, step: int, state: TrainState, reference: str) -> Params:
    """The parameters that an iteration began with: those at hand at its first step, else its checkpoint's."""
    if step == begins:
        return state.params
    found, meta = restore(checkpoints, begins, state)
    if meta["step"] != begins or fingerprint(found.params) != reference:
        raise ValueError(
            f"{checkpoints.folder.parent} lost files of iterations/, and checkpoint {begins}, which could make them "
            f"anew, is not intact either: remove the checkpoints after step {begins}, or the folder"
        )
    return found.params
