"""Rollouts: sampling responses from the policy."""

from rlalign.rollout.config import SampleConfig
from rlalign.rollout.endpoint import Engine, EngineError
from rlalign.rollout.engine import engine_sampler, sample_from
from rlalign.rollout.sampler import sample

__all__ = ["Engine", "EngineError", "SampleConfig", "engine_sampler", "sample", "sample_from"]
