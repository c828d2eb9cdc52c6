"""The configurations of runs: frozen dataclasses, checked when they are built, saved beside every checkpoint."""

import dataclasses
import math
from typing import Literal

from rlalign.algorithms import get_algorithm
from rlalign.envs.episodes import Episodes
from rlalign.models.config import DTYPES
from rlalign.rollout.config import SampleConfig
from rlalign.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything `fit` needs to know besides the model, the data and the reward.

    Args:
      folder: where metrics, checkpoints and the report go; a run found there is continued.
      algorithm: an entry of ALGORITHMS; `fit(..., algorithm=...)` may hand over one of your own.
      steps: rollout batches.
      prompts_per_step: prompts sampled a step, sampling.num_samples responses each.
      sampling: how responses are drawn; its temperature must be the algorithm's.
      optimizer: AdamW and its schedule.
      row_length: tokens a row of the forest.
      num_rows: rows a batch; None takes a bucket that fits.
      epochs: passes over each rollout batch, with old_logp fixed.
      minibatches: optimizer steps a pass.
      microbatches: parts over which the gradient of one optimizer step is accumulated.
      seed: of prompts' order, sampling and everything else.
      eval_every: steps between evaluations on held-out prompts; the last state is always evaluated.
      eval_prompts: how many of them, the first ones.
      success: a reward from here on counts as right in the accuracy.
      checkpoint_every: steps between checkpoints; each is written behind the steps that follow, from a copy of the
        state in host memory.
      keep: checkpoints that stay, besides the best.
      max_invalid_share: a step with a larger share of invalid rewards ends the run with exit code 3.
      max_bad_steps: so many non-finite gradients in a row end the run with exit code 3.
      reward_workers: processes that run the reward function.
      reward_limit: seconds one reward may take.
      samples_shown: held-out completions kept for the report at each evaluation.
      recompute_logp: take old log-probs from the trainer instead of the sampler, and weigh the difference by
        Algorithm.correction; for samplers of another precision. One more forward a batch.
      reference_dtype: the dtype of the frozen reference, where the algorithm needs one and no adapter can be left out:
        "bfloat16" halves what it takes beside a float32 policy, if keep_params=False lets the given arrays go; None
        keeps the policy's.
      canary: compare what each step leaves with what it should be, and warn with the probable cause (io/canary.py).
      keep_params: whether the parameters that `fit` is given can be used afterwards; that is a copy of them more in
        memory, but where they are the reference anyway. False uses them up.
      profile: "3:5" writes a jax.profiler trace of steps 3 and 4; None for none.

    Raises:
      ValueError: a setting out of range or at odds with another, with both values.
    """

    folder: str
    steps: int
    prompts_per_step: int
    sampling: SampleConfig
    optimizer: OptimizerConfig
    row_length: int
    algorithm: str = "grpo"
    num_rows: int | None = None
    epochs: int = 1
    minibatches: int = 1
    microbatches: int = 1
    seed: int = 0
    eval_every: int = 50
    eval_prompts: int = 256
    success: float = 1.0
    checkpoint_every: int = 50
    keep: int = 2
    max_invalid_share: float = 0.2
    max_bad_steps: int = 5
    reward_workers: int = 2
    reward_limit: float = 2.0
    samples_shown: int = 8
    recompute_logp: bool = False
    reference_dtype: str | None = None
    canary: bool = True
    keep_params: bool = True
    profile: str | None = None

    def __post_init__(self):
        get_algorithm(self.algorithm)
        counts = ("steps", "prompts_per_step", "row_length", "epochs", "minibatches", "microbatches", "eval_every")
        _at_least_one(self, *counts, "eval_prompts", "checkpoint_every", "keep", "max_bad_steps", "reward_workers")
        if not 0 <= self.max_invalid_share <= 1:
            raise ValueError(f"max_invalid_share must lie in [0, 1], got {self.max_invalid_share}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        check_horizon(self.optimizer, self.steps * self.epochs * self.minibatches, "steps * epochs * minibatches")
        if self.reference_dtype not in (None, *DTYPES):
            raise ValueError(
                f"reference_dtype must be None or one of {', '.join(DTYPES)}, got {self.reference_dtype!r}"
            )
        traced_steps(self.profile)


@dataclasses.dataclass(frozen=True)
class OfflineConfig:
    """Everything `fit_offline` needs to know besides the model and the examples.

    Args:
      folder: where metrics, checkpoints and the report go; a run found there is continued.
      algorithm: an entry of ALGORITHMS; `fit_offline(..., algorithm=...)` may hand over one of your own.
      examples_per_step: demonstrations, or pairs, an optimizer step.
      optimizer: AdamW and its schedule, which begin anew with every iteration.
      row_length: tokens a row of the forest.
      iterations: how often the policy becomes the reference, and answers the prompts anew where generation is given; a
        run that has ended goes on where it is raised.
      epochs: passes over the examples an iteration; a fraction takes so much of them.
      generation: how the policy answers the prompts of demonstrations, num_samples=1: an algorithm that learns from
        pairs then tells its answers from them (GSIL, SPIN). None where the examples are pairs already.
      truncated: what becomes of a generated answer that reached max_new_tokens without an end: "keep" it as it is, no
        end token appended, or "drop" its pair.
      num_rows: rows a batch; None takes a bucket that fits.
      microbatches: parts over which the gradient of one optimizer step is accumulated.
      prepare_size: examples that are answered, and scored by the reference, at a time.
      seed: of the examples' order and of generation.
      eval_every: steps between evaluations; the first and last state and the ends of iterations are always evaluated.
      checkpoint_every: steps between checkpoints; the ends of iterations are always saved.
      keep: checkpoints that stay, besides the best and the ends of iterations.
      max_bad_steps: so many non-finite gradients in a row end the run with exit code 3.
      samples_shown: generated answers kept for the report at each iteration.
      canary: compare what each step leaves with what it should be, and warn with the probable cause (io/canary.py).
      keep_params: whether the parameters that are given can be used afterwards: that is a copy of them more in memory.
      profile: "3:5" writes a jax.profiler trace of steps 3 and 4; None for none.

    Raises:
      ValueError: a setting out of range or at odds with another, with both values.
    """

    folder: str
    algorithm: str
    examples_per_step: int
    optimizer: OptimizerConfig
    row_length: int
    iterations: int = 1
    epochs: float = 1.0
    generation: SampleConfig | None = None
    truncated: Literal["keep", "drop"] = "keep"
    num_rows: int | None = None
    microbatches: int = 1
    prepare_size: int = 64
    seed: int = 0
    eval_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2
    max_bad_steps: int = 5
    samples_shown: int = 8
    canary: bool = True
    keep_params: bool = True
    profile: str | None = None

    def __post_init__(self):
        get_algorithm(self.algorithm)
        _at_least_one(self, "examples_per_step", "row_length", "iterations", "microbatches", "prepare_size")
        _at_least_one(self, "eval_every", "checkpoint_every", "keep", "max_bad_steps")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")
        if self.truncated not in ("keep", "drop"):
            raise ValueError(f"truncated must be 'keep' or 'drop', got {self.truncated!r}")
        if self.generation is not None and self.generation.num_samples != 1:
            raise ValueError(
                f"generation.num_samples={self.generation.num_samples}: one answer a demonstration makes its pair; "
                "use 1"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        traced_steps(self.profile)

    def steps_per_iteration(self, examples: int) -> int:
        """Optimizer steps in which so many examples are seen `epochs` times."""
        return max(math.ceil(self.epochs * examples / self.examples_per_step - 1e-9), 1)


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Everything `fit_agent` needs to know besides the model, the environment and how it is talked to.

    Args:
      folder: where metrics, checkpoints, the report and the trajectories go; a run found there is continued.
      steps: batches of episodes.
      tasks_per_step: groups a step, episodes.copies episodes each.
      episodes: how they are played and made comparable; its sampling's temperature must be the algorithm's.
      optimizer: AdamW and its schedule.
      row_length: tokens a row of the forest; a prompt and its answer must fit.
      algorithm: an entry of ALGORITHMS that learns from rewards: gigpo, hgpo, or one that compares answers, which then
        compares whole episodes (grpo, rloo, ...); `fit_agent(..., algorithm=...)` may hand over one of your own.
      num_rows: rows a batch; None takes a bucket that fits.
      resample: how often a step plays further tasks in place of those whose episodes all scored the same (DAPO's
        dynamic sampling); 0 keeps such groups, which teach nothing but their penalties and step parts.
      epochs: passes over each batch, with old_logp fixed.
      minibatches: optimizer steps a pass.
      microbatches: parts over which the gradient of one optimizer step is accumulated.
      seed: of tasks' order, sampling and everything else.
      eval_every: steps between evaluations on held-out tasks, one episode each; the last state is always evaluated.
      eval_tasks: how many of them, the first ones.
      eval_temperature: of those episodes; GiGPO's validation takes .4. None is the training temperature.
      checkpoint_every: steps between checkpoints.
      keep: checkpoints that stay, besides the best.
      max_lost_share: a step in which a larger share of episodes is lost to their environments ends the run with exit
        code 3.
      max_bad_steps: so many non-finite gradients in a row end the run with exit code 3.
      groups_shown: groups of the training batch whose episodes are kept for the page at each evaluation.
      canary: compare what each step leaves with what it should be, and warn with the probable cause (io/canary.py).
      keep_params: whether the parameters that are given can be used afterwards.
      profile: "3:5" writes a jax.profiler trace of steps 3 and 4; None for none.

    Raises:
      ValueError: a setting out of range or at odds with another, with both values.
    """

    folder: str
    steps: int
    tasks_per_step: int
    episodes: Episodes
    optimizer: OptimizerConfig
    row_length: int
    algorithm: str = "gigpo"
    num_rows: int | None = None
    resample: int = 0
    epochs: int = 1
    minibatches: int = 1
    microbatches: int = 1
    seed: int = 0
    eval_every: int = 10
    eval_tasks: int = 64
    eval_temperature: float | None = None
    checkpoint_every: int = 50
    keep: int = 2
    max_lost_share: float = 0.2
    max_bad_steps: int = 5
    groups_shown: int = 2
    canary: bool = True
    keep_params: bool = True
    profile: str | None = None

    def __post_init__(self):
        get_algorithm(self.algorithm)
        counts = ("steps", "tasks_per_step", "row_length", "epochs", "minibatches", "microbatches", "eval_every")
        _at_least_one(self, *counts, "eval_tasks", "checkpoint_every", "keep", "max_bad_steps")
        if not 0 <= self.max_lost_share <= 1:
            raise ValueError(f"max_lost_share must lie in [0, 1], got {self.max_lost_share}")
        for name in ("seed", "resample", "groups_shown"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        check_horizon(self.optimizer, self.steps * self.epochs * self.minibatches, "steps * epochs * minibatches")
        if self.eval_temperature is not None and not self.eval_temperature > 0:
            raise ValueError(f"eval_temperature must be > 0 or None, got {self.eval_temperature}")
        need = self.episodes.max_prompt + self.episodes.sampling.max_new_tokens
        if need > self.row_length:
            raise ValueError(
                f"row_length={self.row_length} is below {need}, a prompt of episodes.max_prompt="
                f"{self.episodes.max_prompt} and max_new_tokens={self.episodes.sampling.max_new_tokens}: raise it"
            )
        traced_steps(self.profile)


def check_horizon(optimizer: OptimizerConfig, updates: int, what: str) -> None:
    """ValueError where a schedule ends before so many updates, which are `what`."""
    horizon = optimizer.total_steps
    if optimizer.schedule != "constant" and horizon is not None and horizon < updates:
        raise ValueError(
            f"optimizer.total_steps={horizon} ends the learning rate before the run's {updates} updates ({what}): "
            f"raise it to at least {updates}"
        )


def _at_least_one(config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def traced_steps(profile: str | None) -> range:
    """The steps that `profile` asks to trace."""
    if profile is None:
        return range(0)
    first, _, end = profile.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"profile={profile!r} must be FIRST:END with FIRST < END, such as 3:5")
    return range(int(first), int(end))
