"""Algorithms as data: an advantage, a loss and vetted defaults. Adding one is a function, a line here and an oracle.

ALGORITHMS["grpo"]
dataclasses.replace(ALGORITHMS["grpo"], advantage=my_advantage)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from rlalign.advantages import group_preference, group_relative, leave_one_out
from rlalign.losses import negative_log_likelihood, policy_gradient

Data = Literal["rollouts", "demonstrations"]
KL_KINDS = ("k1", "k2", "k3")


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What distinguishes one objective from another.

    Args:
      advantage: (reward f[N], group i[N], *, num_groups, valid) -> f[N]; None where no reward is used.
      loss: for data="rollouts" called like policy_gradient(logp, old_logp, advantage, mask, *, weight, max_length,
        denominator); for data="demonstrations" like negative_log_likelihood(logp, mask, *, max_length, denominator).
      data: "rollouts" (sampled by the policy, one reward a sample) or "demonstrations".
      aggregate: how tokens become one number: "token", "sequence" or "constant"; handed to the loss, and used for the
        KL and entropy terms too.
      kl_coef: weight of the KL to the reference, in the loss; > 0 needs ref_logp. A batch whose groups all lack a
        signal still pulls towards the reference.
      kl_kind: estimator of that KL: "k1", "k2" or "k3".
      entropy_coef: weight of the policy's entropy, nats a token, added to the objective.
      temperature: of the policy that is sampled and trained.
      max_length: response length that "constant" divides by; None takes the batch's R.

    Raises:
      ValueError: a combination that makes no sense, with its values.
    """

    advantage: Callable[..., Any] | None
    loss: Callable[..., Any]
    data: Data = "rollouts"
    aggregate: Literal["token", "sequence", "constant"] = "token"
    kl_coef: float = 0.0
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    temperature: float = 1.0
    max_length: int | None = None

    def __post_init__(self):
        if self.data not in ("rollouts", "demonstrations"):
            raise ValueError(f"data must be 'rollouts' or 'demonstrations', got {self.data!r}")
        if self.aggregate not in ("token", "sequence", "constant"):
            raise ValueError(f"aggregate must be 'token', 'sequence' or 'constant', got {self.aggregate!r}")
        if (self.advantage is None) != (self.data == "demonstrations"):
            raise ValueError(
                f"data={self.data!r} with advantage={self.advantage}: rewards need one, demonstrations none"
            )
        if self.kl_kind not in KL_KINDS:
            raise ValueError(f"kl_kind must be one of {', '.join(KL_KINDS)}, got {self.kl_kind!r}")
        for name in ("kl_coef", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}: greedy samples of a group are all equal"
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")


# Defaults are the papers' where they state them. GPRS: beta .05 in its RLHF setup, .01 for reasoning.
ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(
        advantage=functools.partial(group_relative, scale="std"),
        loss=functools.partial(policy_gradient, clip="ppo", clip_low=0.2, clip_high=0.2),
        aggregate="sequence",
    ),
    "dr_grpo": Algorithm(
        advantage=functools.partial(group_relative, scale="none"),
        loss=functools.partial(policy_gradient, clip="ppo", clip_low=0.2, clip_high=0.2),
        aggregate="constant",
    ),
    "rloo": Algorithm(
        advantage=leave_one_out,
        loss=functools.partial(policy_gradient, clip="ppo", clip_low=0.2, clip_high=0.2),
        aggregate="sequence",
    ),
    "gprs": Algorithm(
        advantage=group_preference,
        loss=functools.partial(policy_gradient, clip="ppo", clip_low=0.2, clip_high=0.2),
        aggregate="sequence",
        kl_coef=0.01,
    ),
    "sft": Algorithm(advantage=None, loss=negative_log_likelihood, data="demonstrations"),
}


def get_algorithm(name: str) -> Algorithm:
    """The entry of that name.

    Raises:
      ValueError: unknown name, with those there are.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
