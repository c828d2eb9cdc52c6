"""The optimizer as data: AdamW behind a global-norm clip, with a learning-rate schedule."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlalign.types import Params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings.

    Args:
      learning_rate: the peak.
      warmup_steps: linear from 0 to the peak.
      schedule: after the warm-up: "constant", or "linear" or "cosine" down to 0 at total_steps.
      total_steps: where "linear" and "cosine" end, warm-up included.
      max_grad_norm: gradients are scaled down to this global norm; None for no clip.
      weight_decay: decoupled.
      b1, b2, eps: AdamW's.
      mu_dtype: of the first moment: "bfloat16" saves 2 bytes a parameter; None is the parameters', at least float32.
        The second moment has no such option: at b2 = .999 its changes are below bfloat16's 8 bits.
      spike_sigma: refuses an update whose loss lies so many deviations above the mean of the last 128 that were applied
        (our choice: 6 is far outside of noise); None for no such check.

    Raises:
      ValueError: a setting out of range, with its value.
    """

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    total_steps: int | None = None
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    mu_dtype: Literal["float32", "bfloat16"] | None = None
    spike_sigma: float | None = None

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.warmup_steps < 0 or not self.weight_decay >= 0:
            raise ValueError(f"need warmup_steps, weight_decay >= 0, got {self.warmup_steps}, {self.weight_decay}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule must be 'constant', 'linear' or 'cosine', got {self.schedule!r}")
        if self.schedule != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(
                f"schedule={self.schedule!r} ends at total_steps={self.total_steps}, which must be above "
                f"warmup_steps={self.warmup_steps}"
            )
        if self.mu_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"mu_dtype must be None, 'float32' or 'bfloat16', got {self.mu_dtype!r}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0 or None, got {self.max_grad_norm}")
        if self.spike_sigma is not None and not self.spike_sigma > 0:
            raise ValueError(f"spike_sigma must be > 0 or None, got {self.spike_sigma}")


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of updates applied."""
    rest = (config.total_steps or 0) - config.warmup_steps
    after = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


class MasterState(NamedTuple):
    """Optimizer state of narrow parameters: their float32 copy, and the inner state, which is float32 too."""

    master: Params
    inner: optax.OptState


def with_master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer on a float32 copy of bfloat16 or float16 parameters; itself where all are float32 or wider.

    bfloat16 has 8 bits: at a learning rate of 1e-6 a step is far below the distance of neighbouring weights, and a
    decay of .999 below that of neighbouring moments. Without the copy such steps are lost.
    """

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def init(params):
        if all(x.dtype.itemsize >= 4 for x in jax.tree.leaves(params)):
            return optimizer.init(params)
        return MasterState(wide(params), optimizer.init(wide(params)))

    inside = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **known):
        if not isinstance(state, MasterState):
            return inside.update(updates, state, params, **known)
        change, inner = inside.update(wide(updates), state.inner, state.master, **known)
        master = optax.apply_updates(state.master, change)
        rounded = jax.tree.map(lambda m, p: m.astype(p.dtype).astype(m.dtype) - p.astype(m.dtype), master, params)
        return rounded, MasterState(master, inner)

    return optax.GradientTransformationExtraArgs(init, update)


class SpikeState(NamedTuple):
    """The inner state, the losses f32[128] of the last updates (NaN where there were fewer), and the verdict b[]."""

    inner: optax.OptState
    losses: jax.Array
    spiked: jax.Array


def watch_loss(
    optimizer: optax.GradientTransformation, *, sigma: float, window: int = 128
) -> optax.GradientTransformationExtraArgs:
    """Marks an update whose loss > mean + sigma * deviation of the last `window` losses; the train step refuses it.

    The losses lie in the optimizer's state, so that a run that is continued judges as if it had never stopped. Before
    there are `window` of them nothing is marked.
    """

    def init(params):
        return SpikeState(optimizer.init(params), jnp.full(window, jnp.nan, jnp.float32), jnp.zeros((), bool))

    def update(updates, state, params=None, **known):
        loss = known["loss"]
        change, inner = optimizer.update(updates, state.inner, params)
        limit = jnp.mean(state.losses) + sigma * jnp.std(state.losses)  # NaN, and never passed, while there are too few
        losses = jnp.roll(state.losses, -1).at[-1].set(loss.astype(jnp.float32))
        return change, SpikeState(inner, losses, loss > limit)

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """clip_by_global_norm, then AdamW with the schedule; with spike_sigma, losses are watched."""
    how = {name: getattr(config, name) for name in ("b1", "b2", "eps", "weight_decay", "mu_dtype")}
    optimizer = optax.adamw(make_schedule(config), **how)
    if config.max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
    return optimizer if config.spike_sigma is None else watch_loss(optimizer, sigma=config.spike_sigma)
