"""Findings from workups: tables counted by hand and by loops, intervals by simulation, and what must stay hidden."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.clinical import scores
from rlalign.clinical.workup import Workup
from rlalign.evaluation.clinical import by_asker, findings, outside

CODES = ("E11.9", "I10", "J45.901", "N17.9", "E05.90", "I50.9")


def one(gold="E11.9", ranked=("E11.9", "I10"), **more):
    return Workup(**{"asker": "mine", "gold": (gold,) if isinstance(gold, str) else gold, "ranked": ranked, **more})


def random_workups(count, seed, classes=6, **more):
    """Patients of one to three diagnoses, and lists that are half right."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        order = rng.permutation(classes)
        gold = [CODES[c] for c in order[: rng.integers(1, 4)]]
        ranked = list(rng.permutation(CODES[:classes]))
        if rng.random() < 0.5:
            ranked = list(dict.fromkeys([gold[0], *ranked]))
        belief = rng.dirichlet(np.ones(classes)) * 0.999
        out.append(
            one(
                tuple(gold),
                tuple(map(str, ranked)),
                belief=tuple(belief.tolist()),
                abstained=rng.random() < 0.1,
                **more,
            )
        )
    return out


def arrays(workups, classes=6):
    """The lists and diagnoses that rlalign.clinical.scores takes."""
    ranked = np.full((len(workups), classes), -1)
    for n, w in enumerate(workups):
        if not w.abstained:
            ranked[n, : len(w.ranked)] = [CODES.index(code) for code in w.ranked]
    return ranked, np.array([[code in w.gold for code in CODES[:classes]] for w in workups])


def test_recall_is_that_of_scores():
    workups = random_workups(300, 0)
    ranked, gold = arrays(workups)
    found = findings(workups)
    for k in (1, 5):
        want = scores.recalls(jnp.asarray(ranked), jnp.asarray(gold), k)
        assert found.micro[k].value == pytest.approx(float(want.micro), rel=1e-5)
        assert found.macro[k].value == pytest.approx(float(want.macro), rel=1e-5)
        rare = np.argsort(want.count, kind="stable")[:2]
        hits = float((want.by_class * want.count)[rare].sum())
        # Classes are sorted by code here, by CODES there: of equal counts another may come first.
        if len(set(np.asarray(want.count).tolist())) == 6:
            assert found.rare[k].value == pytest.approx(hits / float(want.count[rare].sum()), rel=1e-5)
        for row in found.by_class:
            assert row.recall[k].value == pytest.approx(float(want.by_class[CODES.index(row.name)]), rel=1e-5)
            assert row.patients == sum(row.name in w.gold for w in workups)
    assert (found.patients, found.classes, len(found.by_class)) == (300, 6, 2)


def test_calibration_is_that_of_scores_where_bins_are_full():
    workups = random_workups(3000, 1)
    belief = np.zeros((3000, 6))
    for n, w in enumerate(workups):
        belief[n, [CODES.index(code) for code in w.ranked]] = w.belief
    _, gold = arrays(workups)
    want = scores.calibration(jnp.asarray(belief), jnp.asarray(gold))
    found = findings(workups).calibration
    assert found.brier == pytest.approx(float(want.brier), rel=1e-5)
    assert found.error == pytest.approx(float(want.error), abs=0.003)  # bins of fewer than ten are joined
    assert sum(part.patients for part in found.bins) == 3000
    assert min(part.patients for part in found.bins) >= 10
    gap = sum(abs(part.accuracy.value - part.confidence) * part.patients for part in found.bins) / 3000
    assert found.error == pytest.approx(gap)


def test_calibration_by_hand():
    """Twelve patients 0.95 sure, nine of them right; eight 0.15 sure, of whom none; what is not listed has nothing."""
    workups = [one("E11.9" if n < 9 else "I10", ("E11.9",), belief=(0.95,)) for n in range(12)]
    workups += [one("I10", ("E11.9", "J45.901"), belief=(0.1, 0.15)) for _ in range(8)]
    found = findings(workups).calibration
    assert [(b.patients, round(b.confidence, 4)) for b in found.bins] == [(20, 0.63)]  # 8 are too few for a bin
    assert found.error == pytest.approx(abs(9 / 20 - 0.63))
    brier = (9 * 0.05**2 + 3 * (0.95**2 + 1) + 8 * (0.1**2 + 0.15**2 + 1)) / 20
    assert found.brier == pytest.approx(brier)


def test_what_was_asked_by_hand():
    """Twenty patients: twelve were asked a panel and a test in another, eight nothing."""
    asked = {"results": 4, "abnormal": 1, "redundant": 1, "rejects": 2.5}
    twelve = one(tests=("blood count", "liver panel:1742-6"), orders=("blood count", "liver panel", "CT"), **asked)
    eight = one(tests=(), orders=("CT", "lipid panel"), results=0, abnormal=0, redundant=0, rejects=0)
    found = findings([twelve] * 12 + [eight] * 8).asking
    assert found.counts == ((0, 2, 20),)  # eight cannot stand alone
    assert found.mean is None  # 24 tests would say how many had two
    assert found.quartiles == (0.0, 2.0, 2.0)
    assert found.redundant.value == pytest.approx(12 / 24)
    assert found.rejects == pytest.approx(30 / 24)
    assert found.abnormal.value == pytest.approx(12 / 48)
    assert found.orders.value == pytest.approx(2 * 12 / (3 * 12 + 2 * 8))
    assert found.usual.value == 1.0  # four orders in all: the five most common are these
    assert found.common == (("blood count", "> 50.0%"), ("liver panel:1742-6", "> 50.0%"))
    assert found.abstained == 0


def test_orders_count_once_and_only_the_first_five():
    tests = ("a:1", "a:2", "b", "c", "d", "e", "f")
    workups = [one(tests=tests, orders=("a", "e", "f"))] * 10
    assert findings(workups).asking.orders.value == pytest.approx(2 / 3)  # a and e; f is the sixth


def test_the_most_common_orders_are_those_of_the_others():
    """A test that one patient alone had is not common for the others, and not for him either."""
    workups = [one(orders=("a", "b", "c", "d", "e"))] * 11 + [one(orders=("z",))]
    assert findings(workups).asking.usual.value == pytest.approx(55 / 56)


def test_lists_after_each_test():
    short = one(ranked=("I10",), lists=(("I10",), ("E11.9",)))
    long = one(ranked=("E11.9",), lists=(("I10", "E11.9"), ("I10",), ("E11.9",)))
    curve = findings([short] * 6 + [long] * 6).curve
    assert [e.value for e in curve[1]] == [0.0, 0.5, 1.0]  # who stopped keeps the last list
    assert [e.value for e in curve[5]] == [0.5, 0.5, 1.0]


def test_a_patient_without_a_diagnosis_is_not_found():
    workups = [one(abstained=n < 10) for n in range(40)]
    found = findings(workups)
    assert found.micro[1].value == found.micro[5].value == 0.75
    assert found.asking.abstained == 0.25


@pytest.mark.parametrize(
    ("few", "total", "want"), [(0, 50, 0.0), (3, 50, "< 20.0%"), (10, 50, 0.2), (44, 50, "> 80.0%"), (50, 50, 1.0)]
)
def test_shares_of_few_patients_are_bounds(few, total, want):
    assert outside(few, total) == want


def shown(found):
    """What anybody can read of how many patients there are."""
    rows = {"class": found.by_class, "sex": found.by_sex, "age": found.by_age}
    return {name: [row.patients for row in some] for name, some in rows.items()}


def patient(sex="female", age="40-49", gold="E11.9", **more):
    return one(gold, sex=sex, age=age, **more)


def test_small_groups_are_hidden_with_one_more():
    workups = [patient(age="18-39")] * 30 + [patient(age="40-49")] * 20 + [patient(sex="male", age="50-59")] * 4
    found = findings(workups)
    assert [(row.name, row.patients, bool(row.recall)) for row in found.by_age] == [
        ("18-39", 30, True),
        ("40-49", None, False),
        ("50-59", None, False),
    ]
    assert [row.patients for row in found.by_sex] == [None, None]  # 54 less 50
    assert all(row.tests is None for row in found.by_sex)


def test_small_classes_are_put_together():
    """Counts 3, 8, 30, 60, 80, 90: the first two have eleven patients together."""
    workups = [one(code) for code, many in zip(CODES, (3, 8, 30, 60, 80, 90), strict=True) for _ in range(many)]
    found = findings(workups)
    assert [(row.name, row.classes, row.patients) for row in found.by_class] == [("", 2, 11)]
    assert found.by_class[0].recall[1].value == pytest.approx(3 / 11)  # E11.9 alone is found
    assert found.rare[1].value == pytest.approx(3 / 11)
    assert found.macro == {}  # six classes: the mean over them would tell of the two


def test_the_mean_over_classes_is_shown_where_many_are_not():
    rng = np.random.default_rng(0)
    codes = [f"E{n:02}" for n in range(30)]
    workups = [one(code) for n, code in enumerate(codes) for _ in range(4 + n)]
    found = findings([workups[i] for i in rng.permutation(len(workups))])
    assert found.by_class[-1].classes >= 6
    assert found.macro[1].value == 0.0  # nobody has what is listed first


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 25), min_size=3, max_size=3), st.integers(0, 3), st.integers(0, 2**16))
def test_no_shown_number_is_of_fewer_than_ten(ages, males, seed):
    rng = np.random.default_rng(seed)
    bands = [band for band, many in zip(("18-39", "40-49", "50+"), ages, strict=True) for _ in range(many)]
    bands += ["60-69" if "50+" not in bands else "50+"] * 10
    workups = []
    for n, age in enumerate(bands):
        tests = tuple("ab"[: rng.integers(0, 3)])
        gold = CODES[int(rng.integers(0, 3) ** 2) % 6]
        workups.append(patient("male" if n < males else "female", age, gold, tests=tests, belief=(0.6, 0.3)))
    found, total = findings(workups), len(workups)
    for name, counts in shown(found).items():
        known = [n for n in counts if n is not None]
        assert all(n >= 10 for n in known)
        if name != "class" and len(known) < len(counts):
            assert len(counts) - len(known) >= 2
            assert total - sum(known) >= 10
    assert all(many >= 10 for _, _, many in found.asking.counts)
    assert all(part.patients >= 10 for part in found.calibration.bins)


def test_the_mean_of_tests_does_not_tell_apart_what_was_joined():
    """Whatever the five patients of the first two bars had, the mean shown is the same."""
    means = set()
    for few in range(1, 6):
        asked = [0] * few + [1] * (5 - few) + [2] * 50 + [3] * 245
        found = findings([one(tests=("a",) * n) for n in asked]).asking
        assert found.counts == ((0, 2, 55), (3, 3, 245))
        means.add(found.mean)
    assert len(means) == 1
    assert means != {None}


def askers(first, second):
    return [dataclasses.replace(w, asker="first") for w in first] + [
        dataclasses.replace(w, asker="second") for w in second
    ]


def test_askers_come_in_order_with_the_same_patients():
    people = [patient(age="40-49")] * 8 + [patient(age="50-59")] * 4
    found = by_asker(askers(people, people[::-1]))
    assert {name: len(some) for name, some in found.items()} == {"first": 12, "second": 12}


@pytest.mark.parametrize(
    ("workups", "message"),
    [
        ([one()] * 9, r"workups\[0\]: its asker has 9 patients; a report takes 10 or more"),
        (askers([one()] * 12, [one()] * 3), r"workups\[12\]: its asker has 3 patients"),
        (askers([one()] * 12, [one()] * 11), r"workups\[12\]: its asker was given other patients \(11\) than .*\(12\)"),
        (askers([one()] * 12, [one("I10")] * 12), "was given other patients"),
        (askers([patient()] * 12, [patient(age="18-39")] * 12), "was given other patients"),
        (askers([one(orders=("a",))] * 12, [one(orders=("b",))] * 12), "was given other patients"),
        (
            [one()] * 11 + [one(tests=())],
            r"workups\[11\]: tests is not known of all patients of this asker, compare wor",
        ),
        ([patient()] * 10 + [patient(age="45-54")] * 10, r"bands of workups\[0\] and workups\[10\] overlap"),
        ([patient(age="80+")] * 10 + [patient(age="80-89")] * 10, "overlap; give bands that do not"),
    ],
)
def test_what_would_tell_of_single_patients_is_refused(workups, message):
    with pytest.raises(ValueError, match=message):
        by_asker(workups)
