"""Rollouts: sampling responses from the policy."""

from rlalign.rollout.config import SampleConfig
from rlalign.rollout.sampler import sample

__all__ = ["SampleConfig", "sample"]
