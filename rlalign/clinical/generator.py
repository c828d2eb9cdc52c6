"""Embedded patients: seeded, vectorised, from tables that lie in the library. Nobody's record is behind them.

    patients = draw_patients(10_000, seed=0)                    # one disease each; posterior.py knows theirs exactly
    several = draw_patients(10_000, seed=0, several=True)       # one to three
    table = table_of(histories(1000, seed=0))                   # visits, orders and results as events of a record

    age, sex -> diseases, by how common they are and go together -> severity of each
    symptom   ~ 1 - (1 - background) prod_d (1 - chance_d);  a share of patients feels nothing
    ln result = healthy quantile(z) + sum_d severity_d shift_d robust sd,    z = loading u + sqrt(1 - loading^2) e

with a factor u a panel: a Gaussian copula whose factors take the seven nodes of Gauss and Hermite, which have the
normal's first thirteen moments, so that sums over them are exact. Results are reported at the laboratory's precision
and are missing at random. Orders are a mixture: what is routine, what fits a suspicion, what is done at random. A
suspicion is drawn from what the symptoms alone say, so orders tell nothing of the diagnosis that symptoms do not.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rlalign.clinical import diseases
from rlalign.clinical.events import BIRTH, END, FEMALE, LOINC, MALE, PERSON, START, VISIT, Event
from rlalign.clinical.healthy import (
    CODES,
    LOADINGS,
    NORMAL_CDF,
    SHORT,
    edges,
    results_at,
    robust_sd,
    rounded,
    scores_at,
)
from rlalign.clinical.inquiry import HORIZON, Cases, Rules, panels_of
from rlalign.clinical.loinc import PANELS, TESTS
from rlalign.clinical.ranges import RANGES
from rlalign.clinical.scores import ehr_match

BANDS = (18, 40, 50, 60, 70, 75, 80)  # first years of what changes with age: ranges and how common diseases are
CONTEXTS = 2 * len(BANDS)  # female, then male
SEVERITY, SEVERITY_SHARE = np.array([0.6, 1.0, 1.6]), np.array([0.4, 0.4, 0.2])
NODES, NODE_SHARE = np.polynomial.hermite_e.hermegauss(7)
NODE_SHARE = NODE_SHARE / NODE_SHARE.sum()
NO_SYMPTOMS = 0.08  # share of patients who feel nothing
MISSING = 0.06  # share of results that are not on record
MORE = (0.6, 0.3, 0.1)  # shares of one, two and three diseases where they are several
NONE, NORMAL, LOW, HIGH = range(4)  # labels of results
ROUTINE = ("blood count", "basic metabolic panel", "vital signs")
PANEL = np.array([list(PANELS).index(TESTS[code].panel) for code in CODES])  # of each test
STAYS = 0.6  # share of the variance of e that a person keeps from visit to visit
YEAR, DAY = 31_557_600, 86_400
NOW = 1_735_689_600  # 2025-01-01, by which all visits lie in the past


class Patients(NamedTuple):
    """N patients at one visit; D diseases in the order of diseases.NAMES, K tests in that of healthy.CODES.

    Attributes:
      age: i64[N], completed years.
      male: b[N].
      disease: b[N, D].
      previous: b[N, D], chronic ones that are known from before.
      symptom: b[N, S], in the order of diseases.SYMPTOMS.
      value: f64[N, K], as reported; NaN where missing.
      label: i8[N, K]: NONE where missing, else NORMAL, LOW or HIGH by ranges.py.
      ordered: b[N, K], on record; no policy sees it.
    """

    age: np.ndarray
    male: np.ndarray
    disease: np.ndarray
    previous: np.ndarray
    symptom: np.ndarray
    value: np.ndarray
    label: np.ndarray
    ordered: np.ndarray


class Tables(NamedTuple):
    """The module's tables as arrays, float64.

    Attributes:
      prior: [CONTEXTS, D], shares.
      symptom: [D, S], chance of each.
      shift: [2, K, D], of the logarithm at severity 1; female, male.
      loading: [K].
      low, high: [CONTEXTS, K], edges of what is reported as low and high.
    """

    prior: np.ndarray
    symptom: np.ndarray
    shift: np.ndarray
    loading: np.ndarray
    low: np.ndarray
    high: np.ndarray


@functools.cache
def tables() -> Tables:
    """See Tables."""
    rows = list(diseases.DISEASES.values())
    prior = np.zeros((CONTEXTS, len(rows)))
    low, high = np.zeros((2, CONTEXTS, len(CODES)))
    for context in range(CONTEXTS):
        male, year = divmod(context, len(BANDS))
        band = np.searchsorted(diseases.AGES, BANDS[year], side="right") - 1
        weight = np.array([row.common[band] * (1 if male else row.female) for row in rows])
        prior[context] = weight / weight.sum()
        for k, (code, short) in enumerate(zip(CODES, SHORT, strict=True)):
            low[context, k], high[context, k] = edges(*_bounds(code, male, BANDS[year]), short)
    leak = 1 - diseases.BACKGROUND
    chance = [[1 - leak * (1 - diseases.CHANCES[d].get(s, 0.0)) for s in diseases.SYMPTOMS] for d in diseases.NAMES]
    sizes = np.array([[robust_sd(code, male) for code in CODES] for male in (False, True)])
    moved = np.array([[row.results.get(short, 0.0) for row in rows] for short in SHORT])
    loading = np.array([LOADINGS.get(short, 0.0) for short in SHORT])
    return Tables(prior, np.array(chance), sizes[:, :, None] * moved[None], loading, low, high)


def _bounds(code: str, male: int, age: int) -> tuple[float | None, float | None]:
    """The range of a test for one sex and age: one for this sex first, then that of the narrowest ages."""
    sex = "male" if male else "female"
    fits = [row for row in RANGES if row.loinc == code and row.sex in ("", sex) and row.age[0] <= age <= row.age[1]]
    row = min(fits, key=lambda row: (row.sex == "", row.age[1] - row.age[0]))
    return row.low, row.high


def context_of(age: np.ndarray, male: np.ndarray) -> np.ndarray:
    """i64[N]: which row of tables by context is a patient's."""
    return np.asarray(male, int) * len(BANDS) + np.searchsorted(BANDS, age, side="right") - 1


def draw_patients(count: int, seed: int, *, several: bool = False) -> Patients:
    """Patients at one visit.

    Args:
      count: > 0.
      seed: of everything drawn; the first patients of a longer draw are others.
      several: one to three diseases each, chronic ones half known from before; else one, and no past.

    Returns:
      Patients; the same seed gives the same, bit for bit.
    """
    rng = np.random.default_rng((seed, int(several)))
    age = np.minimum(rng.integers(18, 80, count) + rng.integers(0, 16, count), diseases.OLDEST)
    male = rng.random(count) < 0.5
    disease = _diseases(rng, context_of(age, male), several)
    chronic = np.array([row.chronic for row in diseases.DISEASES.values()])
    previous = disease & chronic & (rng.random(disease.shape) < 0.5) & several
    return _visit(rng, age, male, disease, previous, rng.standard_normal((count, len(CODES))))


def _diseases(rng: np.random.Generator, context: np.ndarray, several: bool) -> np.ndarray:
    """b[N, D]: the first by how common it is here, others also by what they go together with."""
    names, share = diseases.NAMES, tables().prior[context]
    has = _one_of(rng, share)
    if not several:
        return has
    times = np.ones((len(names), len(names)))
    for (a, b), factor in diseases.TOGETHER.items():
        times[names.index(a), names.index(b)] = times[names.index(b), names.index(a)] = factor
    for a, b in diseases.APART:
        times[names.index(a), names.index(b)] = times[names.index(b), names.index(a)] = 0
    count = 1 + rng.choice(3, len(has), p=MORE)
    for more in (2, 3):
        weight = share * np.prod(np.where(has[:, :, None], times[None], 1), axis=1) * ~has
        has = has | (_one_of(rng, weight / weight.sum(axis=1, keepdims=True)) & (count >= more)[:, None])
    return has


def _one_of(rng: np.random.Generator, share: np.ndarray) -> np.ndarray:
    """b[N, C]: one class a row, drawn by shares that add up to 1."""
    edge = np.cumsum(share, axis=1)
    place = (rng.random((len(share), 1)) * edge[:, -1:] >= edge).sum(axis=1)
    return np.minimum(place, share.shape[1] - 1)[:, None] == np.arange(share.shape[1])


def _visit(
    rng: np.random.Generator,
    age: np.ndarray,
    male: np.ndarray,
    disease: np.ndarray,
    previous: np.ndarray,
    own: np.ndarray,
) -> Patients:
    """What is felt, ordered and measured; own f64[N, K]: what varies of each test, N(0, 1)."""
    of, count = tables(), len(age)
    # Of several diseases each has the background in its chance, which counts once.
    spare = (1 - diseases.BACKGROUND) ** (disease.sum(axis=1) - 1)
    felt = 1 - np.prod(np.where(disease[:, :, None], 1 - of.symptom[None], 1), axis=1) / spare[:, None]
    symptom = (rng.random(felt.shape) < felt) & (rng.random(count) >= NO_SYMPTOMS)[:, None]
    severity = disease * rng.choice(SEVERITY, disease.shape, p=SEVERITY_SHARE)
    factor = rng.choice(NODES, (count, len(PANELS)), p=NODE_SHARE)[:, PANEL]
    z = of.loading * factor + np.sqrt(1 - of.loading**2) * own
    value = np.zeros(z.shape)
    for sex in (False, True):
        who = male == sex
        moved = severity[who] @ of.shift[int(sex)].T
        for k, code in enumerate(CODES):
            value[who, k] = np.exp(results_at(z[who, k], code, sex) + moved[:, k])
    label = labels_of(value, context_of(age, male))
    value = np.stack([rounded(value[:, k], short) for k, short in enumerate(SHORT)], axis=1)
    missing = rng.random(value.shape) < MISSING
    value, label = np.where(missing, np.nan, value), np.where(missing, NONE, label).astype(np.int8)
    return Patients(age, male, disease, previous, symptom, value, label, _orders(rng, age, male, symptom))


def labels_of(value: np.ndarray, context: np.ndarray) -> np.ndarray:
    """i8[N, K]: NORMAL, LOW or HIGH of unrounded results, as they are once they are reported."""
    of = tables()
    low, high = value < of.low[context], value > of.high[context]
    return np.where(low, LOW, np.where(high, HIGH, NORMAL)).astype(np.int8)


def _orders(rng: np.random.Generator, age: np.ndarray, male: np.ndarray, symptom: np.ndarray) -> np.ndarray:
    """b[N, K]: panels that are routine, that fit what the symptoms alone suggest, or are done at random."""
    log = np.log(tables().prior[context_of(age, male)]) + log_symptoms(symptom)
    share = np.exp(log - log.max(axis=1, keepdims=True))
    suspected = _one_of(rng, share / share.sum(axis=1, keepdims=True)).argmax(axis=1)
    moved = np.array([[abs(row.results.get(short, 0)) >= 1 for short in SHORT] for row in diseases.DISEASES.values()])
    fits = np.stack([moved[:, p == PANEL].any(axis=1) for p in range(len(PANELS))], axis=1)
    routine = np.array([name in ROUTINE for name in PANELS])
    chance = np.maximum(np.where(fits[suspected], 0.85, 0.06), np.where(routine, 0.75, 0))
    return (rng.random(chance.shape) < chance)[:, PANEL]


def log_symptoms(symptom: np.ndarray) -> np.ndarray:
    """f64[N, D]: log P(symptoms | disease), with the share that feels nothing."""
    p = tables().symptom[None]
    each = np.where(symptom[:, None], np.log(p), np.log1p(-p)).sum(axis=2)
    nothing = np.where(symptom.any(axis=1), 0, NO_SYMPTOMS)[:, None]
    return np.log((1 - NO_SYMPTOMS) * np.exp(each) + nothing)


def chances_of_labels(context: int) -> np.ndarray:
    """f64[K, 4, D, S, U]: P(label | disease, severity, factor) at one sex and age; NONE tells nothing: 1."""
    of, male = tables(), context >= len(BANDS)
    out = np.ones((len(CODES), 4, len(diseases.NAMES), len(SEVERITY), len(NODES)))
    moved = of.shift[int(male)][:, :, None] * SEVERITY
    for k, code in enumerate(CODES):
        rest = np.sqrt(1 - of.loading[k] ** 2)

        def under(edge: float, k=k, code=code, rest=rest) -> np.ndarray:
            z = scores_at(np.log(edge) - moved[k], code, male) if 0 < edge < np.inf else np.full(moved[k].shape, edge)
            return NORMAL_CDF((z[:, :, None] - of.loading[k] * NODES) / rest)

        low = under(of.low[context, k])
        high = 1 - under(of.high[context, k])
        out[k, LOW], out[k, HIGH], out[k, NORMAL] = low, high, 1 - low - high
    return out


def rules(horizon: int = HORIZON, *, panels: bool = True) -> Rules:
    """Columns are 4 a test, one for each label.

    Args:
      horizon: orders until a diagnosis is due.
      panels: the panels are actions, and then each test by itself. Without them an order is one test, and the horizon
        is in tests.
    """
    groups = [np.flatnonzero(p == PANEL).tolist() for p in range(len(PANELS))] if panels else []
    single = [[k] for k in range(len(CODES)) if not panels or np.sum(PANEL[k] == PANEL) > 1]
    return Rules(panels_of(groups + single), 4 * len(CODES), horizon)


def abnormal_yield(cases: Cases, action: np.ndarray, rules: Rules) -> float:
    """The share of the results asked for that were low or high, of embedded patients; i32[N, T] actions."""
    members = np.asarray(rules.members)[np.minimum(action, rules.stop - 1)]
    asked = (members >= 0) & (action < rules.stop)[:, :, None]
    label = np.take_along_axis(
        np.asarray(cases.column) % 4, np.maximum(members, 0).reshape(len(action), -1), axis=1
    ).reshape(members.shape)
    return float((asked & ((label == LOW) | (label == HIGH))).sum() / max(asked.sum(), 1))


def matches(patients: Patients) -> np.ndarray:
    """f32[N, K]: what `ehr_match` says of each test, for `reinforce(match=...)`; no policy sees it."""
    abnormal = (patients.label == LOW) | (patients.label == HIGH)
    return np.asarray(ehr_match(patients.ordered, patients.label == NORMAL, abnormal), np.float32)


def cases_of(patients: Patients) -> Cases:
    """Patients as a policy meets them: age, sex, symptoms, previous diagnoses, and results to ask for."""
    age = (patients.age[:, None] - 50) / 20
    bands = patients.age[:, None] >= np.array(BANDS[1:])
    given = np.concatenate([age, bands, patients.male[:, None], patients.symptom, patients.previous], axis=1)
    column = 4 * np.arange(len(CODES)) + patients.label
    nothing = np.zeros(patients.label.shape, bool)
    return Cases(
        given.astype(np.float32),
        column.astype(np.int32),
        patients.label != NONE,
        nothing,
        patients.disease,
        context_of(patients.age, patients.male).astype(np.int32),
    )


def histories(count: int, seed: int) -> Iterator[Event]:
    """The records of patients with one to three diseases over one to four visits, as events for table_of.

    Chronic diseases stay, acute ones are drawn anew; a visit records what was ordered. Its last event is the diagnosis.

    Args:
      count: subjects.
      seed: of everything drawn.
    """
    rng = np.random.default_rng((seed, 2))
    first = draw_patients(count, seed, several=True)
    chronic = np.array([row.chronic for row in diseases.DISEASES.values()])
    visits, own = rng.integers(1, 5, count), rng.standard_normal((count, len(CODES)))
    begins = NOW - rng.integers(5 * 365, 6 * 365, count) * DAY
    born = begins - first.age * YEAR - rng.integers(0, 300, count) * DAY
    disease, past = first.disease, np.zeros_like(first.disease)
    for n in range(count):
        yield Event(f"patient {n}", int(born[n]), system=PERSON, code=BIRTH)
        yield Event(f"patient {n}", int(born[n]), system=PERSON, code=MALE if first.male[n] else FEMALE)
    for v in range(4):
        age = np.minimum((begins - born) // YEAR, 120)
        moment = np.sqrt(STAYS) * own + np.sqrt(1 - STAYS) * rng.standard_normal(own.shape)
        seen = _visit(rng, age, first.male, disease, past & disease, moment)
        for n in np.flatnonzero(visits > v):
            yield from _events(f"patient {n}", f"patient {n}, visit {v}", int(begins[n]), seen, int(n))
        kept = np.logical_and(disease, chronic)
        past = past | kept
        acute = _diseases(rng, context_of(age, first.male), False)
        disease = np.where(np.any(kept, axis=1, keepdims=True), kept, acute) | (acute & ~chronic)
        begins = begins + rng.integers(60, 400, count) * DAY


def _events(subject: str, visit: str, begin: int, seen: Patients, n: int) -> Iterator[Event]:
    end = begin + DAY
    yield Event(subject, begin, visit, VISIT, START)
    for code, felt in zip(diseases.SYMPTOMS, seen.symptom[n], strict=True):
        if felt:
            yield Event(subject, begin, visit, "icd10", code.replace(".", ""))
    for k in np.flatnonzero(seen.ordered[n] & (seen.label[n] != NONE)):
        yield Event(subject, begin + 3600, visit, LOINC, CODES[k], float(seen.value[n, k]), TESTS[CODES[k]].unit)
    for code, has in zip(diseases.NAMES, seen.disease[n], strict=True):
        if has:
            yield Event(subject, end, visit, "icd10", code.replace(".", ""))
    yield Event(subject, end, visit, VISIT, END)
