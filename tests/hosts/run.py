"""A short run of fit on a mesh; as a script, one of several processes of it.

RLALIGN_COORDINATOR=localhost:PORT RLALIGN_PROCESSES=2 RLALIGN_PROCESS=0 python run.py FOLDER --data 2 --fsdp 2
"""

import argparse
import dataclasses

import jax
import numpy as np

import rlalign as ra
from rlalign import hosts
from rlalign.envs import sums
from rlalign.io import session
from tests.graders import share_right_but_for_9
from tests.tiny import sums_model, sums_run

MODEL = sums_model(16)


def train(folder, mesh, *, steps: int, **changes) -> dict[str, np.ndarray]:
    """Parameters on the host, by path, after a GRPO run with a KL to its own beginning."""
    config = sums_run(
        folder,
        steps=steps,
        prompts_per_step=8,
        optimizer=ra.OptimizerConfig(learning_rate=1e-3),
        row_length=24,
        num_rows=8,
        eval_every=5,
        eval_prompts=7,  # no number of processes divides it
        checkpoint_every=5,
        max_invalid_share=1.0,
        **changes,
    )
    decoder = ra.Decoder(MODEL)
    params = decoder.init(0)
    result = ra.fit(
        config,
        decoder=decoder,
        params=params if mesh is None else ra.place_params(params, mesh),
        prompts=sums.problems("train"),
        eval_prompts=sums.problems("held-out"),
        reward=share_right_but_for_9,
        decode=sums.decode,
        algorithm=dataclasses.replace(ra.ALGORITHMS["grpo"], kl_coef=0.01),
        mesh=mesh,
    )
    leaves = hosts.fetch(result.state.params)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(leaves)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--patience", type=int, default=30)
    parser.add_argument("--own", choices=("nothing", "settings", "step"), default="nothing", help="of each process")
    parser.add_argument("--save", default="")
    parser.add_argument("--export", default="")
    for axis in ("data", "fsdp", "tensor"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    flags = parser.parse_args()
    hosts.join(patience=flags.patience)
    mesh = ra.make_mesh(data=flags.data, fsdp=flags.fsdp, tensor=flags.tensor)
    own = {"seed": jax.process_index(), "reward_limit": 20.0 + jax.process_index()} if flags.own == "settings" else {}
    if flags.own == "step":
        session.resume = lambda checkpoints, state, *_: (state, {"step": jax.process_index()})
    leaves = train(flags.folder, mesh, steps=flags.steps, **own)
    if flags.save and hosts.first():
        np.savez(flags.save, **leaves)
    if flags.export:
        decoder = ra.Decoder(MODEL)
        ra.save_pretrained(flags.export, decoder, ra.place_params(decoder.init(3), mesh))
