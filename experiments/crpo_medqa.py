"""CRPO's rewards of clinical reasoning, beside accuracy alone (GRPO) and beside terms that are normalised one by one.

    python experiments/crpo_medqa.py                                       # one run: crpo, seed 0, two cores
    python experiments/crpo_medqa.py --method grpo --seed 2
    python experiments/crpo_medqa.py --sweep                               # 3 methods, 3 seeds, pages of results
    python experiments/crpo_medqa.py --preset smoke                        # a few steps, for the machinery
    python experiments/crpo_medqa.py --preset paper --topology v5p:2x2x4   # the paper's run, planned, not run
    python experiments/crpo_medqa.py --preset paper --folder-model Qwen2.5-3B-Instruct \\
        --questions medqa/train.jsonl --traces traces.jsonl                # and run, on whatever devices are here
    python experiments/crpo_medqa.py --folder-model models/smollm2-135m-instruct --questions medqa/dev.jsonl

Research software: not a medical device, not for diagnosis or treatment.

Without a folder a policy of two layers answers the questions of rlalign.envs.clinic. It first imitates traces with
faults (SHOWN): most argue for a wrong option, many lack a tag or a section, have a conclusion that refers to nothing,
or signs that are no ASCII, so that every term of CRPO's reward begins at a middling level. Then it learns from

    crpo                 r = 10 r_acc + r_CR + 0.5 r_cons, summed and normalised once a group (arXiv 2512.00601, eq. 4)
    crpo_per_objective   the same terms, each normalised by itself, then weighed
    grpo                 r = r_acc; the other terms are logged and not rewarded

and is measured on questions that are in none of this, by the accuracy of single answers and of a majority of five.
Metrics have each term's mean, and its spread within groups: where all answers of a group are right, the spread of the
small terms is all that CRPO's normalisation leaves, and it is blown up to full size.

Measured with --sweep, 3 seeds, on two Intel Xeon cores (jax 0.10.2), all nine runs and the imitation before them in
16.5 minutes (docs/crpo_medqa.json): of answers to held-out questions 25 % are right after imitation, and 63.3, 64.3 and
65.5 % after crpo, crpo_per_objective and grpo (by seed 78, 79, 33; 75, 80, 38; 79, 80, 37 %); both sections are there
in 63 % before and in 86, 81 and 52 % after; conclusions refer back in 20 % before and 13, 14 and 8 % after. The three
share one loss: each batch is used once, where clipping is without effect, and the KL's weight is the same.

The paper's setup is Qwen2.5-3B-Instruct: a cold start (SFT, LoRA of rank 32, learning rate 1e-4) on traces of half of
MedQA, then RL on the other half for 20 epochs, 5 answers a question, 512 questions a step, learning rate 1e-6, KL .001,
prompts of 1024 tokens and answers of 4096. Questions of a file are held out by a hash of their text, and halved by
another; --traces is a file of the same records with a field "response", such as a larger model's answers.

The last line on stdout is JSON; with --sweep FOLDER has results.json and index.html, with curves of each term.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

import rlalign as ra
from rlalign.cli import plan_paper
from rlalign.clinical.dialogue import NOTICE
from rlalign.envs import clinic
from rlalign.io.comparison import comparison_svg, write_comparison
from rlalign.io.experiment import earlier_result, over_seeds, with_preset
from rlalign.io.files import fingerprint, write_atomic
from rlalign.io.medical import of_split, read_medical_demonstrations, read_medical_questions
from rlalign.io.metrics import read_metrics
from rlalign.rewards.clinical import accuracy_alone, boxed_letter, crpo, letter_accuracy, majority_vote

# method -> (its algorithm, its reward, the reward of a right answer or more)
METHODS: dict[str, tuple[str, Callable[..., Any], float]] = {
    "crpo": ("crpo", crpo, 10.0),
    "crpo_per_objective": ("crpo_per_objective", crpo, 10.0),
    "grpo": ("grpo", accuracy_alone, 1.0),
}
TERMS: tuple[str, ...] = ("accuracy", "reasoning", "consistency")
SHOWN = {"wrong": 0.5, "malformed": 0.3, "detached": 0.5, "foreign": 0.3}  # faults of the traces; see clinic.trace
ROW, WARM_ROW = 384, 112  # tokens a row of the forest
EXAMPLE = 56  # tokens of a question of words and an answer, at most
MODEL = ra.ModelConfig(
    vocab_size=clinic.VOCAB_SIZE,
    width=64,
    layers=2,
    heads=4,
    kv_heads=4,
    head_width=16,
    mlp_width=256,
    max_positions=96,
    tied_head=True,
    qk_norm=True,
)


@dataclasses.dataclass(frozen=True)
class CrpoMedqa:
    """Settings of the experiment; every field is a flag.

    Args:
      method: of METHODS.
      warm_steps: of the imitation that comes before; of a folder's model only where `traces` are given.
      epochs: passes over the questions, in place of `steps`, where it is not 0.
      num_samples: answers a question, the group.
      votes: answers a held-out question, of which the majority is measured at the end.
      folder_model: a Hugging Face folder; empty for a policy from scratch in the clinic of words.
      questions, form: the user's file, and whose records it holds.
      first_option: of MedMCQA: the number that its first option has, 1 in the paper's files and 0 on the Hub.
      traces: the same records with a response, for the cold start.
      max_prompt, max_answer: tokens, of a folder's model.
      lora_rank: of the cold start; 0 trains all parameters.
      fsdp: devices over which a folder's model lies.
      sweep: all methods and `seeds`.
      topology: devices that the paper's run is planned for (preset "paper" without a folder: nothing is run).
    """

    method: Literal["crpo", "crpo_per_objective", "grpo"] = "crpo"
    seed: int = 0
    preset: Literal["smoke", "laptop", "paper"] = "laptop"
    warm_steps: int = 250
    warm_size: int = 64
    warm_rate: float = 3e-3
    steps: int = 100
    epochs: int = 0
    prompts_per_step: int = 16
    num_samples: int = 8
    learning_rate: float = 3e-4
    kl_coef: float = 0.001
    microbatches: int = 1
    eval_every: int = 10
    eval_prompts: int = 256
    votes: int = 5
    folder_model: str = ""
    questions: str = ""
    form: Literal["medqa", "medmcqa", "medxpertqa"] = "medqa"
    first_option: Literal[0, 1] = 1
    traces: str = ""
    max_prompt: int = 1024
    max_answer: int = 256
    lora_rank: int = 32
    fsdp: int = 1
    sweep: bool = False
    seeds: int = 3
    folder: str = "runs/crpo-medqa"
    topology: str = "v5p:2x2x4"


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "warm_steps": 4,
        "warm_size": 8,
        "steps": 2,
        "prompts_per_step": 2,
        "num_samples": 4,
        "eval_every": 1,
        "eval_prompts": 8,
        "votes": 3,
        "folder": "runs/crpo-medqa-smoke",
    },
    "laptop": {},
    "paper": {
        "warm_rate": 1e-4,
        "epochs": 20,
        "prompts_per_step": 512,
        "num_samples": 5,
        "learning_rate": 1e-6,
        "microbatches": 32,
        "max_answer": 4096,
        "folder": "runs/crpo-medqa-paper",
    },
}


class Setup(NamedTuple):
    """What is trained, and on what."""

    decoder: ra.Decoder
    params: Any
    demonstrations: Sequence[ra.Demonstration]
    prompts: Sequence[ra.Prompt]
    held_out: Sequence[ra.Prompt]
    decode: Callable[[list[int]], str]
    eos_ids: tuple[int, ...]
    max_answer: int
    row_length: int
    num_rows: int | None
    mesh: Any = None


def in_words(config: CrpoMedqa) -> Setup:
    """A policy from nothing, in the clinic of words."""
    decoder = ra.Decoder(MODEL)
    shown = clinic.demonstrations("train", seed=config.seed, **SHOWN)
    prompts, held_out = clinic.problems("policy"), clinic.problems("held-out")
    longest = max(len(prompt.tokens) for prompt in prompts)
    group = longest + config.num_samples * clinic.ANSWER_TOKENS
    rows = -(-5 * config.prompts_per_step // (4 * max(ROW // group, 1)))
    ends = (clinic.decode, (clinic.EOS,), clinic.ANSWER_TOKENS, max(ROW, group), rows)
    return Setup(decoder, decoder.init(config.seed), shown, prompts, held_out, *ends)


def in_folder(config: CrpoMedqa) -> Setup:
    """The user's model and questions."""
    if not config.questions:
        raise SystemExit("--folder-model needs --questions, a file of MedQA, MedMCQA or MedXpertQA (--form)")
    tokenizer = ra.load_tokenizer(config.folder_model)
    encode = ra.chat_encoding(tokenizer) if tokenizer.inner.chat_template else ra.plain_encoding(tokenizer)
    kind = {"form": config.form, "first_option": config.first_option}
    read = read_medical_questions(config.questions, encode, max_tokens=config.max_prompt, **kind)
    print(read.summary(), file=sys.stderr)
    mesh = ra.make_mesh(fsdp=config.fsdp) if config.fsdp > 1 else None
    decoder, params = ra.load_pretrained(config.folder_model, mesh=mesh)
    decoder = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, remat="full"))
    shown: Sequence[ra.Demonstration] = ()
    prompts = of_split(read, "train")
    if config.traces:
        longest, of_answer = config.max_prompt + config.max_answer, config.max_answer
        traces = read_medical_demonstrations(config.traces, encode, max_tokens=longest, max_response=of_answer, **kind)
        known = {prompt.text for prompt in of_split([trace.prompt for trace in traces], "train", half=0)}
        shown = [trace for trace in traces if trace.prompt.text in known]
        prompts = of_split(read, "train", half=1)
    row = config.max_prompt + config.num_samples * config.max_answer
    ends = (tokenizer.decode, tokenizer.eos_ids, config.max_answer, row, None, mesh)
    return Setup(decoder, params, shown, prompts, of_split(read, "held-out"), *ends)


def cold_start(config: CrpoMedqa, setup: Setup) -> Any:
    """The parameters after imitation; as they are where there is nothing to imitate."""
    if not setup.demonstrations or not config.warm_steps:
        return setup.params
    decoder, params, small = setup.decoder, setup.params, not config.folder_model
    if not small and config.lora_rank:
        decoder, params = ra.add_lora(decoder, params, ra.LoraConfig(rank=config.lora_rank), seed=config.seed)
    steps, size = config.warm_steps, config.warm_size
    run = ra.OfflineConfig(
        folder=f"{config.folder}/seed{config.seed}/start",
        algorithm="sft",
        examples_per_step=size,
        optimizer=ra.OptimizerConfig(
            learning_rate=config.warm_rate,
            warmup_steps=min(20, steps // 2),
            schedule="cosine",
            total_steps=steps + 1,
        ),
        row_length=WARM_ROW if small else setup.row_length,
        num_rows=-(-size // (WARM_ROW // EXAMPLE)) if small else None,
        epochs=steps * size / len(setup.demonstrations),
        seed=config.seed,
        eval_every=10 * steps,
        checkpoint_every=steps,
        keep=1,
    )
    how = {"examples": setup.demonstrations, "mesh": setup.mesh}
    trained = ra.fit_offline(run, decoder=decoder, params=params, **how).state.params
    return ra.merge_lora(decoder, trained)[1] if decoder is not setup.decoder else trained


def reinforce(config: CrpoMedqa, setup: Setup, params: Any, folder: Path) -> Any:
    """The run of the method."""
    name, reward, success = METHODS[config.method]
    steps = config.steps
    if config.epochs:
        steps = max(config.epochs * len(setup.prompts) // config.prompts_per_step, 1)
    run = ra.RunConfig(
        folder=str(folder),
        algorithm=name,
        steps=steps,
        prompts_per_step=config.prompts_per_step,
        sampling=ra.SampleConfig(config.num_samples, setup.max_answer, eos_ids=setup.eos_ids),
        optimizer=ra.OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=min(5, steps // 2)),
        row_length=setup.row_length,
        num_rows=setup.num_rows,
        microbatches=config.microbatches,
        seed=config.seed,
        eval_every=config.eval_every,
        eval_prompts=config.eval_prompts,
        success=success,
        checkpoint_every=steps if not config.folder_model else min(steps, 20),
        keep=1,
        reward_limit=10.0,
        keep_params=not config.folder_model,
    )
    return ra.fit(
        run,
        decoder=setup.decoder,
        params=params,
        prompts=setup.prompts,
        eval_prompts=setup.held_out,
        reward=reward,
        decode=setup.decode,
        algorithm=dataclasses.replace(ra.ALGORITHMS[name], kl_coef=config.kl_coef),
        mesh=setup.mesh,
    )


def measured(config: CrpoMedqa, setup: Setup, params: Any) -> dict[str, float]:
    """Held-out questions by the majority of several answers: what the paper reports."""
    asked = list(setup.held_out)[: config.eval_prompts]
    how = ra.SampleConfig(config.votes, setup.max_answer, eos_ids=setup.eos_ids)
    answers = ra.sample(setup.decoder, params, asked, seed=1 << 21, step=0, config=how, mesh=setup.mesh)
    said = [setup.decode(row[mask].tolist()) for row, mask in zip(answers.tokens, answers.mask, strict=True)]
    letters = [boxed_letter(text) for text in said]
    right = [prompt.example["answer"] for prompt in asked]
    voted = [majority_vote(letters[i : i + config.votes]) for i in range(0, len(letters), config.votes)]
    one, many = letter_accuracy(letters, np.repeat(right, config.votes).tolist()), letter_accuracy(voted, right)
    asking = (prompt.example for prompt in asked for _ in range(config.votes))
    reasoning = np.array([crpo(text, example)["reasoning"] for text, example in zip(said, asking, strict=True)])
    return {
        "format": float(np.mean(reasoning >= 1)),
        "cross_reference": float(np.mean(reasoning > 1)),
        "accuracy": one.of_all,
        "accuracy_of_valid": one.of_valid,
        "valid_ratio": one.valid_ratio,
        "majority_accuracy": many.of_all,
    }


def one_run(config: CrpoMedqa) -> dict:
    """Imitate, then reinforce; what exists of it is taken from the folder."""
    folder = Path(config.folder, f"seed{config.seed}", config.method)
    done = folder / "result.json"
    if (found := earlier_result(done, config, ignore=("sweep", "seeds", "topology"))) is not None:
        return found
    setup = in_folder(config) if config.folder_model else in_words(config)
    params = cold_start(config, setup)
    before = measured(config, setup, params)
    begin, cpu = time.perf_counter(), time.process_time()
    result = reinforce(config, setup, params, folder)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "eval_accuracy" in row]
    found = {
        "experiment": "crpo_medqa",
        **dataclasses.asdict(config),
        "terms_before": {name: rows[0][f"eval_term_{name}"] for name in TERMS},
        "terms_after": {name: rows[-1][f"eval_term_{name}"] for name in TERMS},
        "curves": {name: {row["step"]: round(row[f"eval_term_{name}"], 4) for row in rows} for name in TERMS},
        "held_out_before": before,
        "held_out": measured(config, setup, result.state.params),
        "params_sha256": fingerprint(result.state.params),
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    write_atomic(done, json.dumps(found))
    return found


def shown(found: dict) -> str:
    """A line about a run."""
    terms = (f"{name} {found['terms_before'][name]:.2f} -> {found['terms_after'][name]:.2f}" for name in TERMS)
    return f"{found['method']} seed {found['seed']}: {', '.join(terms)} in {found['seconds']} s"


def write_pages(config: CrpoMedqa, results: list[dict], seconds: float) -> None:
    """results.json, and index.html with a chart and a row of the table for each term."""
    runs = {name: [f"{config.folder}/seed{seed}/{name}" for seed in range(config.seeds)] for name in METHODS}
    groups, metric = dict.fromkeys(TERMS, runs), {term: f"eval_term_{term}" for term in TERMS}
    unit = {term: "" if term == "reasoning" else "%" for term in TERMS}
    note = "Of single answers to held-out questions; grpo is paid for accuracy alone. " + NOTICE
    write_comparison(config.folder, "CRPO's terms", groups, metric=metric, unit=unit, note=note)
    curve = comparison_svg(runs, "Reasoning term r_CR, held out", metric=metric["reasoning"], unit="")
    write_atomic(Path(config.folder, "reasoning.svg"), curve)
    of = {name: [one for one in results if one["method"] == name] for name in METHODS}
    keys = results[0]["held_out"]
    right = {name: [one["held_out"]["accuracy"] for one in runs] for name, runs in of.items()}
    summary = {
        "command": "python experiments/crpo_medqa.py --sweep",
        "notice": NOTICE,
        "seconds": seconds,  # of all that was run in this call
        "before": {key: over_seeds([one["held_out_before"][key] for one in of["grpo"]]) for key in keys},
        "methods": {
            name: {key: over_seeds([one["held_out"][key] for one in runs]) for key in keys}
            | {term: over_seeds([one["terms_after"][term] for one in runs]) for term in TERMS[1:]}
            for name, runs in of.items()
        },
        "accuracy_above_grpo": {
            name: over_seeds(np.subtract(right[name], right["grpo"]).tolist()) for name in METHODS if name != "grpo"
        },
    }
    write_atomic(Path(config.folder, "results.json"), json.dumps(summary | {"runs": results}, indent=1) + "\n")


def main(config: CrpoMedqa) -> dict:
    """One run, or all of them."""
    print(NOTICE, flush=True)
    begin = time.perf_counter()
    if not config.sweep:
        found = one_run(config)
        print(shown(found), file=sys.stderr)
        return found
    # Runs compile the same programs, each anew without this.
    jax.config.update("jax_compilation_cache_dir", str(Path(config.folder, "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    results = []
    for seed in range(config.seeds):
        for method in METHODS:
            results.append(one_run(dataclasses.replace(config, sweep=False, seed=seed, method=method)))
            print(shown(results[-1]), file=sys.stderr, flush=True)
    write_pages(config, results, round(time.perf_counter() - begin, 1))
    return {"experiment": "crpo_medqa", "runs": len(results), "folder": config.folder}


if __name__ == "__main__":
    flags = tyro.cli(CrpoMedqa)
    if flags.preset == "paper" and not flags.folder_model:
        sys.exit(plan_paper(Path(__file__).parent / "plans" / "crpo_qwen2_5_3b.toml", flags.topology))
    print(json.dumps(main(with_preset(flags, PRESETS))))
