"""Advantages: arrays in, arrays out, no model.

Groups are data: `group` i[N] names the group of each sample, so ragged groups and filtered samples need no reshape.
Every function keeps three promises:

* an invalid sample gets exactly 0 and enters no statistic, whatever its reward holds (NaN included);
* a group whose valid rewards are all equal, or that has one valid sample, gets exactly 0 (remax: no; group_in_group:
  its episode part; hierarchy_of_groups: a subgroup; reinforce_pp: the whole batch instead of the group);
* a NaN in a valid sample makes its own group NaN and no other (reinforce_pp: the batch).

groups.py  one number a response      steps.py  rows that are steps of trajectories, anchors.py  which of them are alike
tokens.py  by token
"""

from rlalign.advantages.anchors import anchor_ids, past_ids
from rlalign.advantages.groups import (
    group_preference,
    group_relative,
    informative_groups,
    leave_one_out,
    per_objective,
    remax,
    term_spread,
)
from rlalign.advantages.steps import (
    discounted_return,
    group_in_group,
    hierarchy_of_groups,
    per_trajectory,
    step_metrics,
)
from rlalign.advantages.tokens import overlong_penalty, reinforce_pp

__all__ = [
    "anchor_ids",
    "discounted_return",
    "group_in_group",
    "group_preference",
    "group_relative",
    "hierarchy_of_groups",
    "informative_groups",
    "leave_one_out",
    "overlong_penalty",
    "past_ids",
    "per_objective",
    "per_trajectory",
    "reinforce_pp",
    "remax",
    "step_metrics",
    "term_spread",
]
