"""The papers' formulas as slow float64 loops, apart from the code they judge, and random inputs for both.

A group is a list of row numbers, a response a list of token numbers; nothing here is vectorised. Where a formula holds
a stop-gradient, `at` is the point that it keeps: with `at` fixed, finite differences of the value are the gradient.
"""

from tests.oracles.algorithms import ADVANTAGES, ORACLES, surrogate
from tests.oracles.cases import (
    numerical_gradient,
    random_case,
    random_groups,
    random_pairs,
    random_steps,
    random_tokens,
    stack,
)
from tests.oracles.groups import (
    group_preference,
    group_relative,
    informative_groups,
    leave_one_out,
    overlong_penalty,
    per_objective,
    remax,
    rows_of,
    term_spread,
)
from tests.oracles.pairs import (
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
from tests.oracles.policy import (
    LARGEST,
    aggregate,
    importance,
    importance_weight,
    kl_estimate,
    negative_log_likelihood,
    policy_gradient,
    token_share,
)
from tests.oracles.steps import anchor_ids, discounted_return, group_in_group, reinforce_pp, step_metrics

__all__ = [
    "ADVANTAGES",
    "LARGEST",
    "LINKS",
    "ORACLES",
    "aggregate",
    "anchor_ids",
    "bradley_terry",
    "density_ratio",
    "discounted_return",
    "dpo",
    "group_in_group",
    "group_preference",
    "group_relative",
    "importance",
    "importance_weight",
    "informative_groups",
    "kl_estimate",
    "kto",
    "leave_one_out",
    "negative_log_likelihood",
    "numerical_gradient",
    "overlong_penalty",
    "per_objective",
    "policy_gradient",
    "random_case",
    "random_groups",
    "random_pairs",
    "random_steps",
    "random_tokens",
    "reinforce_pp",
    "remax",
    "rows_of",
    "sequence_logratio",
    "sequence_mean",
    "simpo",
    "spin",
    "stack",
    "step_metrics",
    "surrogate",
    "term_spread",
    "token_share",
]
