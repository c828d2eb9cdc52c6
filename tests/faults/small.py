"""A small run of fit in a process of its own: python small.py --run FOLDER [--die POINT:STEP --told FILE]."""

import argparse
import contextlib
import json
import signal
from pathlib import Path

import jax
import numpy as np

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.files import fingerprint
from rlalign.io.session import Result
from tests.faults.injection import die, fail_at
from tests.graders import share_right
from tests.tiny import sums_model, sums_run


def train(folder: str, *, steps: int = 12, **changes) -> Result:
    """A KL to the beginning, so that a reference takes part; a checkpoint every three steps."""
    decoder = ra.Decoder(sums_model(8))
    how = {"algorithm": "gprs", "steps": steps, "eval_every": 4, "checkpoint_every": 3}
    return ra.fit(
        sums_run(folder, **(how | changes)),
        decoder=decoder,
        params=jax.jit(lambda: decoder.init(0))(),  # one program, which the next process finds compiled
        prompts=sums.problems("train")[:40],
        eval_prompts=sums.problems("held-out"),
        reward=share_right,
        decode=sums.decode,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--die", default="")
    parser.add_argument("--told", type=Path)
    parser.add_argument("--signal", type=int, default=int(signal.SIGKILL))
    flags = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if flags.die:
            point, step = flags.die.split(":")
            stack.enter_context(fail_at(point, int(step) if step else None, die(flags.told, number=flags.signal)))
        spread = {"checkpoint_every": flags.every, "eval_every": 4 * flags.every if flags.every > 3 else 4}
        result = train(flags.run, steps=flags.steps, **spread)
    begun = np.asarray(result.state.step + result.state.skipped).item()
    print(json.dumps({"params_sha256": fingerprint(result.state.params), "updates": begun}))


if __name__ == "__main__":
    main()
