"""What an iteration of agents costs beside its groups: python benchmarks/agents.py

A tiny policy plays House, 8 tasks in 8 copies, and learns from it; once by gigpo and once by grpo, each in a process of
its own, whose peak counts. `grouping_share` is that of finding anchor groups and computing GiGPO's advantages in
the iteration; `peak_ratio` gigpo's peak memory over grpo's; `stored` tokens in the forest, over those of all
steps with their whole prompts, for both forms of prompts. Prints one JSON line.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

import rlalign as ra
from rlalign.advantages import anchor_ids
from rlalign.envs.episodes import Episodes, play
from rlalign.envs.house import LEVELS, NAMES, PHRASES, VOCABULARY, House
from rlalign.envs.prompting import bare, rebuilt, transcript
from rlalign.envs.rows import advantage_parts, episode_batch, of_steps, rows_of
from rlalign.envs.words import EOS, Words
from rlalign.envs.worlds import Worlds

WORDS = Words(sorted({*VOCABULARY, *NAMES, *PHRASES, "did", "can", ";", *map(str, range(16))}))
TASKS, COPIES, ANSWER, PROMPT = 8, 8, 8, 1016


def seen(observation) -> str:
    return f"{observation.text} can {' ; '.join(observation.admissible)} did"


def shown(past, taken, observation) -> str:
    before = " ".join(f"{turn.observation.text} did {turn.action} ;" for turn in past)
    return f"{observation.task} {taken} ; {before} {seen(observation)}"


FORMS = {
    "rebuilt": rebuilt(WORDS.encode, history=2, render=shown),
    "transcript": transcript(
        lambda observation: WORDS.encode(f"{observation.task} {seen(observation)}"),
        lambda observation, ended: np.append(np.full(int(not ended), EOS, np.int32), WORDS.encode(seen(observation))),
    ),
}


def median(run: Callable[[], object], repeats: int) -> float:
    """Seconds of a run that has been warmed up."""
    run()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def measure(name: str, form: str, repeats: int) -> dict:
    """One algorithm and form in this process."""
    decoder = ra.Decoder(
        ra.ModelConfig(
            vocab_size=len(WORDS), width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp_width=256,
            max_positions=PROMPT + ANSWER, tied_head=True, qk_norm=True,
        )
    )  # fmt: skip
    optimizer = ra.make_optimizer(ra.OptimizerConfig())
    algorithm = of_steps(dataclasses.replace(ra.ALGORITHMS[name], kl_coef=0.0))
    state = ra.init_state(decoder, decoder.init(0, deviation="fan_in"), optimizer)
    update = ra.make_train_step(decoder, algorithm, optimizer)
    longest = 128 if form == "rebuilt" else PROMPT
    settings = Episodes(
        copies=COPIES, max_steps=15, max_prompt=longest, sampling=ra.SampleConfig(1, ANSWER, eos_ids=(EOS,))
    )
    how = {"form": FORMS[form], "parse": bare, "decode": WORDS.decode, "config": settings, "seed": 0}
    with Worlds(House, copies=TASKS * COPIES, arguments=LEVELS[1]) as worlds:
        act = lambda: play(decoder, state.params, worlds, range(TASKS), step=0, **how)
        rollout, episodes = median(act, repeats), act()
    rows = rows_of(episodes, settings)
    pack = lambda: episode_batch(algorithm, rows, row_length=max(640, longest + ANSWER))
    batch = pack()
    anchors = [turn.observation.anchor for episode in episodes for turn in episode.turns]
    group = [episode.group for episode in episodes for _ in episode.turns]

    def learn():
        nonlocal state  # the step uses its buffers up
        state, metrics = update(state, batch)
        jax.block_until_ready(metrics)

    def groups():
        anchor_ids(anchors, group)
        advantage_parts(algorithm, rows)

    seconds = {
        "rollout": rollout,
        "rows": median(lambda: rows_of(episodes, settings), repeats),
        "pack": median(pack, repeats),
        "update": median(learn, repeats),
    }
    total = sum(len(prompt.tokens) for prompt in rows.prompts[: rows.count]) + int(np.sum(rows.rollouts.mask))
    return {
        "seconds": seconds,
        "grouping": median(groups, repeats),
        "stored": round(float(np.sum(np.asarray(batch.packed.forest.visible_until) > 0)) / total, 3),
        "rows": rows.count,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs=2, metavar=("ALGORITHM", "FORM"), help="one measurement, in this process")
    flags = parser.parse_args()
    if flags.only:
        name, form = flags.only
        print(json.dumps(measure(name, form, flags.repeats)))
        return
    begin, found = time.perf_counter(), {}
    for name, form in (("gigpo", "rebuilt"), ("grpo", "rebuilt"), ("gigpo", "transcript")):
        command = [sys.executable, __file__, "--repeats", str(flags.repeats), "--only", name, form]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[f"{name} {form}"] = json.loads(done.stdout.splitlines()[-1])
    gigpo, grpo, path = found.values()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = {
        "benchmark": "agents",
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(spent.ru_utime + spent.ru_stime, 2),
        "peak_gib": gigpo["peak_gib"],
        "grouping_share": round(gigpo["grouping"] / sum(gigpo["seconds"].values()), 5),
        "peak_ratio": round(gigpo["peak_gib"] / grpo["peak_gib"], 4),
        "stored": {"rebuilt": gigpo["stored"], "transcript": path["stored"]},
        "runs": found,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
