"""Ten questions and a diagnosis of 49: a small policy learns to ask from DDXPlus's statistics.

    python experiments/diallm_ddxplus.py --data FOLDER               # three files of DDXPlus; one run and its baselines
    python experiments/diallm_ddxplus.py --data FOLDER --seeds 3
    python experiments/diallm_ddxplus.py --data FOLDER --preset smoke

Research software; not a medical device; not for diagnosis or treatment. DDXPlus (Fansi Tchango et al. 2022, CC BY 4.0)
has 49 diseases and 223 questions, 208 of them of yes and no, which are asked here; its files are in
mila-iqia/Casande-RL: release_conditions.json, release_evidences.json and ddxplus_bed_stats_4.json. Patients are drawn
from its priors and P(evidence | disease), and begin with one complaint. The policy imitates who asks what tells most,
then learns from rewards, among them the confirmation reward, whose posterior is here the policy's own belief.

Measured on 2,000 held-out patients, top-1 after the complaint, 5 and 10 questions (docs/diallm_ddxplus.json, two Intel
Xeon cores, jax 0.10.2): trained .417, .840, .936 (means of three seeds; ± .011 for the patients drawn; 176 to 199 s a
run, warm-up and measuring included); imitation alone .430, .840, .933; information gain .419, .842, .942; what is
answered most with yes .419, .646, .806; random .419, .486, .531; every question .991. What reinforcement adds to the
imitation cannot be told from noise: the expert it imitates is nearly as good as can be.

What each run did with the held-out patients is in FOLDER/seed0/workups.jsonl, and on the page beside it. The last line
on stdout is the result as JSON.
"""

import dataclasses
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
from rlalign.clinical.ddxplus import DdxPlus, read_ddxplus
from rlalign.clinical.dialogue import NOTICE
from rlalign.clinical.imitation import warm_up
from rlalign.clinical.inquiry import take
from rlalign.clinical.scores import class_weights
from rlalign.clinical.training import Training, init, reinforce
from rlalign.clinical.trial import report, trial
from rlalign.evaluation import share
from rlalign.io.clinical_report import write_clinical_report
from rlalign.io.experiment import earlier_result, over_seeds, with_preset
from rlalign.io.files import write_atomic
from rlalign.io.workups import write_workups

HELD_OUT = 1_000_003  # the seed of patients that nothing learns from
BASELINES = "baselines.jsonl"  # their workups, in the folder


@dataclasses.dataclass(frozen=True)
class DiallmDdxplus:
    """Settings of the experiment; every field is a flag.

    Args:
      data: the folder with DDXPlus's files.
      questions: "binary" asks those of yes and no; "all" also the 15 with several answers.
      patients: to learn from.
      shown: of them, whose questions the expert chooses for the warm-up.
      held_out: to measure on.
      horizon: questions.
      class_weights: lift rare diseases.
      steps, warm_up_steps, learning_rate, confirmation: of rlalign.clinical.training.Training.
      width: of the network.
      seeds: runs, from `seed` on.
    """

    data: str
    seed: int = 0
    preset: Literal["smoke", "laptop"] = "laptop"
    questions: Literal["binary", "all"] = "binary"
    patients: int = 20_000
    shown: int = 4_000
    held_out: int = 2_000
    horizon: int = 10
    class_weights: bool = True
    warm_up_steps: int = 600
    steps: int = 200
    learning_rate: float = 1e-4
    confirmation: float = 0.3
    width: int = 128
    seeds: int = 1
    folder: str = "runs/diallm-ddxplus"


PRESETS = {
    "smoke": {
        "patients": 256,
        "shown": 64,
        "held_out": 64,
        "horizon": 3,
        "warm_up_steps": 4,
        "steps": 2,
        "folder": "runs/diallm-ddxplus-smoke",
    },
    "laptop": {},
}


def top_1(ranked: np.ndarray, gold: np.ndarray) -> list:
    """Of lists i32[N, T, C], how often the first is right after each question, with its 95 % interval."""
    hit = np.take_along_axis(gold[:, None, :], ranked[:, :, :1], axis=2)[:, :, 0]
    return [share(column.astype(float)) for column in hit.T]


def people_of(world: DdxPlus, count: int) -> cohort.Cohort:
    """The held-out patients; of J17 and J18, which are one disease here, the first code stands."""
    codes = [code.split(",")[0] for code in world.icd]
    questions = [f"question {k}" for k in range(len(world.questions))]
    return cohort.Cohort(world.sample(count, HELD_OUT), world.rules, codes, questions)


def beside(config: DiallmDdxplus, world: DdxPlus) -> dict[str, dict]:
    """Who asks otherwise, each with the exact posterior, and every question's answer. Writes their workups."""
    people, posterior = people_of(world, config.held_out), world.posterior()
    cases, workups = people.cases, []
    often = np.array([world.table[:, first + 1] @ world.prior for first in world.first])  # said yes to
    out = {}
    for asker in baselines.ASKERS:
        frequency = often if asker == "frequency" else None
        played = baselines.play(world.rules, cases, posterior, asker, seed=config.seed, frequency=frequency)
        ranked = baselines.ranking(played.posterior)
        out[asker] = {"curve": top_1(ranked, cases.gold), **report(ranked[:, -1], cases.gold, played.posterior[:, -1])}
        workups += cohort.played(people, asker, played)
    every = baselines.ceiling(cases, posterior)
    ranked = baselines.ranking(every)
    out["ceiling"] = {"curve": top_1(ranked[:, None], cases.gold), **report(ranked, cases.gold, every)}
    workups += cohort.workups(people, "every question", ranked, every)
    prior = np.tile(world.prior, (config.held_out, 1))
    ranked = baselines.ranking(prior)
    write_workups(config.folder, workups + cohort.workups(people, "prior", ranked, prior), name=BASELINES)
    return out | {"prior": {"curve": top_1(ranked[:, None], cases.gold), **report(ranked, cases.gold)}}


def one_run(config: DiallmDdxplus, world: DdxPlus) -> dict:
    """Warm up, reinforce, measure; a result that exists is taken from the folder."""
    done = Path(config.folder, f"seed{config.seed}", "result.json")
    if (found := earlier_result(done, config, ignore=("seeds", "data"))) is not None:
        return found
    done.parent.mkdir(parents=True, exist_ok=True)
    begin, cpu = time.perf_counter(), time.process_time()
    names = "steps", "warm_up_steps", "learning_rate", "confirmation", "seed"
    own: dict[str, Any] = {name: getattr(config, name) for name in names}
    own |= {"patients": 4, "samples": 4} if config.preset == "smoke" else {}
    how = Training(**own)
    cases, people = world.sample(config.patients, config.seed), people_of(world, config.held_out)
    held_out, workups = people.cases, []
    shown = take(cases, slice(0, config.shown))
    expert = baselines.play(world.rules, shown, world.posterior(), "information gain", seed=config.seed)
    asker = network(world.rules, cases, config.width)
    begun, _ = warm_up(how, asker, world.rules, shown, expert.action, init(how, asker, cases), pool=cases)
    weight = class_weights(jnp.asarray(cases.gold.sum(axis=0)), power=0.5 if config.class_weights else 0.0)
    params, curve = reinforce(how, asker, world.rules, cases, begun, weight=weight)
    out = {"experiment": "diallm_ddxplus", **dataclasses.asdict(config), "data": "DDXPlus"}
    for name, policy in (("imitation", begun), ("trained", params)):
        tried = trial(asker, policy, world.rules, held_out)
        out[name] = {"curve": top_1(tried.ranked, held_out.gold), "own": tried.own}
        out[name] |= report(tried.ranked[:, -1], held_out.gold, tried.belief[:, -1])
        workups = cohort.tried(people, name, tried) + workups  # the page is about the last one
    out["learning"] = {
        name: np.round(values[:: max(len(values) // 20, 1)], 4).tolist() for name, values in curve.items()
    }
    out |= {"seconds": round(time.perf_counter() - begin, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    out |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__}
    write_atomic(done, json.dumps(out))
    names = dict(zip([*people.codes, *people.actions], [*world.diseases, *world.questions], strict=True))
    written = write_workups(done.parent, workups)
    write_clinical_report(written, beside=Path(config.folder, BASELINES), names=names)
    return json.loads(json.dumps(out))


def main(config: DiallmDdxplus) -> dict:
    """The baselines, and a run a seed."""
    print(NOTICE, flush=True)
    world = read_ddxplus(config.data, questions=config.questions, horizon=config.horizon)
    others = beside(config, world)
    line = lambda name, of: print(f"{name:18s} " + " ".join(f"{x[0]:.3f}" for x in of["curve"]), file=sys.stderr)
    for name, of in others.items():
        line(name, of)
    runs = [one_run(dataclasses.replace(config, seed=config.seed + i), world) for i in range(config.seeds)]
    for run in runs:
        line(f"imitation, seed {run['seed']}", run["imitation"])
        line(f"trained, seed {run['seed']}", run["trained"])
    reached = over_seeds([run["trained"]["recall@1"] for run in runs])
    seconds = max(run["seconds"] for run in runs)
    result = {"experiment": "diallm_ddxplus", "top_1": reached, "seconds": seconds, "baselines": others, "runs": runs}
    write_atomic(Path(config.folder, "results.json"), json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    print(json.dumps(main(with_preset(tyro.cli(DiallmDdxplus), PRESETS))))
