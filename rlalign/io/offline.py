"""fit_offline: learn from demonstrations or preferences, in iterations whose reference is the policy they begin with.

    examples -> [answers of the policy -> log-probs of the reference] -> pack -> train_step -> checkpoint, metrics
                 once an iteration, kept on disk (iteration.py)

One loop for supervised fine-tuning (sft), GSIL and SPIN (demonstrations, of which the policy's own answers are told
apart), DPO, SimPO, KTO and reward models (preferences). Every random choice is a function of the seed, the iteration
and the step, so a run that is killed anywhere and started again ends in the same bits.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from jax.sharding import Mesh

from rlalign import hosts
from rlalign.algorithms import ALGORITHMS, Algorithm
from rlalign.io.config import OfflineConfig
from rlalign.io.identity import everywhere, run_identity
from rlalign.io.iteration import Examples, tokens_sha256
from rlalign.io.learner import Evaluate, Learner, check_offline
from rlalign.io.mixture import Mixture
from rlalign.io.report import write_report
from rlalign.io.session import Result, result, train_steps
from rlalign.models.decoder import Decoder
from rlalign.rollout import sample
from rlalign.train.optimizer import make_optimizer
from rlalign.train.step import init_state
from rlalign.types import Params


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
    how = {"optimizer": optimizer, "mesh": mesh, "sampler": sampler, "evaluate": evaluate, "decode": decode}
    learner = Learner(config, algorithm, decoder, examples, **how)
    with hosts.failing_together(f"{folder} has checkpoints"):
        state = train_steps(
            config,
            learner,
            init_state(decoder, params, optimizer, copy=config.keep_params),
            total=learner.length * config.iterations,
            saved=saved,
            decoder=decoder,
            allow_change=allow_change,
            iteration=learner.length,
        )
    if hosts.first():
        write_report(folder)
    hosts.wait_for_all("report")
    return result(state, folder)
