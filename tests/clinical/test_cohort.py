"""Workups of arrays against loops over what is asked; and what a workup refuses, without saying what it was."""

import dataclasses

import jax
import numpy as np
import pytest

from rlalign.clinical import asker, baselines, cohort, generator, training
from rlalign.clinical.inquiry import Cases, Rules, panels_of
from rlalign.clinical.trial import Stopped, Trial, trial
from rlalign.clinical.workup import Workup, band

GROUPS = [[0, 1, 2], [3], [0], [2]]
NAMES = ["panel", "three", "panel:zero", "panel:two"]
CODES = ["E11.9", "I10", "J45.901"]


def people(count, seed, told=0.2):
    rng = np.random.default_rng(seed)
    flags = rng.random((2, count, 4))
    gold = rng.permuted(np.tile([True, False, False], (count, 1)), axis=1)
    cases = Cases(
        np.ones((count, 1)), np.zeros((count, 4), int), flags[0] < 0.8, flags[1] < told, gold, np.zeros(count, int)
    )
    rules = Rules(panels_of(GROUPS), 4, horizon=5)
    return cohort.Cohort(cases, rules, CODES, NAMES, abnormal=rng.random((count, 4)) < 0.5)


def test_counts_are_those_of_a_loop():
    some = people(200, 0)
    rng = np.random.default_rng(1)
    action = rng.integers(-1, 6, (200, 5))  # 4 stops, 5 abstains
    p = rng.dirichlet(np.ones(3), 200)
    for n, one in enumerate(cohort.workups(some, "mine", baselines.ranking(p), p, action=action)):
        known = {k for k in range(4) if some.cases.told[n, k]}
        tests, results, abnormal, redundant = [], 0, 0, 0
        for a in action[n]:
            if 0 <= a < 4:
                new = set(GROUPS[a]) - known
                tests.append(NAMES[a])
                redundant += not new
                results += sum(some.cases.recorded[n, k] for k in new)
                abnormal += sum(some.cases.recorded[n, k] and some.abnormal[n, k] for k in new)
                known |= new
        assert one.tests == tuple(tests)
        assert (one.results, one.abnormal, one.redundant) == (results, abnormal, redundant)
        assert one.gold == (CODES[some.cases.gold[n].argmax()],)
        order = np.argsort(-p[n])
        assert one.ranked == tuple(CODES[c] for c in order)
        np.testing.assert_allclose(one.belief, p[n, order], atol=1e-6)


def test_a_policy_that_stops_has_its_own_list_and_goes_on_in_lists():
    some = people(3, 0)
    ranked = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1]])
    lists = np.stack([np.roll(ranked, t, axis=1) for t in range(6)], axis=1)
    own = Stopped(
        np.array([[1, -1, -1], [0, 1, -1], [-1, -1, -1]]),
        ranked,
        np.full((3, 3), 1 / 3),
        np.array([False, False, True]),
        np.array([0.5, 0.0, 0.0]),
    )
    first, second, third = cohort.tried(some, "trained", Trial(lists, lists, own.action, {}, own))
    assert (first.tests, first.rejects, len(first.lists)) == (("three",), 0.5, 6)
    assert second.ranked == ("I10", "E11.9", "J45.901")
    assert second.lists[1] == ("J45.901", "I10", "E11.9")
    assert (third.tests, third.abstained, first.abstained) == ((), True, False)


def test_a_trial_says_what_happened_to_each_patient():
    some = people(40, 3)
    column = 4 * np.arange(4) + np.random.default_rng(0).integers(0, 4, (40, 4))
    some = some._replace(cases=some.cases._replace(column=column), rules=some.rules._replace(columns=16))
    network = asker.network(some.rules, some.cases, 4)
    params = training.init(training.Training(), network, some.cases)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), params)  # no two classes are equal
    found = trial(network, params, some.rules, some.cases)
    records = cohort.tried(some, "untrained", found)
    assert np.mean([len(one.tests) for one in records]) == pytest.approx(found.own["orders"])
    assert np.mean([one.abstained for one in records]) == pytest.approx(found.own["abstains"])
    orders = sum(len(one.tests) for one in records)
    assert sum(one.rejects for one in records) / max(orders, 1) == pytest.approx(found.own["rejects"], rel=1e-4)
    right = [one.ranked[0] in one.gold and not one.abstained for one in records]
    assert np.mean(right) == pytest.approx(found.own["found"])
    for n, one in enumerate(records):  # up to where it stops it is the one that goes on
        np.testing.assert_array_equal(found.stopped.ranked[n], found.ranked[n, len(one.tests)])
        np.testing.assert_allclose(found.stopped.belief[n], found.belief[n, len(one.tests)], rtol=1e-4)
    assert 0 < np.mean([len(one.tests) for one in records]) < 5
    for own, one in zip(found.stopped.action, records, strict=True):
        asked = len(one.tests)
        assert (own[:asked] >= 0).all()
        assert (own[asked:] == -1).all()


def test_embedded_patients_have_bands_panels_and_no_age():
    patients = generator.draw_patients(60, 3)
    some = cohort.embedded(patients, generator.rules(3))
    assert some.actions[:2] == ["blood count", "basic metabolic panel"]
    assert "diabetes panel:2345-7" not in some.actions
    assert "basic metabolic panel:2345-7" in some.actions
    for n, (sex, age, orders) in enumerate(zip(some.sex, some.age, some.orders, strict=True)):
        first, last = band(age)
        assert first <= patients.age[n] <= last
        assert sex == ("male" if patients.male[n] else "female")
        codes = [code for k, code in enumerate(generator.CODES) if patients.ordered[n, k]]
        assert set(orders) == {generator.TESTS[code].panel for code in codes}
        np.testing.assert_array_equal(some.abnormal[n], np.isin(patients.label[n], (generator.LOW, generator.HIGH)))


GOOD = Workup(
    "mine",
    ("E119",),
    ("E11.9", "I10"),
    belief=(0.5, 0.25),
    tests=("blood count", "2345-7"),
    orders=("blood count",),
    results=3,
    abnormal=1,
    redundant=1,
    rejects=0.5,
    sex="female",
    age="40-49",
    lists=(("I10",), ("E119",)),
)


def test_codes_get_their_point():
    assert GOOD.gold == ("E11.9",)
    assert GOOD.lists == (("I10",), ("E11.9",))


CANARY = "Jane Roe, born 1961-04-02"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("asker", CANARY + "!", "asker must be a name of at most 40 letters"),
        ("asker", None, "asker must be a name"),
        ("gold", (), "gold must be at least one code"),
        ("gold", (CANARY,), "entry 1 of gold is none of ICD-10 codes such as"),
        ("gold", ("E11.9", "E119"), "gold must be each code once"),
        ("ranked", ("I10", 4), "entry 2 of ranked is none of"),
        ("ranked", ["I10"], "ranked must be a list"),
        ("belief", (0.5,), "belief must be as long as ranked"),
        ("belief", (0.9, 0.9), "belief must be probabilities of one distribution"),
        ("belief", (float("nan"), 0.1), "entry 1 of belief is none of probabilities"),
        ("belief", (0.5, True), "entry 2 of belief"),
        ("belief", (1.5, 0.0), "entry 1 of belief"),
        ("tests", (CANARY,), "entry 1 of tests is none of names of tests"),
        ("tests", ("a" * 81,), "entry 1 of tests"),
        ("tests", "blood count", "tests must be a list"),
        ("orders", ("a", "a"), "orders must be each order once"),
        ("results", None, "abnormal must be given together with results"),
        ("results", -1, "results must be a whole number >= 0"),
        ("results", True, "results must be a whole number"),
        ("abnormal", 4, "abnormal must be at most as many as results"),
        ("redundant", 3, "redundant must be at most as many as tests"),
        ("redundant", 1.0, "redundant must be a whole number"),
        ("rejects", float("inf"), "rejects must be a number >= 0"),
        ("tests", None, "redundant must be given together with tests"),
        ("abstained", 1, "abstained must be true or false"),
        ("sex", "F", "sex must be one of female, male, other, unknown"),
        ("age", "43", "age must be a band of 5 years or more"),
        ("age", "43-46", "age must be a band"),
        ("age", "85-94", "age must be a band"),
        ("age", "94+", "age must be a band"),
        ("age", "٤٠-٤٩", "age must be a band"),
        ("age", 43, "age must be a band"),
        ("lists", (), "lists must be at least the list before"),
        ("lists", ("I10",), "entry 1 of lists is none of"),
        ("lists", ((CANARY,),), "entry 1 of lists is none of ICD-10"),
    ],
)
def test_what_is_no_workup_is_refused_by_field(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(GOOD, **{field: value})
    assert "Jane" not in str(error.value)
    assert "1961" not in str(error.value)
