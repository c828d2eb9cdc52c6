"""Embedded patients: published quantiles, codes, labels, records, and the posterior against loops."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlalign.clinical import baselines, diseases, generator, healthy
from rlalign.clinical.events import table_of
from rlalign.clinical.inquiry import Rules, panels_of, take
from rlalign.clinical.loinc import PANELS, TESTS
from rlalign.clinical.posterior import Exact, action_names
from rlalign.clinical.reference import interpret
from rlalign.clinical.scores import calibration

COUNT = 3000
NAMES = list(diseases.NAMES)


@pytest.fixture(scope="module")
def patients():
    return generator.draw_patients(COUNT, 0)


@pytest.fixture(scope="module")
def small():
    """Four panels and two single tests, for a posterior whose gains are quick to find."""
    wanted = ["diabetes panel", "thyroid panel", "heart panel", "spirometry"]
    places = [list(PANELS).index(name) for name in wanted]
    groups = [np.flatnonzero(p == generator.PANEL).tolist() for p in places]
    rules = Rules(panels_of([*groups, [generator.CODES.index("2345-7")], [groups[1][0]]]), 4 * len(healthy.CODES), 3)
    return rules, Exact(rules)


@pytest.fixture(scope="module")
def cases(patients):
    return jax.tree.map(jnp.asarray, take(generator.cases_of(patients), slice(0, 256)))


def test_tables_name_what_exists():
    for code, row in diseases.DISEASES.items():
        assert re.fullmatch(r"[EINJ]\d\d(\.\d{1,3})?", code)
        assert set(row.results) <= set(healthy.SHORT), code
        assert all(0 < chance < 1 for chance in row.symptoms.values())
        assert len(row.common) == len(diseases.AGES)
    assert all(re.fullmatch(r"R\d\d(\.\d{1,2})?", code) for code in diseases.SYMPTOMS)
    assert {d for pair in (*diseases.TOGETHER, *diseases.APART) for d in pair} <= set(NAMES)
    assert set(healthy.LOADINGS) | set(healthy.DECIMALS) <= set(healthy.SHORT)
    assert set(healthy.NHANES) | set(healthy.INTERVALS) == set(TESTS)
    assert not set(healthy.NHANES) & set(healthy.INTERVALS)
    assert (len(NAMES), len(diseases.SYMPTOMS)) == (24, 16)
    assert {code[0] for code in NAMES} == set("ENJI")


def test_healthy_results_have_the_published_quantiles():
    """Within 3 % of the people, beside what rounding moves: as many below each quantile as NHANES says."""
    rng = np.random.default_rng(0)
    count = 8000
    age, male = np.full(count, 55), np.arange(count) % 2 > 0
    nothing = np.zeros((count, 24), bool)
    own = rng.standard_normal((count, len(healthy.CODES)))
    seen = generator._visit(rng, age, male, nothing, nothing, own)
    for k, code in enumerate(healthy.CODES):
        step = 10.0 ** -healthy.DECIMALS.get(healthy.SHORT[k], 0)
        table = healthy.NHANES if code in healthy.NHANES else healthy.INTERVALS
        levels = healthy.LEVELS if code in healthy.NHANES else (0.025, 0.5, 0.975)
        for sex in (False, True):
            value = seen.value[male == sex, k]
            value = value[~np.isnan(value)]
            for level, quantile in zip(levels, table[code][sex], strict=True):
                assert np.mean(value < quantile - step) - 0.03 < level < np.mean(value <= quantile + step) + 0.03, code


def test_results_vary_together_as_published():
    rng = np.random.default_rng(1)
    count = 8000
    nothing = np.zeros((count, 24), bool)
    own = rng.standard_normal((count, len(healthy.CODES)))
    seen = generator._visit(rng, np.full(count, 55), np.zeros(count, bool), nothing, nothing, own)
    at = healthy.SHORT.index
    published = {("sodium", "chloride"): 0.65, ("ALT", "AST"): 0.78, ("triglycerides", "HDL cholesterol"): -0.45}
    published |= {("hemoglobin", "hematocrit"): 0.96, ("hemoglobin", "erythrocytes"): 0.51}
    published |= {("systolic blood pressure", "diastolic blood pressure"): 0.70}
    for (one, other), want in published.items():
        both = np.log(seen.value[:, [at(one), at(other)]])
        both = both[~np.isnan(both).any(axis=1)]
        assert abs(np.corrcoef(both.T)[0, 1] - want) < 0.32, (one, other)


def test_labels_are_those_of_the_reference(patients):
    words = {"normal": generator.NORMAL, "low": generator.LOW, "high": generator.HIGH}
    for n, k in itertools.product(range(100), range(len(healthy.CODES))):
        if np.isnan(patients.value[n, k]):
            assert patients.label[n, k] == generator.NONE
            continue
        sex, code = "male" if patients.male[n] else "female", healthy.CODES[k]
        said = interpret(code, patients.value[n, k], TESTS[code].unit, sex=sex, age=float(patients.age[n]))
        assert words[said.word] == patients.label[n, k], (code, patients.value[n, k])


def test_patients_are_the_seeds():
    one, again = (generator.draw_patients(50, 7, several=True) for _ in range(2))
    assert all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one.age, generator.draw_patients(50, 8, several=True).age)


def test_diseases_are_as_common_as_the_tables_say(patients):
    prior = generator.tables().prior[generator.context_of(patients.age, patients.male)].mean(axis=0)
    np.testing.assert_allclose(patients.disease.mean(axis=0), prior, atol=0.015)
    assert (patients.disease.sum(axis=1) == 1).all()
    assert not patients.previous.any()
    several = generator.draw_patients(COUNT, 0, several=True)
    np.testing.assert_allclose(np.bincount(several.disease.sum(axis=1))[1:] / COUNT, generator.MORE, atol=0.03)
    for a, b in diseases.APART:
        assert not (several.disease[:, NAMES.index(a)] & several.disease[:, NAMES.index(b)]).any()
    share = lambda *codes: several.disease[:, [NAMES.index(code) for code in codes]].all(axis=1).mean()
    lift = lambda a, b: share(a, b) / (share(a) * share(b))
    assert lift("E11.9", "I10") > 1.4 * lift("E11.9", "J20.9")
    assert (several.previous <= several.disease).all()


def test_chances_of_labels_are_those_of_the_draw():
    """Of one disease in one context, summed over severity and factor, beside what is drawn."""
    rng, count = np.random.default_rng(3), 6000
    age, male = np.full(count, 65), np.ones(count, bool)
    disease = np.tile(np.arange(24) == NAMES.index("I50.9"), (count, 1))
    own = rng.standard_normal((count, len(healthy.CODES)))
    seen = generator._visit(rng, age, male, disease, disease & False, own)
    chances = generator.chances_of_labels(int(generator.context_of(age, male)[0]))[:, :, NAMES.index("I50.9")]
    want = np.einsum("klsu,s,u->kl", chances, generator.SEVERITY_SHARE, generator.NODE_SHARE)
    np.testing.assert_allclose(chances[:, 1:].sum(axis=1), 1, atol=1e-9)
    for label in (generator.NORMAL, generator.LOW, generator.HIGH):
        here = seen.label != generator.NONE
        np.testing.assert_allclose(
            ((seen.label == label) & here).sum(axis=0) / here.sum(axis=0), want[:, label], atol=0.03
        )


def by_hand(patients, n, tests):
    """P(disease) of one patient from symptoms and some labels: sums over severities, and over each panel's factor."""
    tables = generator.tables()
    context = int(generator.context_of(patients.age[n : n + 1], patients.male[n : n + 1])[0])
    chances, out = generator.chances_of_labels(context), []
    for d in range(24):
        felt = math.prod(p if s else 1 - p for p, s in zip(tables.symptom[d], patients.symptom[n], strict=True))
        felt = (1 - generator.NO_SYMPTOMS) * felt + (0 if patients.symptom[n].any() else generator.NO_SYMPTOMS)
        total = 0.0
        for s, share in enumerate(generator.SEVERITY_SHARE):
            for panel in range(len(PANELS)):
                members = [k for k in tests if generator.PANEL[k] == panel]
                each = [
                    weight * math.prod(chances[k, patients.label[n, k], d, s, u] for k in members)
                    for u, weight in enumerate(generator.NODE_SHARE)
                ]
                share *= sum(each)
            total += share
        out.append(tables.prior[context, d] * felt * total)
    return np.array(out) / sum(out)


def test_the_posterior_is_that_of_the_sums(patients, cases, small):
    _, exact = small
    tests = [k for k in range(len(healthy.CODES)) if generator.PANEL[k] in (0, 1, 4)][:9]
    state = exact.start(cases)
    for k in tests:
        state = exact.learn(state, cases, jnp.full((256, 1), k))
    found = np.asarray(exact.probabilities(state))
    for n in range(6):
        np.testing.assert_allclose(found[n], by_hand(patients, n, tests), atol=2e-4)
    together = exact.learn(exact.start(cases), cases, jnp.tile(jnp.array([[0, 1, 2, -1]]), (256, 1)))
    apart = exact.start(cases)
    for k in range(3):
        apart = exact.learn(apart, cases, jnp.full((256, 1), k))
    np.testing.assert_allclose(exact.probabilities(together), exact.probabilities(apart), atol=1e-5)


def test_gains_are_expected_falls_of_entropy(cases, small):
    rules, exact = small
    state = exact.start(cases)
    gain = exact.gain(state, cases)[:3]
    few = take(cases, slice(0, 3))
    entropy = lambda p: -(p * np.log(np.maximum(p, 1e-12))).sum(axis=1)
    start = exact.start(few)
    p = np.asarray(exact.probabilities(start))
    for action in (0, 1, 4):
        tests = [int(k) for k in rules.members[action] if k >= 0]
        after = np.zeros(3)
        for labels in itertools.product((1, 2, 3), repeat=len(tests)):
            column = few.column
            for k, label in zip(tests, labels, strict=True):
                column = column.at[:, k].set(4 * k + label)
            said = few._replace(column=column)
            q = np.asarray(exact.probabilities(exact.learn(start, said, jnp.tile(jnp.array([tests]), (3, 1)))))
            after += _chance(few, tests, labels, p) * entropy(q)
        np.testing.assert_allclose(gain[:, action], entropy(p) - after, atol=2e-3)


def _chance(cases, tests, labels, p):
    """P(labels) f64[N] before anything is known but age, sex and symptoms."""
    out = np.zeros(len(p))
    for n, context in enumerate(np.asarray(cases.context)):
        chances = np.prod(
            [generator.chances_of_labels(int(context))[k, x] for k, x in zip(tests, labels, strict=True)], axis=0
        )
        out[n] = p[n] @ np.einsum("dsu,s,u->d", chances, generator.SEVERITY_SHARE, generator.NODE_SHARE)
    return out


def test_ceiling_information_gain_chance(cases, small):
    rules, exact = small
    gold = np.asarray(cases.gold)
    nats = lambda p: -np.log(np.maximum(p[gold], 1e-10)).mean()
    every = baselines.ceiling(cases, exact)
    told, lot = (
        baselines.play(rules, cases, exact, asker, seed=0, orders=2) for asker in ("information gain", "random")
    )
    assert nats(every) < nats(told.posterior[:, -1]) < nats(lot.posterior[:, -1]) < nats(lot.posterior[:, 0])
    assert calibration(jnp.asarray(every), cases.gold).error < 0.1  # 256 patients


def dependence(patients):
    """z[D, panels] of Cochran, Mantel and Haenszel: orders by disease among equal symptoms, sexes and bands of ages.

    Nearly N(0, 1) each where orders do not depend on the disease; 0 where the variance is below 5, too little to tell.
    """
    strata = np.column_stack([generator.context_of(patients.age, patients.male), patients.symptom])
    _, stratum, size = np.unique(strata, axis=0, return_inverse=True, return_counts=True)
    member = np.arange(len(size))[:, None] == stratum.ravel()
    has = patients.disease.astype(float)
    first = [list(generator.PANEL).index(panel) for panel in range(len(PANELS))]
    ordered = patients.ordered[:, first].astype(float)
    sick, asked, n = member @ has, member @ ordered, size[:, None]
    excess = has.T @ ordered - np.einsum("sd,sp->dp", sick / n, asked)
    each = sick * (n - sick) / (n**2 * np.maximum(n - 1, 1))
    variance = np.einsum("sd,sp->dp", each, asked * (n - asked))
    return np.where(variance < 5, 0, excess / np.sqrt(np.maximum(variance, 5)))


def test_orders_tell_nothing_that_symptoms_do_not(patients, monkeypatch):
    """By z < 4.5: once in 500 draws one of 24 x 12 is beyond it by chance."""
    z = dependence(patients)
    assert (z != 0).sum() > 50
    assert np.abs(z).max() < 4.5
    assert 0.1 < patients.ordered.mean() < 0.6
    assert patients.ordered[:, generator.PANEL == 0].mean() > 0.7  # routine
    # Orders from the true disease are seen.
    monkeypatch.setattr(generator, "log_symptoms", lambda symptom: np.where(patients.disease, 0, -np.inf))
    told = generator._orders(np.random.default_rng(0), patients.age, patients.male, patients.symptom)
    assert np.abs(dependence(patients._replace(ordered=told))).max() > 9


def test_records_are_tables():
    table = table_of(generator.histories(40, 0))
    assert len(table.subjects) == 40
    again = table_of(generator.histories(40, 0))
    assert list(table) == list(again)
    for events in table.by_subject():
        visits = {event.visit for event in events if event.visit}
        assert 1 <= len(visits) <= 4
        for visit in visits:
            inside = [event for event in events if event.visit == visit]
            assert [event.code for event in inside if event.system == "visit"] == ["start", "end"]
            coded = [event.code for event in inside if event.system == "icd10" and event.code[0] != "R"]
            assert len(coded) >= 1
        born = [event for event in events if event.system == "person"]
        assert {event.code.split("/")[0] for event in born} == {"birth", "sex"}
    assert max(event.time for event in table) < generator.NOW


def test_actions_have_names_and_lie_in_panels():
    names = action_names(generator.rules())
    assert names[:12] == tuple(PANELS)
    assert names[-2:] == ("stop", "abstain")
    assert len(names) == len(set(names)) == 12 + 49 + 2
    with pytest.raises(ValueError, match=r"^an action has tests \[0, 10\], which do not lie in one panel$"):
        Exact(Rules(panels_of([[0, 10]]), 200))
