"""A small run of GSIL in a process of its own, for test_kill_offline.py: python offline.py --run FOLDER."""

import json
import sys

import jax

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.files import fingerprint
from tests.tiny import sums_model


def main(folder: str) -> dict:
    """Three iterations of six steps, each of which answers and scores 48 demonstrations, 4 at a time."""
    decoder = ra.Decoder(sums_model(8))
    run = ra.OfflineConfig(
        folder=folder,
        algorithm="gsil_bernoulli",
        examples_per_step=8,
        optimizer=ra.OptimizerConfig(learning_rate=1e-2),
        row_length=32,
        num_rows=8,
        iterations=3,
        generation=ra.SampleConfig(1, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,)),
        prepare_size=4,
        checkpoint_every=2,
    )
    examples = sums.demonstrations("train")[:48]
    params = jax.jit(lambda: decoder.init(0))()  # one program, which the next process finds compiled
    result = ra.fit_offline(run, decoder=decoder, params=params, examples=examples)
    return {"params_sha256": fingerprint(result.state.params)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[-1])))
