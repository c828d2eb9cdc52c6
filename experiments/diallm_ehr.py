"""Which test next, and which diagnosis: a small policy learns both on embedded patients whose posterior is known.

    python experiments/diallm_ehr.py                                 # one run: warm-up, reinforcement, all baselines
    python experiments/diallm_ehr.py --variant no-class-weights --seed 1
    python experiments/diallm_ehr.py --sweep                         # all variants and seeds
    python experiments/diallm_ehr.py --preset smoke                  # a few steps, for the machinery

Research software; not a medical device; not for diagnosis or treatment. In the manner of DiaLLM (arXiv 2506.20059),
whose method's code is not public: patients are drawn from tables, 24 diseases, 50 tests, and a policy sees age, sex,
symptoms and the results that it asked for, at most 8 tests. (--panels makes the 12 panels actions too; 8 of them tell
nearly everything, and there is little to choose.) It first imitates who asks what tells most, then learns from rewards.
Everything is measured on patients that no part of this has seen, beside who asks at random, what is ordered most, or
what tells most, each with the exact posterior, and the posterior after every test: the ceiling.

Variants take one part away: reject sampling, the confirmation reward, class weights; "std" divides advantages by their
group's deviation, which cancels class weights in the choice of the diagnosis (in that of tests, whose returns hold
other rewards too, only in part), so "std-no-class-weights" should hardly differ from it. "ehr-match" compares with the
record in place of the potential, weighed .05 for .3, as its sums are larger; "dialogues" has no reinforcement: in 800
steps it imitates those of its own whole dialogues whose reward is above 0. All begin with the same imitation, in which
known tests are rejected.

Measured with --sweep, 3 seeds, two Intel Xeon cores with other work beside, jax 0.10.2 (docs/diallm_ehr.json; README
has the table): after 8 tests the policy finds .747 of the diagnoses, 95 % of information gain's .787; ceiling .828,
frequency .622, random .604. Settings were chosen on seed 0 and these held-out patients.

What each run did with the held-out patients is in FOLDER/seed0/full/workups.jsonl, and on the page beside it. The last
line on stdout is the result as JSON; with --sweep FOLDER/results.json has all, with intervals over seeds.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlalign.clinical import baselines, cohort
from rlalign.clinical.asker import network
from rlalign.clinical.dialogue import NOTICE
from rlalign.clinical.generator import abnormal_yield, cases_of, draw_patients, matches, rules
from rlalign.clinical.imitation import dialogues_above, warm_up
from rlalign.clinical.inquiry import Rules, take
from rlalign.clinical.posterior import Exact
from rlalign.clinical.scores import class_weights
from rlalign.clinical.training import Training, init, reinforce
from rlalign.clinical.trial import report, trial
from rlalign.evaluation import share
from rlalign.io.charts import curve_svg
from rlalign.io.clinical_report import write_clinical_report
from rlalign.io.experiment import earlier_result, over_seeds, with_preset
from rlalign.io.files import write_atomic
from rlalign.io.workups import write_workups

HELD_OUT = 1_000_003  # the seed of patients that nothing learns from
BASELINES = "baselines.jsonl"  # their workups, in the folder
Variant = Literal[
    "full",
    "no-reject-sampling",
    "no-confirmation",
    "ehr-match",
    "no-class-weights",
    "std",
    "std-no-class-weights",
    "dialogues",
]
VARIANTS: dict[str, dict] = {  # fields of Training; the rest is by the name, in one_run
    "full": {},
    "no-reject-sampling": {"reject": False},
    "no-confirmation": {"confirmation": 0.0},
    "ehr-match": {"confirmation": 0.05},
    "no-class-weights": {},
    "std": {"advantage": "std"},
    "std-no-class-weights": {"advantage": "std"},
    "dialogues": {},
}


@dataclasses.dataclass(frozen=True)
class DiallmEhr:
    """Settings of the experiment; every field is a flag.

    Args:
      variant: what is taken away; see the module.
      patients: to learn from.
      shown: of them, whose tests the expert chooses for the warm-up.
      held_out: to measure on.
      orders: the horizon.
      panels: whether panels are actions too.
      steps, warm_up_steps, learning_rate, confirmation, cost: of rlalign.clinical.training.Training.
      width: of the network.
      sweep: all variants and `seeds`.
    """

    variant: Variant = "full"
    seed: int = 0
    preset: Literal["smoke", "laptop"] = "laptop"
    patients: int = 60_000
    shown: int = 3_000
    held_out: int = 2_000
    orders: int = 8
    panels: bool = False
    warm_up_steps: int = 800
    steps: int = 300
    learning_rate: float = 2e-4
    confirmation: float = 0.3
    cost: float = 0.01
    width: int = 128
    sweep: bool = False
    seeds: int = 3
    folder: str = "runs/diallm-ehr"


PRESETS = {
    "smoke": {
        "patients": 256,
        "shown": 48,
        "held_out": 48,
        "orders": 2,
        "warm_up_steps": 4,
        "steps": 2,
        "folder": "runs/diallm-ehr-smoke",
    },
    "laptop": {},
}


@functools.cache
def world_of(orders: int, panels: bool) -> tuple[Rules, Exact]:
    """What may be asked, and the exact posterior."""
    by = rules(orders, panels=panels)
    return by, Exact(by)


def measured(ranked: np.ndarray, gold: np.ndarray) -> dict:
    """Recall@1 by budget with 95 % intervals, and the report after the last order, of lists i32[N, T, C]."""
    hit = np.take_along_axis(gold[:, None, :], ranked[:, :, :1], axis=2)[:, :, 0]
    return {"curve": [share(column.astype(float)) for column in hit.T], **report(ranked[:, -1], gold)}


def baseline(config: DiallmEhr) -> dict[str, dict]:
    """Who asks otherwise, and the ceiling; on the held-out patients. Writes their workups."""
    by, world = world_of(config.orders, config.panels)
    people = cohort.embedded(draw_patients(config.held_out, HELD_OUT), by)
    cases = people.cases
    ordered = draw_patients(config.patients, config.seed).ordered
    often = np.array([ordered[:, row[row >= 0]].all(axis=1).mean() for row in by.members])
    prior = np.asarray(cases_of(draw_patients(config.patients, config.seed)).gold).mean(axis=0)
    same = np.broadcast_to(prior, (config.held_out, 1, len(prior)))
    out = {"prior": measured(baselines.ranking(same), cases.gold)}
    workups = cohort.workups(people, "prior", baselines.ranking(same[:, 0]), same[:, 0])
    for asker in baselines.ASKERS:
        frequency = often if asker == "frequency" else None
        played = baselines.play(by, cases, world, asker, seed=config.seed, frequency=frequency)
        out[asker] = measured(baselines.ranking(played.posterior), cases.gold)
        out[asker] |= report(baselines.ranking(played.posterior[:, -1]), cases.gold, played.posterior[:, -1])
        out[asker]["nats"] = [nats(p, cases.gold) for p in np.swapaxes(played.posterior, 0, 1)]
        out[asker]["abnormal"] = abnormal_yield(cases, played.action, by)
        workups += cohort.played(people, asker, played)
    every = baselines.ceiling(cases, world)
    out["ceiling"] = measured(baselines.ranking(every)[:, None], cases.gold)
    out["ceiling"] |= report(baselines.ranking(every), cases.gold, every) | {"nats": [nats(every, cases.gold)]}
    workups += cohort.workups(people, "every test", baselines.ranking(every), every)
    write_workups(config.folder, workups, name=BASELINES)
    return out


def nats(p: np.ndarray, gold: np.ndarray) -> float:
    """The mean of -ln p of the diagnosis."""
    return float(-np.log(np.maximum(p[gold], 1e-10)).mean())


def training(config: DiallmEhr) -> Training:
    """Settings of the variant."""
    names = "steps", "warm_up_steps", "learning_rate", "confirmation", "cost"
    own: dict[str, Any] = {name: getattr(config, name) for name in names}
    small = {"patients": 4, "samples": 4} if config.preset == "smoke" else {}
    own |= small | VARIANTS[config.variant] | {"seed": config.seed}
    return Training(**own)


@functools.cache
def start(config: DiallmEhr):
    """The policy that every variant begins with: imitation of who asks what tells most."""
    by, world = world_of(config.orders, config.panels)
    cases = cases_of(draw_patients(config.patients, config.seed))
    shown = take(cases, slice(0, config.shown))
    expert = baselines.play(by, shown, world, "information gain", seed=config.seed)
    asker, how = network(by, cases, config.width), training(config)
    return warm_up(how, asker, by, shown, expert.action, init(how, asker, cases), pool=cases)[0]


def one_run(config: DiallmEhr, folder: Path) -> dict:
    """Warm up, reinforce, measure; a result that exists is taken from the folder."""
    done = folder / f"seed{config.seed}" / f"{config.variant}.json"
    if (found := earlier_result(done, config, ignore=("sweep", "seeds"))) is not None:
        return found
    done.parent.mkdir(parents=True, exist_ok=True)
    begin, cpu = time.perf_counter(), time.process_time()
    (by, world), how = world_of(config.orders, config.panels), training(config)
    patients = draw_patients(config.patients, config.seed)
    cases = cases_of(patients)
    people = cohort.embedded(draw_patients(config.held_out, HELD_OUT), by)
    held_out, workups = people.cases, []
    asker = network(by, cases, config.width)
    begun = start(dataclasses.replace(config, variant="full", sweep=False))
    count = jnp.asarray(cases.gold.sum(axis=0))
    weight = class_weights(count, power=0.0 if "no-class-weights" in config.variant else 0.5)
    if config.variant == "dialogues":
        best, action = dialogues_above(0.0, how, asker, by, cases, begun, weight=weight, posterior=world)
        params, curve = warm_up(how, asker, by, best, action, begun, pool=cases)
    else:
        match = matches(patients) if config.variant == "ehr-match" else None
        params, curve = reinforce(how, asker, by, cases, begun, weight=weight, posterior=world, match=match)
    out = {"experiment": "diallm_ehr", **dataclasses.asdict(config)}
    for name, policy in (("imitation", begun), ("trained", params)):
        tried = trial(asker, policy, by, held_out, reject=how.reject)
        out[name] = measured(tried.ranked, held_out.gold) | {"own": tried.own}
        out[name] |= report(tried.ranked[:, -1], held_out.gold, tried.belief[:, -1])
        out[name]["abnormal"] = abnormal_yield(held_out, tried.action[:, : config.orders], by)
        workups = cohort.tried(people, name, tried) + workups  # the page is about the last one
    out["learning"] = {
        name: np.round(values[:: max(len(values) // 20, 1)], 4).tolist() for name, values in curve.items()
    }
    out |= {"seconds": round(time.perf_counter() - begin, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    out |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__}
    write_atomic(done, json.dumps(out))
    others = folder / BASELINES
    written = write_workups(done.with_suffix(""), workups)
    write_clinical_report(written, beside=others if others.is_file() else None)
    return out


def beside(config: DiallmEhr, folder: Path) -> dict[str, dict]:
    """The baselines, found once a folder."""
    done, config = folder / "baselines.json", dataclasses.replace(config, seed=0)
    matter = "patients", "held_out", "orders", "panels"
    others = tuple(field.name for field in dataclasses.fields(config) if field.name not in matter)
    if (found := earlier_result(done, config, ignore=others)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(json.dumps({name: getattr(config, name) for name in matter} | {"askers": baseline(config)}))
        write_atomic(done, json.dumps(found))
    return found["askers"]


def shown_as(name: str, of: dict) -> str:
    """A line of the table."""
    value, low, high = of["curve"][-1]
    keys = "recall@5", "macro recall@1", "rare recall@1"
    half = of["curve"][len(of["curve"]) // 2][0]
    return f"{name:30s} {half:.3f} {value:.3f} [{low:.3f}, {high:.3f}] " + " ".join(f"{of[key]:.3f}" for key in keys)


def main(config: DiallmEhr) -> dict:
    """One run, or all of them, and the baselines."""
    print(NOTICE, flush=True)
    folder = Path(config.folder)
    others = beside(config, folder)
    half = config.orders // 2
    print(f"{'':30s} R@1 after {half} and {config.orders} orders, R@5, macro R@1, that of rare ones", file=sys.stderr)
    for name, of in others.items():
        print(shown_as(name, of), file=sys.stderr, flush=True)
    told = others["information gain"]["recall@1"]
    if not config.sweep:
        found = one_run(config, folder)
        print(shown_as(f"{config.variant}, trained", found["trained"]), file=sys.stderr)
        return found | {"baselines": others, "of_information_gain": found["trained"]["recall@1"] / told}
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for seed in range(config.seeds):
        for variant in VARIANTS:
            runs[variant].append(one_run(dataclasses.replace(config, sweep=False, seed=seed, variant=variant), folder))
            print(shown_as(f"seed {seed} {variant}", runs[variant][-1]["trained"]), file=sys.stderr, flush=True)
    keys = "recall@1", "recall@5", "macro recall@1", "rare recall@1", "calibration error"
    table = {
        variant: {key: over_seeds([one["trained"][key] for one in each]) for key in keys}
        for variant, each in runs.items()
    }
    about = lambda one, name: {key: one[name][key] for key in keys} | one[name]["own"]
    each = [
        {key: one[key] for key in ("variant", "seed", "seconds", "cpu_seconds")}
        | {name: about(one, name) for name in ("imitation", "trained")}
        for variant in runs.values()
        for one in variant
    ]
    result = {
        "experiment": "diallm_ehr",
        "variants": table,
        "runs": each,
        "of_information_gain": float(np.mean([one["trained"]["recall@1"] for one in runs["full"]])) / told,
        "baselines": others,
        "folder": config.folder,
    }
    write_atomic(folder / "results.json", json.dumps(result, indent=1))
    curve = lambda of: [{"step": tests, "recall": value[0]} for tests, value in enumerate(of["curve"])]
    shown = {name: [curve(others[name])] for name in baselines.ASKERS}
    shown |= {name: [curve(one[name]) for one in runs["full"]] for name in ("imitation", "trained")}
    title = "Diagnoses found, by tests asked"
    write_atomic(folder / "curves.svg", curve_svg(shown, "recall", title=title, unit="%", axis="tests"))
    return result


if __name__ == "__main__":
    print(json.dumps(main(with_preset(tyro.cli(DiallmEhr), PRESETS))))
