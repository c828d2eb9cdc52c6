"""DDXPlus: 49 diseases with ICD-10 codes, questions, priors and P(evidence | disease), as arrays to ask about.

    world = read_ddxplus(folder)
    cases = world.sample(1000, seed=0)                          # one complaint known, the rest to ask
    posterior = world.posterior()

Fansi Tchango et al. 2022 (arXiv 2205.09148), CC BY 4.0; the three files lie in mila-iqia/Casande-RL and are read by
path. Patients are drawn from the priors and, evidence by evidence, from P(evidence | disease): the files hold no
dependence beyond the disease, so the naive-Bayes posterior is exact here.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlalign.clinical.inquiry import Cases, Rules, columns_of, panels_of, told_tests
from rlalign.types import Array

FILES = ("release_conditions.json", "release_evidences.json", "ddxplus_bed_stats_4.json")
LEAST = 1e-6  # probability of an answer that a disease never has


@dataclasses.dataclass(frozen=True)
class DdxPlus:
    """The diseases and questions.

    Attributes:
      diseases: English names, C of them.
      icd: their codes, as the files have them in capitals.
      questions: English texts, K of them.
      answers: of each of the Q columns, (question's place, the answer's value).
      first: i32[K], the first column of each question; its last one is before the next.
      prior: f64[C].
      table: f64[C, Q], P(answer | disease); each question's columns add up to 1.
      asks: b[K], whether a question may be a first complaint: one answered by yes or no.
      horizon: questions until a diagnosis is due.
    """

    diseases: tuple[str, ...]
    icd: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[tuple[int, str], ...]
    first: np.ndarray
    prior: np.ndarray
    table: np.ndarray
    asks: np.ndarray
    horizon: int = 10

    @property
    def rules(self) -> Rules:
        """One question an action."""
        members = panels_of([[k] for k in range(len(self.questions))])
        return Rules(members, len(self.answers), self.horizon)

    def sample(self, count: int, seed: int) -> Cases:
        """Patients, each with one complaint that is known from the start.

        The complaint is any evidence of yes or no that is present, each as likely as the other. `given` is 1: a first
        complaint is all there is.

        Args:
          count: > 0.
          seed: of the draw; the first patients of a longer draw are others.
        """
        rng = np.random.default_rng(seed)
        disease = rng.choice(len(self.prior), count, p=self.prior)
        ends = np.append(self.first[1:], len(self.answers))
        column = np.zeros((count, len(self.first)), np.int32)
        for k, (start, stop) in enumerate(zip(self.first, ends, strict=True)):
            edge = np.cumsum(self.table[disease, start:stop], axis=1)
            draw = rng.random((count, 1)) * edge[:, -1:]
            column[:, k] = start + np.minimum((draw >= edge).sum(axis=1), stop - start - 1)
        present = (column == self.first + 1) & self.asks
        score = np.where(present, rng.random(present.shape), -1)
        told = np.zeros(column.shape, bool)
        told[np.arange(count), score.argmax(axis=1)] = score.max(axis=1) > 0
        gold = disease[:, None] == np.arange(len(self.prior))
        every = np.ones(column.shape, bool)
        return Cases(np.ones((count, 1), np.float32), column, every, told, gold, np.zeros(count, np.int32))

    def posterior(self) -> "NaiveBayes":
        """P(disease | answers), exact for patients of `sample`."""
        log = np.log(self.table).astype(np.float32)
        news = np.append(log.T, np.zeros((1, len(log)), np.float32), axis=0)
        question = np.array([place for place, _ in self.answers], np.int32)
        return NaiveBayes(np.log(self.prior).astype(np.float32), news, self.table.astype(np.float32), question)


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveBayes:
    """A rlalign.clinical.inquiry.Posterior over independent answers; its state is f32[N, C], logs up to a constant.

        log P(c | answers) = log P(c) + sum_k log P(answer_k | c) + constant

    Attributes:
      prior: f32[C], logs.
      news: f32[Q + 1, C], log P(answer | c); the last row is no news.
      table: f32[C, Q], P(answer | c).
      question: i32[Q], that of each column.
    """

    prior: np.ndarray
    news: np.ndarray
    table: np.ndarray
    question: np.ndarray

    def start(self, cases: Cases) -> jax.Array:
        """The priors, and what is told from the start."""
        prior = jnp.broadcast_to(jnp.asarray(self.prior), (len(cases.column), len(self.prior)))
        return self.learn(prior, cases, told_tests(cases))

    def learn(self, state: jax.Array, cases: Cases, tests: Array) -> jax.Array:
        """Adds the logs of the answers."""
        return state + jnp.sum(jnp.asarray(self.news)[columns_of(cases, tests)], axis=1)  # -1: no news

    def probabilities(self, state: jax.Array) -> jax.Array:
        """f32[N, C]."""
        return jax.nn.softmax(state, axis=1)

    def gain(self, state: jax.Array, cases: Cases) -> np.ndarray:
        """I(disease; answer) = H(answer) - sum_c P(c) H(answer | c), nats."""
        count = int(self.question[-1]) + 1
        return np.asarray(_gain(self.probabilities(state), self.table, self.question, count))


@functools.partial(jax.jit, static_argnums=3)
def _gain(p: Array, table: Array, question: Array, count: int) -> jax.Array:
    entropy = lambda x: -x * jnp.log(jnp.maximum(x, 1e-30))
    return jax.ops.segment_sum((entropy(p @ table) - p @ entropy(table)).T, question, num_segments=count).T


def read_ddxplus(folder: str | Path, *, questions: Literal["binary", "all"] = "binary", horizon: int = 10) -> DdxPlus:
    """Read the three FILES.

    Args:
      folder: where they lie.
      questions: "binary" asks those of yes and no, 208; "all" also the 15 with several answers.
      horizon: questions until a diagnosis is due.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: a disease of one file that another lacks.
    """
    conditions, evidences, stats = (json.loads(Path(folder, name).read_text(encoding="utf-8")) for name in FILES)
    if set(conditions) != set(stats):
        missing = sorted(set(conditions) ^ set(stats))[0]
        raise ValueError(f"{FILES[0]} and {FILES[2]} differ in {missing!r}: take both from one release")
    kept = {name: one for name, one in evidences.items() if questions == "all" or one["data_type"] == "B"}
    names = sorted(stats)
    answers, first, table = [], [], []
    for place, (name, one) in enumerate(kept.items()):
        values = ["0", "1"] if one["data_type"] == "B" else list(map(str, one["possible-values"]))
        first.append(len(answers))
        answers += [(place, value) for value in values]
        table.append(np.stack([_answers(stats[c]["findings"].get(name), values, one) for c in names]))
    prior = np.array([stats[c]["prior"] for c in names])
    return DdxPlus(
        tuple(conditions[c]["cond-name-eng"] for c in names),
        tuple(conditions[c]["icd10-id"].upper() for c in names),
        tuple(one["question_en"] for one in kept.values()),
        tuple(answers),
        np.array(first, np.int32),
        prior / prior.sum(),
        np.concatenate(table, axis=1),
        np.array([one["data_type"] == "B" for one in kept.values()]),
        horizon,
    )


def _answers(found: Any, values: list[str], evidence: dict) -> np.ndarray:
    """f64[V]: P(answer | disease) of one question; a question that a disease does not list has its default answer."""
    p = np.zeros(len(values))
    if evidence["data_type"] == "B":
        p[1] = found or 0.0
        p[0] = 1 - p[1]
    elif found is None:
        p[values.index(str(evidence["default_value"]))] = 1
    else:
        for value, share in found.items():
            p[values.index(value)] = share
    p = np.maximum(p, LEAST)
    return p / p.sum()
