"""Training: mesh and sharding rules, the optimizer as data, the step."""

from rlalign.train.batch import make_batch, pack_rollouts
from rlalign.train.mesh import make_mesh, place_params
from rlalign.train.offline import make_offline_batch
from rlalign.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from rlalign.train.score import Judge, make_judge, make_rewarder, make_scorer
from rlalign.train.step import init_state, make_train_step, split_batch

__all__ = [
    "Judge",
    "OptimizerConfig",
    "init_state",
    "make_batch",
    "make_judge",
    "make_mesh",
    "make_offline_batch",
    "make_optimizer",
    "make_rewarder",
    "make_schedule",
    "make_scorer",
    "make_train_step",
    "pack_rollouts",
    "place_params",
    "split_batch",
]
