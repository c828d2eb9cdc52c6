"""How much does a policy lose when its reward model is worse? GPRS beside GRPO and RLOO, end to end on two cores.

    python experiments/gprs_reward_quality.py                                  # one run: gprs, a good reward model
    python experiments/gprs_reward_quality.py --algorithm grpo --reward noise40 --seed 2
    python experiments/gprs_reward_quality.py --distortion heavy               # rewards cubed: gprs must not notice
    python experiments/gprs_reward_quality.py --reward rule                    # +1 or -1 by the verifier, no model
    python experiments/gprs_reward_quality.py --sweep                          # all runs, and the page of results
    python experiments/gprs_reward_quality.py --preset smoke                   # a few steps, for the machinery
    python experiments/gprs_reward_quality.py --preset paper --topology v5p:2x2x4  # the paper's RLHF, planned, not run;
                                                                               # with --reward rule its reasoning run

As in RLHF: a policy imitates demonstrations (sums of numbers below 100, of which 75% have a wrong digit). A reward
model, begun from that policy or smaller and from nothing, learns from pairs of a right and a wrong answer (a digit is
another, or the whole answer is another sum's) to problems that the policy is never asked. Then the policy learns from
that model alone. What is measured is the truth: the share of right answers to held-out problems, by a verifier.

Reward models, REWARDS, differ in size and in the share of pairs that are labelled the wrong way round. Distortions,
DISTORTIONS, are applied to the rewards of a good model; all but `saturated` increase strictly, and where no two
rewards of a group fall together in float32 gprs ends in the same bits. A run takes about 31 CPU seconds once its policy
and reward model exist, which all runs of one seed share, and its programs are compiled, which a sweep does once: 30 to
45 s on two cores, where nothing else runs. The first one compiles for another minute.

Writes RUN/report.html, with --sweep also FOLDER/results.json and FOLDER/index.html; the last line on stdout is JSON.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

import rlalign as ra
from rlalign.cli import plan_paper
from rlalign.envs import sums
from rlalign.io.comparison import write_comparison
from rlalign.io.experiment import earlier_result, with_preset
from rlalign.io.files import fingerprint, write_atomic
from rlalign.io.metrics import read_metrics
from rlalign.train import make_rewarder
from rlalign.train.offline import pack_examples

ROW = 120  # tokens a row of the forest
EVAL = 512  # held-out problems
SAMPLING = ra.SampleConfig(8, sums.ANSWER_TOKENS, eos_ids=(sums.EOS,))


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward model: its size, and what share of its pairs is labelled the wrong way round."""

    layers: int
    width: int
    flipped: float


REWARDS = {
    "good": Reward(2, 64, 0.0),
    "noise20": Reward(2, 64, 0.2),
    "noise40": Reward(2, 64, 0.4),
    "medium": Reward(1, 32, 0.0),
    "small": Reward(1, 16, 0.0),
}
# rewards f64[N] -> rewards f32[N]: what the algorithm sees.
DISTORTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda r: r,
    "scaled": lambda r: 64.0 * r,  # exact
    "shifted": lambda r: r / 8 - 3.0,
    "heavy": lambda r: r**3,
    "saturated": lambda r: np.round(np.tanh(r), 1),  # ties: not strictly increasing
}
ALGORITHMS = ("gprs", "gprs_weight", "grpo", "rloo")
BY_RULE = ("gprs", "grpo", "reinforce_pp")  # the paper's reasoning run: reward +1 or -1


@dataclasses.dataclass(frozen=True)
class GprsRewardQuality:
    """Settings of the experiment; every field is a flag.

    Args:
      kl_coef: of every algorithm alike; the paper's RLHF takes .05 for gprs.
      sweep: all algorithms, reward models and `seeds`, the distortions with seed 0; finished runs are not repeated.
      topology: devices that the paper's run is planned for (preset "paper": nothing is run).
    """

    algorithm: Literal["gprs", "gprs_weight", "grpo", "rloo", "reinforce_pp"] = "gprs"
    reward: Literal["good", "noise20", "noise40", "medium", "small", "rule"] = "good"
    distortion: Literal["none", "scaled", "shifted", "heavy", "saturated"] = "none"
    seed: int = 0
    preset: Literal["smoke", "laptop", "paper"] = "laptop"
    steps: int = 150
    warmup_steps: int = 500
    reward_steps: int = 600
    prompts_per_step: int = 32
    learning_rate: float = 3e-4
    kl_coef: float = 0.01
    sweep: bool = False
    seeds: int = 3
    folder: str = "runs/gprs-reward-quality"
    topology: str = "v5p:2x2x4"


PRESETS = {
    "smoke": {"steps": 3, "warmup_steps": 6, "reward_steps": 6, "folder": "runs/gprs-reward-quality-smoke"},
    "laptop": {},
}


def model(layers: int, width: int) -> ra.ModelConfig:
    """A character transformer."""
    return ra.ModelConfig(
        vocab_size=sums.VOCAB_SIZE,
        width=width,
        layers=layers,
        heads=4,
        kv_heads=4,
        head_width=width // 4,
        mlp_width=4 * width,
        max_positions=ROW,
        tied_head=True,
        qk_norm=True,
    )


POLICY = model(2, 64)


def offline(
    config: GprsRewardQuality, folder: str, algorithm: str, steps: int, examples: Sequence, *, per_step: int, **how
):
    """A run over examples: a good fifth of the batch's rows is spare, so that all steps have one shape."""
    optimizer = ra.OptimizerConfig(
        learning_rate=how.pop("learning_rate"),
        warmup_steps=min(20, steps // 2),
        schedule="cosine",
        total_steps=steps + 1,
    )
    run = ra.OfflineConfig(
        folder=f"{config.folder}/seed{config.seed}/{folder}",
        algorithm=algorithm,
        examples_per_step=per_step,
        optimizer=optimizer,
        row_length=ROW,
        num_rows=how.pop("num_rows"),
        epochs=steps * per_step / len(examples),
        seed=config.seed,
        eval_every=10 * steps,
        checkpoint_every=steps,
        keep=1,
    )
    return ra.fit_offline(run, examples=examples, **how)


def warm_policy(config: GprsRewardQuality) -> ra.types.Params:
    """The policy after imitating partly wrong demonstrations of the problems that it will be asked."""
    decoder = ra.Decoder(POLICY)
    examples = sums.demonstrations("policy", wrong=0.75, seed=config.seed)
    how = {"per_step": 256, "num_rows": 24, "learning_rate": 3e-3}
    params = decoder.init(config.seed)
    return offline(
        config, "policy", "sft", config.warmup_steps, examples, decoder=decoder, params=params, **how
    ).state.params


def pair_accuracy(decoder: ra.Decoder, params, pairs: Sequence[ra.Preference]) -> float:
    """Share of pairs whose chosen answer gets the higher reward."""
    reward = make_rewarder(decoder)(params, pack_examples(pairs, row_length=ROW)).reshape(-1, 2)
    return float(np.mean(reward[:, 0] > reward[:, 1]))


def reward_model(config: GprsRewardQuality, policy) -> tuple[ra.Decoder, ra.types.Params, float]:
    """Decoder, parameters and held-out accuracy of the reward model."""
    kind = REWARDS[config.reward]
    own = model(kind.layers, kind.width)
    begin = policy if own == POLICY else ra.Decoder(own).init(100 + config.seed)
    decoder, params = ra.add_reward_head(ra.Decoder(own), begin, seed=config.seed)
    pairs = [
        pair
        for wrong in ("digit", "any")
        for pair in sums.preferences("reward", kind=wrong, flipped=kind.flipped, seed=config.seed)
    ]
    held_out = sums.preferences("held-out", seed=config.seed)[:EVAL]
    how = {"per_step": 128, "num_rows": 20, "learning_rate": 1e-3 if own == POLICY else 3e-3}
    evaluate = lambda decoder, params: {"pair_accuracy": pair_accuracy(decoder, params, held_out)}
    done = offline(
        config,
        f"reward-{config.reward}",
        "bradley_terry",
        config.reward_steps,
        pairs,
        decoder=decoder,
        params=params,
        evaluate=evaluate,
        **how,
    )
    return decoder, done.state.params, pair_accuracy(decoder, done.state.params, held_out)


def signed(completion: str, example: dict) -> float:
    """1.0 for the right answer, -1.0 for any other."""
    return 2 * sums.exact(completion, example) - 1


@dataclasses.dataclass
class DistortedJudge:
    """A judge whose rewards are distorted; counts the ties that this makes within groups, in float32."""

    judge: ra.train.Judge
    name: str
    new_ties: int = dataclasses.field(default=0, compare=False)

    def __call__(self, prompts, rollouts) -> np.ndarray:
        """f32[N]."""
        plain = self.judge(prompts, rollouts).astype(np.float32)
        seen = DISTORTIONS[self.name](plain.astype(np.float64)).astype(np.float32)
        groups = (len(prompts), -1)
        self.new_ties += distinct(plain.reshape(groups)) - distinct(seen.reshape(groups))
        return seen


def distinct(values: np.ndarray) -> int:
    """How many different values the groups hold, each group for itself; an answer drawn twice has one value."""
    return sum(len(np.unique(group)) for group in values)


def one_run(config: GprsRewardQuality) -> dict:
    """Warm up, train the reward model, reinforce; what exists of it is taken from the folder."""
    policy = warm_policy(config)
    judge, quality = None, None
    if config.reward != "rule":
        decoder, params, quality = reward_model(config, policy)
        judge = DistortedJudge(ra.make_judge(decoder, params, row_length=ROW), config.distortion)
    folder = run_folder(config, dataclasses.asdict(config))
    done = folder / "result.json"
    if (found := earlier_result(done, config, ignore=("sweep", "seeds"))) is not None:
        return found
    group = sums.PROMPT_TOKENS + SAMPLING.num_samples * sums.ANSWER_TOKENS
    run = ra.RunConfig(
        folder=str(folder),
        algorithm=config.algorithm,
        steps=config.steps,
        prompts_per_step=config.prompts_per_step,
        sampling=SAMPLING,
        optimizer=ra.OptimizerConfig(
            learning_rate=config.learning_rate,
            warmup_steps=min(5, config.steps // 2),
            schedule="linear",
            total_steps=config.steps + 1,
        ),
        row_length=ROW,
        num_rows=-(-5 * config.prompts_per_step // (4 * (ROW // group))),
        seed=config.seed,
        eval_every=max(config.steps // 5, 1),
        eval_prompts=EVAL,
        checkpoint_every=config.steps,
        keep=1,
    )
    begin, cpu = time.perf_counter(), time.process_time()
    result = ra.fit(
        run,
        decoder=ra.Decoder(POLICY),
        params=policy,
        prompts=sums.problems("policy"),
        eval_prompts=sums.problems("held-out"),
        reward=signed,
        decode=sums.decode,
        judge=judge,
        algorithm=dataclasses.replace(ra.ALGORITHMS[config.algorithm], kl_coef=config.kl_coef),
    )
    rows = read_metrics(folder / "metrics.jsonl")
    found = {
        "experiment": "gprs_reward_quality",
        **dataclasses.asdict(config),
        "reward_model_accuracy": quality,
        "accuracy": {str(step): value for step, value in result.accuracy.items()},
        "accuracy_before": result.accuracy[0],
        "accuracy_after": result.accuracy[config.steps],
        "kl": next((row["kl"] for row in reversed(rows) if "kl" in row), None),
        "new_ties": judge and judge.new_ties,
        "curve_sha256": fingerprint([np.array([row.get("loss", 0.0), row.get("grad_norm", 0.0)]) for row in rows]),
        "params_sha256": fingerprint(result.state.params),
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    write_atomic(done, json.dumps(found))
    return found


def grid(config: GprsRewardQuality) -> list[GprsRewardQuality]:
    """The runs of a sweep: one seed after the other, so that it may be ended early."""
    change = functools.partial(dataclasses.replace, config, sweep=False)
    runs = [
        change(seed=seed, reward=reward, algorithm=algorithm)
        for seed in range(config.seeds)
        for reward in REWARDS
        for algorithm in ALGORITHMS
    ]
    distorted = [change(distortion=d, algorithm=a) for d in DISTORTIONS if d != "none" for a in ("gprs", "grpo")]
    by_rule = [change(seed=seed, reward="rule", algorithm=a) for seed in range(config.seeds) for a in BY_RULE]
    return [*runs[: len(runs) // config.seeds], *distorted, *runs[len(runs) // config.seeds :], *by_rule]


def write_page(config: GprsRewardQuality, results: Sequence[dict]) -> Path:
    """Curves and final accuracies by reward model, then by distortion."""
    quality = {
        name: np.mean(
            [r["reward_model_accuracy"] for r in results if r["reward"] == name and r["distortion"] == "none"]
        )
        for name in REWARDS
    }
    groups = {f"{name}: {value:.1%} of held-out pairs right": {"reward": name} for name, value in quality.items()}
    groups["by rule: +1 or -1"] = {"reward": "rule"}
    groups |= {f"good, rewards {name}": {"distortion": name} for name in DISTORTIONS if name != "none"}
    shown = {}
    for title, which in groups.items():
        chosen = [r for r in results if all(r[key] == value for key, value in {"distortion": "none", **which}.items())]
        shown[title] = {
            name: [run_folder(config, r) for r in chosen if r["algorithm"] == name]
            for name in (*ALGORITHMS, "reinforce_pp")
            if any(r["algorithm"] == name for r in chosen)
        }
    note = f"Held-out accuracy by a verifier, of policies that learnt from a reward model alone; {config.steps} steps."
    return write_comparison(config.folder, "GPRS and the quality of rewards", shown, note=note)


def run_folder(config: GprsRewardQuality, settings: Mapping) -> Path:
    """Where a run lies."""
    name = f"{settings['algorithm']}-{settings['reward']}"
    if settings["distortion"] != "none":
        name += f"-{settings['distortion']}"
    return Path(config.folder, f"seed{settings['seed']}", name)


def main(config: GprsRewardQuality) -> dict:
    """One run, or all of them."""
    if not config.sweep:
        found = one_run(config)
        print(f"held-out accuracy {found['accuracy_before']:.1%} -> {found['accuracy_after']:.1%}", file=sys.stderr)
        return found
    # Runs compile the same programs, each anew without this.
    jax.config.update("jax_compilation_cache_dir", str(Path(config.folder, "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    runs = grid(config)
    results = []
    for number, run in enumerate(runs, start=1):
        results.append(one_run(run))
        last = results[-1]
        print(
            f"run {number}/{len(runs)}: {run.algorithm} {run.reward} {run.distortion} seed {run.seed}: "
            f"{last['accuracy_after']:.1%} in {last['seconds']} s",
            file=sys.stderr,
            flush=True,
        )
    write_atomic(Path(config.folder, "results.json"), json.dumps(results, indent=1))
    write_page(config, results)
    return {"experiment": "gprs_reward_quality", "runs": len(results), "folder": config.folder}


if __name__ == "__main__":
    flags = tyro.cli(GprsRewardQuality)
    if flags.preset == "paper":
        plan = "gprs_math.toml" if flags.reward == "rule" else "gprs_tldr.toml"
        sys.exit(plan_paper(Path(__file__).parent / "plans" / plan, flags.topology))
    print(json.dumps(main(with_preset(flags, PRESETS))))
