"""rlalign: critic-free reinforcement learning and self-imitation for language models, on a token forest.

This page is the index: every public name and where it lives. Modules are imported when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.algorithms import ALGORITHMS, Algorithm
    from rlalign.envs.episodes import Episodes, play
    from rlalign.envs.processes import WorkerWorlds
    from rlalign.envs.prompting import bare, chat_transcript, rebuilt, tagged, transcript
    from rlalign.envs.worlds import Worlds
    from rlalign.forest import pack, split
    from rlalign.io.agents import fit_agent
    from rlalign.io.config import AgentConfig, OfflineConfig, RunConfig
    from rlalign.io.data import read_prompts
    from rlalign.io.examples import chat_encoding, plain_encoding, read_demonstrations, read_preferences
    from rlalign.io.loop import fit
    from rlalign.io.mixture import mix
    from rlalign.io.offline import fit_offline
    from rlalign.logprobs import token_logprobs
    from rlalign.models import (
        Decoder,
        LoraConfig,
        ModelConfig,
        Tokenizer,
        add_lora,
        add_reward_head,
        load_pretrained,
        load_tokenizer,
        logits,
        merge_lora,
        save_pretrained,
        without_lora,
    )
    from rlalign.rewards import RewardGuard, score
    from rlalign.rollout import SampleConfig, sample
    from rlalign.train import (
        OptimizerConfig,
        init_state,
        make_batch,
        make_judge,
        make_mesh,
        make_offline_batch,
        make_optimizer,
        make_scorer,
        make_train_step,
        place_params,
        split_batch,
    )
    from rlalign.types import (
        Batch,
        Demonstration,
        Encoding,
        Packed,
        Preference,
        Prompt,
        Rewards,
        Rollouts,
        TokenForest,
        TrainState,
    )

_HOME = {
    # the maths (also: rlalign.advantages, rlalign.losses)
    "ALGORITHMS": "rlalign.algorithms",
    "Algorithm": "rlalign.algorithms",
    "token_logprobs": "rlalign.logprobs",
    # the forest
    "pack": "rlalign.forest",
    "split": "rlalign.forest",
    # the model
    "Decoder": "rlalign.models",
    "LoraConfig": "rlalign.models",
    "ModelConfig": "rlalign.models",
    "Tokenizer": "rlalign.models",
    "load_pretrained": "rlalign.models",
    "load_tokenizer": "rlalign.models",
    "add_lora": "rlalign.models",
    "merge_lora": "rlalign.models",
    "add_reward_head": "rlalign.models",
    "without_lora": "rlalign.models",
    "logits": "rlalign.models",
    "save_pretrained": "rlalign.models",
    # the loop: prompts -> rollout -> reward -> advantage -> pack -> train step
    "read_prompts": "rlalign.io.data",
    "read_demonstrations": "rlalign.io.examples",
    "read_preferences": "rlalign.io.examples",
    "chat_encoding": "rlalign.io.examples",
    "plain_encoding": "rlalign.io.examples",
    "mix": "rlalign.io.mixture",
    "SampleConfig": "rlalign.rollout",
    "sample": "rlalign.rollout",
    "RewardGuard": "rlalign.rewards",
    "score": "rlalign.rewards",
    "make_batch": "rlalign.train",
    "make_offline_batch": "rlalign.train",
    "make_train_step": "rlalign.train",
    "make_scorer": "rlalign.train",
    "make_judge": "rlalign.train",
    "init_state": "rlalign.train",
    "split_batch": "rlalign.train",
    "OptimizerConfig": "rlalign.train",
    "make_optimizer": "rlalign.train",
    "make_mesh": "rlalign.train",
    "place_params": "rlalign.train",
    "RunConfig": "rlalign.io.config",
    "fit": "rlalign.io.loop",
    "OfflineConfig": "rlalign.io.config",
    "fit_offline": "rlalign.io.offline",
    # agents: tasks -> episodes -> a row each step -> advantage -> pack -> train step
    "Worlds": "rlalign.envs.worlds",
    "WorkerWorlds": "rlalign.envs.processes",
    "Episodes": "rlalign.envs.episodes",
    "play": "rlalign.envs.episodes",
    "rebuilt": "rlalign.envs.prompting",
    "transcript": "rlalign.envs.prompting",
    "chat_transcript": "rlalign.envs.prompting",
    "tagged": "rlalign.envs.prompting",
    "bare": "rlalign.envs.prompting",
    "AgentConfig": "rlalign.io.config",
    "fit_agent": "rlalign.io.agents",
    # what travels
    "Batch": "rlalign.types",
    "Demonstration": "rlalign.types",
    "Encoding": "rlalign.types",
    "Packed": "rlalign.types",
    "Preference": "rlalign.types",
    "Prompt": "rlalign.types",
    "Rewards": "rlalign.types",
    "Rollouts": "rlalign.types",
    "TokenForest": "rlalign.types",
    "TrainState": "rlalign.types",
}

__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module 'rlalign' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
