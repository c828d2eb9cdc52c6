"""The configuration of a run: one frozen dataclass, checked when it is built, saved beside every checkpoint."""

import dataclasses

from rlalign.algorithms import get_algorithm
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
      checkpoint_every: steps between checkpoints.
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
    keep_params: bool = True
    profile: str | None = None

    def __post_init__(self):
        get_algorithm(self.algorithm)
        for name in ("steps", "prompts_per_step", "row_length", "epochs", "minibatches", "microbatches", "eval_every"):
            self._at_least_one(name)
        for name in ("eval_prompts", "checkpoint_every", "keep", "max_bad_steps", "reward_workers"):
            self._at_least_one(name)
        if not 0 <= self.max_invalid_share <= 1:
            raise ValueError(f"max_invalid_share must lie in [0, 1], got {self.max_invalid_share}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        updates = self.steps * self.epochs * self.minibatches
        horizon = self.optimizer.total_steps
        if self.optimizer.schedule != "constant" and horizon is not None and horizon < updates:
            raise ValueError(
                f"optimizer.total_steps={horizon} ends the learning rate before the run's {updates} updates (steps * "
                f"epochs * minibatches): raise it to at least {updates}"
            )
        if self.reference_dtype not in (None, *DTYPES):
            raise ValueError(
                f"reference_dtype must be None or one of {', '.join(DTYPES)}, got {self.reference_dtype!r}"
            )
        self.profile_range()

    def _at_least_one(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def profile_range(self) -> range:
        """The steps that are traced."""
        if self.profile is None:
            return range(0)
        first, _, end = self.profile.partition(":")
        if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
            raise ValueError(f"profile={self.profile!r} must be FIRST:END with FIRST < END, such as 3:5")
        return range(int(first), int(end))
