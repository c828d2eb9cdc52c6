"""Consultations in words: a tiny transformer asks, says what each result means, and diagnoses, on embedded patients.

    python experiments/diallm_words.py                               # imitation, then GiGPO, measured before and after
    python experiments/diallm_words.py --no-restricted               # any tokens may be said
    python experiments/diallm_words.py --preset smoke                # a few steps, for the machinery

Research software; not a medical device; not for diagnosis or treatment. The language form of diallm_ehr.py, in the
manner of DiaLLM (arXiv 2506.20059), whose method is not public as code: the same patients and at most 8 tests, but
the policy reads and writes tokens. A result comes as its digits, and after each the policy says whether it is normal,
low or high, and which diagnosis it argues for. Three rewards: what a test brings (confirmation), what is said of its
result (interpretation), and the diagnosis. Answers are drawn from what is admissible alone, exactly (fit_agent's
`write`): about 75 strings where something can be asked, 125 where a result is to be read. An episode is one path of the
forest: each turn is stored once.

Measured once, seed 0 (docs/diallm_words.json; two Intel Xeon cores with other work beside, jax 0.10.2, 17 minutes, of
which 5.6 are the expert's thousand consultations and their imitation): on 128 held-out patients, sampled, imitation
finds 41 % [33, 50] of the diagnoses, asks 5.1 tests and reads results with .665 of 1; 30 updates of GiGPO raise the
return from .82 to .93, by asking 7.3 tests; diagnoses (39 % [31, 48]) and readings (.675) stay as they are. Nothing was
said that is not admissible. The expert finds 75 % with 5.0 tests, and the action head of diallm_ehr.py three quarters
too: what a tiny transformer lacks here is the diagnosis, learned from a thousand patients where the head saw 60,000.

The last line on stdout is the result as JSON.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from one_loss import objective

import rlalign as ra
from rlalign.clinical import diseases
from rlalign.clinical.consultation import CATEGORIES, Consultation
from rlalign.clinical.dialogue import (
    NOTICE,
    Abstains,
    Asks,
    Diagnoses,
    Means,
    Opens,
    Result,
    Turn,
    action,
    parse,
    read_action,
)
from rlalign.clinical.healthy import CODES
from rlalign.clinical.loinc import PANELS
from rlalign.clinical.reference import WORDS
from rlalign.envs.episodes import Episode, Episodes, play
from rlalign.envs.imitation import shown_by_expert
from rlalign.envs.prompting import transcript
from rlalign.envs.protocol import End, Observation
from rlalign.envs.worlds import Worlds
from rlalign.evaluation import share
from rlalign.io.agents import fit_agent
from rlalign.io.config import AgentConfig
from rlalign.io.experiment import earlier_result, with_preset
from rlalign.io.files import write_atomic

EOS = 0
SYMPTOMS = tuple(code.replace(".", "") for code in diseases.SYMPTOMS)
KINDS = ("asks", "means", "diagnoses", "abstains")
VOCABULARY = (
    "",
    *KINDS,
    *PANELS,
    *CODES,
    *CATEGORIES,
    *SYMPTOMS,
    *WORDS,
    *"0123456789.",
    "male",
    "female",
    "result",
    "none",
)
IDS = {word: number for number, word in enumerate(VOCABULARY)}
TRAIN, HELD_OUT = range(1, 100_000), range(1_000_000, 1_000_256)  # seeds of patients
BATCH = 64
MAX_PROMPT, MAX_ANSWER = 176, 5


@dataclasses.dataclass(frozen=True)
class DiallmWords:
    """Settings of the experiment; every field is a flag.

    Args:
      restricted: answers are drawn from what is admissible alone, in training and where it is measured.
      horizon: tests.
      warm_patients: whom the expert shows how to treat; it asks what tells most and diagnoses by Bayes.
      warm_steps: of imitation.
      steps, tasks_per_step, copies: of GiGPO: updates, patients an update, consultations of each.
      held_out: patients to measure on.
    """

    restricted: bool = True
    seed: int = 0
    preset: Literal["smoke", "laptop"] = "laptop"
    horizon: int = 8
    warm_patients: int = 1000
    warm_steps: int = 600
    warm_rate: float = 3e-3
    steps: int = 30
    tasks_per_step: int = 8
    copies: int = 8
    learning_rate: float = 3e-4
    held_out: int = 128
    folder: str = "runs/diallm-words"


PRESETS = {
    "smoke": {
        "horizon": 2,
        "warm_patients": 4,
        "warm_steps": 4,
        "steps": 2,
        "tasks_per_step": 2,
        "copies": 2,
        "held_out": 4,
        "folder": "runs/diallm-words-smoke",
    },
    "laptop": {},
}


def words_of(turn: Turn) -> list[str]:
    """A turn as words of VOCABULARY; numbers as digits."""
    match turn:
        case Opens(age, sex, symptoms, _):
            return [str(sex), *str(age), *symptoms]
        case Result(code, value):
            return ["result", code, *(["none"] if value is None else f"{value:.10g}")]
        case Asks(name):
            return ["asks", name]
        case Means(code, word, towards):
            return ["means", code, word, *towards]
        case Diagnoses(codes):
            return ["diagnoses", *codes]
        case Abstains():
            return ["abstains"]
    raise ValueError(f"{type(turn).__name__} is no turn of a consultation")


def encode(turns: list[Turn]) -> np.ndarray:
    """i32 ids of turns."""
    return np.array([IDS[word] for turn in turns for word in words_of(turn)], np.int32)


def write(text: str) -> np.ndarray:
    """i32 ids of an action, without the end token."""
    return encode(list(parse(text)))


def decode(ids: np.ndarray) -> str:
    """The action that ids stand for; what stands for none is shown as it is."""
    match [VOCABULARY[i] for i in map(int, ids) if i < len(VOCABULARY)]:
        case ["asks", name]:
            return action(Asks(name))
        case ["means", code, word, *towards]:
            return action(Means(code, word, tuple(towards)))
        case ["diagnoses", *codes]:
            return action(Diagnoses(tuple(codes)))
        case ["abstains"]:
            return action(Abstains())
        case other:
            return " ".join(other)


def begin(seen: Observation) -> np.ndarray:
    """The first prompt."""
    return encode(list(parse(seen.text)))


def more(seen: Observation, ended: bool) -> np.ndarray:
    """What stands between an answer and the next: the results it brought."""
    turns = [turn for line in seen.text.splitlines() if (turn := read_action(line)) is not None]
    return np.concatenate([np.array([EOS][ended:], np.int32), encode(turns)])


FORM = transcript(begin, more)


def as_said(answer: str, _) -> tuple[str, bool | None]:
    """The whole answer is the action; the environment says whether it is valid."""
    return answer, None


def decoder() -> ra.Decoder:
    """0.2 million parameters."""
    return ra.Decoder(
        ra.ModelConfig(
            vocab_size=len(VOCABULARY),
            width=64,
            layers=3,
            heads=4,
            kv_heads=4,
            head_width=16,
            mlp_width=256,
            max_positions=MAX_PROMPT + MAX_ANSWER,
            tied_head=True,
            qk_norm=True,
        )
    )


def cold_start(config: DiallmWords):
    """The policy after imitating the expert's actions."""
    policy = decoder().init(config.seed, deviation="fan_in")
    room = Consultation(config.horizon, panels=False)
    spell = lambda text: np.append(write(text), np.int32(EOS))
    examples = shown_by_expert(room, TRAIN[: config.warm_patients], form=FORM, encode=spell)
    steps = config.warm_steps
    run = ra.OfflineConfig(
        folder=f"{config.folder}/seed{config.seed}/start",
        algorithm="sft",
        examples_per_step=BATCH,
        optimizer=ra.OptimizerConfig(
            learning_rate=config.warm_rate,
            warmup_steps=min(20, steps // 2),
            schedule="cosine",
            total_steps=steps + 1,
        ),
        row_length=512,
        epochs=steps * BATCH / len(examples),
        seed=config.seed,
        eval_every=10 * steps,
        checkpoint_every=steps,
        keep=1,
    )
    return ra.fit_offline(run, decoder=decoder(), params=policy, examples=examples).state.params


def episodes(config: DiallmWords) -> Episodes:
    """How consultations are played: an order and its meaning are two turns."""
    sampling = ra.SampleConfig(1, MAX_ANSWER, eos_ids=(EOS,))
    return Episodes(config.copies, 2 * config.horizon + 2, MAX_PROMPT, sampling)


def figures(found: list[Episode]) -> dict:
    """What became of consultations, one a patient."""
    turns = [turn for episode in found for turn in episode.turns]
    read = [turn for turn in turns if isinstance(read_action(turn.action), Means) and turn.valid]
    right = [turn.reward / 0.1 for turn in read]  # half the word, half the direction
    return {
        "found": share(np.array([float(episode.end is End.WON) for episode in found])),
        "return": float(np.mean([episode.reward for episode in found])),
        "tests": float(np.mean([sum(isinstance(read_action(t.action), Asks) for t in e.turns) for e in found])),
        "interpretation": float(np.mean(right)) if right else None,
        "invalid": float(np.mean([not turn.valid for turn in turns])),
    }


def measured(config: DiallmWords, params, worlds: Worlds) -> dict:
    """Held-out patients, one consultation each, sampled."""
    one, found = dataclasses.replace(episodes(config), copies=1), []
    how = {"form": FORM, "parse": as_said, "decode": decode, "write": write if config.restricted else None}
    for first in range(0, config.held_out, worlds.copies):
        tasks = HELD_OUT[: config.held_out][first : first + worlds.copies]
        found += play(decoder(), params, worlds, tasks, config=one, seed=1 << 20, step=0, **how)
    return figures(found)


def expert(config: DiallmWords) -> dict:
    """The same patients by information gain and Bayes."""
    room, won, tests = Consultation(config.horizon, panels=False), [], []
    for task in HELD_OUT[: config.held_out]:
        room.reset(task)
        asked = 0
        while (said := room.expert()) is not None:
            asked, done = asked + said.startswith('["asks"'), room.step(said)
        won.append(float(done.info.won))
        tests.append(asked)
    return {"found": share(np.array(won)), "tests": float(np.mean(tests))}


def one_run(config: DiallmWords) -> dict:
    """Imitate, reinforce, measure; a result that exists is taken from the folder."""
    folder = Path(config.folder, f"seed{config.seed}", "restricted" if config.restricted else "free")
    if (found := earlier_result(folder / "result.json", config)) is not None:
        return found
    start, cpu = time.perf_counter(), time.process_time()
    params, seconds = cold_start(config), {}
    seconds["imitation"] = round(time.perf_counter() - start, 1)
    copies = max(config.tasks_per_step * config.copies, 2)
    run = AgentConfig(
        folder=str(folder),
        algorithm="gigpo",
        steps=config.steps,
        tasks_per_step=config.tasks_per_step,
        episodes=episodes(config),
        optimizer=ra.OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=min(5, config.steps // 2)),
        row_length=512,
        seed=config.seed,
        eval_every=max(config.steps // 3, 1),
        eval_tasks=min(32, config.held_out),
        checkpoint_every=config.steps,
        keep=1,
    )
    arguments = {"horizon": config.horizon, "panels": False}
    with Worlds(Consultation, copies=copies, arguments=arguments) as worlds:
        before = measured(config, params, worlds)
        print(f"after imitation: {before}", file=sys.stderr, flush=True)
        result = fit_agent(
            run,
            decoder=decoder(),
            params=params,
            worlds=worlds,
            tasks=TRAIN[config.warm_patients :],
            eval_tasks=HELD_OUT,
            form=FORM,
            parse=as_said,
            decode=decode,
            write=write if config.restricted else None,
            algorithm=objective("gigpo", scale="none", kl_coef=0.0),
        )
        after = measured(config, result.state.params, worlds)
    seconds["all"] = round(time.perf_counter() - start, 1)
    found = {
        "experiment": "diallm_words",
        **dataclasses.asdict(config),
        "imitation": before,
        "trained": after,
        "expert": expert(config),
        "seconds_of": seconds,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    write_atomic(folder / "result.json", json.dumps(found))
    return found


if __name__ == "__main__":
    print(NOTICE, flush=True)
    print(json.dumps(one_run(with_preset(tyro.cli(DiallmWords), PRESETS))))
