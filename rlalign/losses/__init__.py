"""Losses: minus the objective, over rectangular log-probs; they never see the forest.

Each returns (loss, metrics): a scalar in float32 or wider and a dict of scalars. What a mask or `valid` hides enters
nothing, not even as 0 * NaN; samples without a True token do not count.

policy.py  the clipped surrogate          pairs.py  pairs and labels          estimates.py  KL and importance weights
aggregate.py  from tokens to one number
"""

from rlalign.losses.aggregate import aggregate_tokens, count_for, negative_log_likelihood, token_mean
from rlalign.losses.estimates import importance_weight, kl_estimate
from rlalign.losses.pairs import (
    LINKS,
    bradley_terry,
    density_ratio,
    dpo,
    kto,
    sequence_logratio,
    sequence_mean,
    simpo,
    spin,
)
from rlalign.losses.policy import policy_gradient

__all__ = [
    "LINKS",
    "aggregate_tokens",
    "bradley_terry",
    "count_for",
    "density_ratio",
    "dpo",
    "importance_weight",
    "kl_estimate",
    "kto",
    "negative_log_likelihood",
    "policy_gradient",
    "sequence_logratio",
    "sequence_mean",
    "simpo",
    "spin",
    "token_mean",
]
