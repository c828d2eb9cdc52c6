"""Rollouts: sampling responses from the policy."""

from rlalign.rollout.config import SampleConfig
from rlalign.rollout.endpoint import Engine, EngineError
from rlalign.rollout.engine import engine_sampler, sample_from
from rlalign.rollout.sampler import sample
from rlalign.rollout.strings import Allowed, allowed_strings

__all__ = [
    "Allowed",
    "Engine",
    "EngineError",
    "SampleConfig",
    "allowed_strings",
    "engine_sampler",
    "sample",
    "sample_from",
]
