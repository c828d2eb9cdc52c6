"""A tiny policy learns sums from rewards, from one command.

    python experiments/quickstart.py                          # GRPO, a few minutes on two cores
    python experiments/quickstart.py --algorithm gprs --seed 1
    python experiments/quickstart.py --preset smoke           # short: too short to learn much

A character-level transformer (2 layers, width 64, 0.1 M parameters) first imitates demonstrations of a + b with
a, b < 100, of which 75% have a wrong digit; it learns to write sums, and to be wrong as often. Then it learns
from nothing but a reward of 1 for a right answer. A tenth of all pairs is in neither; accuracy is measured on them.

Writes RUN/report.html; the last line on stdout is the result as JSON. A run that was stopped is continued.
"""

import dataclasses
import json
import sys
import time
from typing import Literal

import jax
import numpy as np
import tyro

import rlalign as ra
from rlalign.envs import sums
from rlalign.io.experiment import with_preset
from rlalign.io.files import fingerprint
from rlalign.io.runner import resolve

PRESETS = {"smoke": {"steps": 20, "warmup_steps": 100}, "laptop": {}, "paper": {}}


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Settings of the quickstart; every field is a flag."""

    algorithm: str = "grpo"
    preset: Literal["smoke", "laptop", "paper"] = "laptop"
    seed: int = 0
    steps: int = 500
    warmup_steps: int = 600
    wrong: float = 0.75
    prompts_per_step: int = 32
    num_samples: int = 8
    learning_rate: float = 5e-4
    save_every: int = 50
    run: str = ""


ROW = 120  # tokens a row of the forest: 3 groups of 8 answers, or 12 demonstrations
MODEL = ra.ModelConfig(
    vocab_size=sums.VOCAB_SIZE,
    width=64,
    layers=2,
    heads=4,
    kv_heads=4,
    head_width=16,
    mlp_width=256,
    max_positions=32,
    tied_head=True,
    qk_norm=True,
)


def rows(trees: int, tokens: int) -> int:
    """Rows that hold so many trees of so many tokens, with a tenth to spare: nearly always one shape a run."""
    return -(-11 * trees // (10 * max(ROW // tokens, 1)))


def warm_up(decoder: ra.Decoder, config: Quickstart, *, per_step: int = 256) -> ra.types.Params:
    """Parameters after imitating partly wrong demonstrations."""
    problems = sums.problems("train")
    schedule = ra.OptimizerConfig(
        learning_rate=3e-3,
        warmup_steps=min(20, config.warmup_steps // 2),
        schedule="cosine",
        total_steps=config.warmup_steps + 1,
    )
    optimizer = ra.make_optimizer(schedule)
    step = ra.make_train_step(decoder, ra.ALGORITHMS["sft"], optimizer)
    state = ra.init_state(decoder, decoder.init(config.seed), optimizer)
    for i in range(config.warmup_steps):
        rng = np.random.default_rng((config.seed, i))
        chosen = [problems[k] for k in rng.integers(len(problems), size=per_step)]
        texts = [sums.demonstration(p, rng, wrong=config.wrong) for p in chosen]
        packed = ra.pack(
            texts,
            row_length=ROW,
            num_rows=rows(per_step, sums.PROMPT_TOKENS + sums.ANSWER_TOKENS),
            response_start=[sums.PROMPT_TOKENS] * per_step,
            response_length=sums.ANSWER_TOKENS,
        )
        state, metrics = step(state, ra.Batch(packed))
        if i % 100 == 0 or i + 1 == config.warmup_steps:
            print(f"warm-up {i + 1}/{config.warmup_steps}  loss {float(metrics['loss']):.3f}", file=sys.stderr)
    return state.params


def main(config: Quickstart) -> dict:
    """Warm up, then reinforce; returns the result."""
    begin, cpu = time.perf_counter(), time.process_time()
    group_tokens = sums.PROMPT_TOKENS + config.num_samples * sums.ANSWER_TOKENS
    run = ra.RunConfig(
        folder=config.run or f"runs/quickstart-{config.algorithm}-{config.preset}-seed{config.seed}",
        algorithm=config.algorithm,
        steps=config.steps,
        prompts_per_step=config.prompts_per_step,
        sampling=ra.SampleConfig(config.num_samples, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,)),
        optimizer=ra.OptimizerConfig(
            learning_rate=config.learning_rate,
            warmup_steps=min(5, config.steps // 2),
            schedule="linear",
            total_steps=config.steps + 1,
        ),
        row_length=max(ROW, group_tokens),
        num_rows=rows(config.prompts_per_step, group_tokens),
        seed=config.seed,
        eval_prompts=512,
        checkpoint_every=config.save_every,
    )
    resolve(run, ra.ALGORITHMS[config.algorithm])  # what cannot work is refused before the warm-up
    decoder = ra.Decoder(MODEL)
    result = ra.fit(
        run,
        decoder=decoder,
        params=warm_up(decoder, config),
        prompts=sums.problems("train"),
        eval_prompts=sums.problems("held-out"),
        reward=sums.exact,
        decode=sums.decode,
    )
    seconds = time.perf_counter() - begin
    before, after = result.accuracy[0], result.accuracy[config.steps]
    print(f"held-out accuracy {before:.1%} -> {after:.1%}; report: {result.folder / 'report.html'}", file=sys.stderr)
    return {
        "experiment": "quickstart",
        **dataclasses.asdict(config),
        "accuracy_before": before,
        "accuracy_after": after,
        "best_step": result.best_step,
        "params_sha256": fingerprint(result.state.params),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    flags = tyro.cli(Quickstart)
    print(json.dumps(main(with_preset(flags, PRESETS))))
