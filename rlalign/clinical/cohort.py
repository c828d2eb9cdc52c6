"""Workups of patients that are arrays: what a policy or a baseline of rlalign.clinical did, one record a patient.

people = embedded(patients, rules)
records = played(people, "information gain", baselines.play(...))
records += tried(people, "trained", trial(...))             # those that a page is made of, and a file holds
"""

import itertools
from typing import NamedTuple

import numpy as np

from rlalign.clinical.baselines import Asked, ranking
from rlalign.clinical.diseases import NAMES
from rlalign.clinical.generator import BANDS, HIGH, LOW, PANEL, Patients, cases_of
from rlalign.clinical.healthy import CODES
from rlalign.clinical.inquiry import Cases, Rules
from rlalign.clinical.loinc import PANELS
from rlalign.clinical.trial import Trial
from rlalign.clinical.workup import Workup

LISTED = 10  # diagnoses of the last list
EARLIER = 5  # and of those before it


class Cohort(NamedTuple):
    """What is the same for every asker, of N patients, A actions and C diagnoses.

    Attributes:
      cases, rules: see rlalign.clinical.inquiry.
      codes: ICD-10, C of them.
      actions: names of tests and panels, A of them; a test inside a panel "panel:test".
      sex, age: of each patient, as rlalign.clinical.workup.Workup has them; None: not known.
      orders: names on record of each patient; None: not known.
      abnormal: b[N, K], whether the result of a test is low, high or abnormal; None: not known.
    """

    cases: Cases
    rules: Rules
    codes: list[str]
    actions: list[str]
    sex: list[str] | None = None
    age: list[str] | None = None
    orders: list[list[str]] | None = None
    abnormal: np.ndarray | None = None


def embedded(patients: Patients, rules: Rules) -> Cohort:
    """Those of rlalign.clinical.generator, by its bands of age; what is ordered on record is panels."""
    panels = list(PANELS)
    names = []
    for row in np.asarray(rules.members):
        tests = row[row >= 0]
        panel = PANEL[tests[0]]
        names.append(panels[panel] if (panel == PANEL).sum() == len(tests) else f"{panels[panel]}:{CODES[tests[0]]}")
    ends = [f"{a}-{b - 1}" for a, b in itertools.pairwise(BANDS)]
    of = np.searchsorted(BANDS, patients.age, side="right") - 1
    return Cohort(
        cases_of(patients),
        rules,
        list(NAMES),
        names,
        ["male" if male else "female" for male in patients.male],
        [[*ends, f"{BANDS[-1]}+"][band] for band in of],
        [[panels[p] for p in np.unique(PANEL[row])] for row in patients.ordered],
        (patients.label == LOW) | (patients.label == HIGH),
    )


def workups(
    cohort: Cohort,
    asker: str,
    ranked: np.ndarray,
    belief: np.ndarray,
    *,
    action: np.ndarray | None = None,
    lists: np.ndarray | None = None,
    abstains: np.ndarray | None = None,
    rejects: np.ndarray | None = None,
) -> list[Workup]:
    """One record a patient.

    Args:
      cohort: the patients.
      asker: what the asker is called.
      ranked: i32[N, C], its list at the end.
      belief: f32[N, C], its probabilities then.
      action: i32[N, T], what it asked for; below 0, and from rules.stop on: nothing. None: it chose no tests.
      lists: i32[N, S, C], its lists after 0, 1, ... tests; None: not known.
      abstains: b[N]; None: never.
      rejects: f32[N], candidates turned down; None: not known.
    """
    codes, out = np.array(cohort.codes), []
    asked = None if action is None else np.where((action < 0) | (action >= cohort.rules.stop), -1, action)
    counts = None if asked is None else _counts(cohort, asked)
    for n, gold in enumerate(np.asarray(cohort.cases.gold)):
        best = ranked[n, :LISTED]
        # Rounded up, many probabilities could come to more than 1.
        p = np.floor(np.asarray(belief[n, best], np.float64) * 1e6) / 1e6
        results, abnormal, redundant = (None, None, None) if counts is None else (int(x) for x in counts[:, n])
        out.append(
            Workup(
                asker=asker,
                gold=tuple(codes[gold].tolist()),
                ranked=tuple(codes[best].tolist()),
                belief=tuple(np.clip(p, 0, 1).tolist()),
                tests=None if asked is None else tuple(cohort.actions[a] for a in asked[n] if a >= 0),
                orders=None if cohort.orders is None else tuple(cohort.orders[n]),
                results=None if cohort.abnormal is None else results,
                abnormal=None if cohort.abnormal is None else abnormal,
                redundant=redundant,
                rejects=None
                if rejects is None or asked is None
                else max(float(rejects[n]), 0.0),  # an expected number is 1 less a sum
                abstained=abstains is not None and bool(abstains[n]),
                sex=None if cohort.sex is None else cohort.sex[n],
                age=None if cohort.age is None else cohort.age[n],
                lists=None if lists is None else tuple(tuple(codes[one[:EARLIER]].tolist()) for one in lists[n]),
            )
        )
    return out


def played(cohort: Cohort, asker: str, asked: Asked) -> list[Workup]:
    """Of a baseline, which asks until the horizon."""
    lists = ranking(asked.posterior)
    return workups(cohort, asker, lists[:, -1], asked.posterior[:, -1], action=asked.action, lists=lists)


def tried(cohort: Cohort, asker: str, of: Trial) -> list[Workup]:
    """Of a policy that stops when it wants; its lists go on until the horizon."""
    own = of.stopped
    return workups(
        cohort,
        asker,
        own.ranked,
        own.belief,
        action=own.action,
        lists=of.ranked,
        abstains=own.abstains,
        rejects=own.rejects,
    )


def _counts(cohort: Cohort, asked: np.ndarray) -> np.ndarray:
    """i64[3, N]: results that the tests brought, abnormal ones of them, and tests that brought only what was known."""
    members, cases = np.asarray(cohort.rules.members), cohort.cases
    known, recorded = np.array(cases.told), np.asarray(cases.recorded)
    abnormal = np.zeros_like(recorded) if cohort.abnormal is None else cohort.abnormal
    brings = (np.arange(known.shape[1]) == members[:, :, None]).any(axis=1)  # b[A, K]
    out = np.zeros((3, len(asked)), int)
    for action in asked.T:
        new = brings[np.maximum(action, 0)] & (action >= 0)[:, None] & ~known
        out += (new & recorded).sum(axis=1), (new & recorded & abnormal).sum(axis=1), (action >= 0) & ~new.any(axis=1)
        known |= new
    return out
