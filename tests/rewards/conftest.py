"""Loads the reward functions of these tests, from a file that no worker can import by name."""

import importlib.util
import sys
from pathlib import Path

import pytest

from rlalign.rewards import RewardGuard


def _load(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


graders = _load("reward_graders", Path(__file__).with_name("graders.py"))


@pytest.fixture(scope="module")
def one_guard():
    with RewardGuard(graders.python, workers=1, time_limit=5.0) as guard:
        yield guard
