"""The embedded patients' tables beside those of others: ICD-10-CM's names, and NHANES as carebundle has it.

make test-clinical.
"""

import importlib.resources
import json

import numpy as np
import pytest

pytest.importorskip("carebundle", reason='pip install "rlalign[clinical]"')
pytest.importorskip("simple_icd_10_cm", reason='pip install "rlalign[clinical]"')

import simple_icd_10_cm as icd

from rlalign.clinical import diseases, generator, healthy
from rlalign.clinical.loinc import TESTS

SHARE = 0.03  # of the people: how far a marginal may be from NHANES
COUNT = 20_000  # of each sex
ANALYTES = {  # carebundle's name -> LOINC code; height and weight are no tests here
    "wbc": "6690-2",
    "rbc": "789-8",
    "hemoglobin": "718-7",
    "hematocrit": "4544-3",
    "platelets": "777-3",
    "sodium": "2951-2",
    "potassium": "2823-3",
    "chloride": "2075-0",
    "co2": "2028-9",
    "bun": "3094-0",
    "creatinine": "2160-0",
    "glucose": "2345-7",
    "calcium": "17861-6",
    "alt": "1742-6",
    "ast": "1920-8",
    "alkaline_phosphatase": "6768-6",
    "bilirubin_total": "1975-2",
    "albumin": "1751-7",
    "cholesterol_total": "2093-3",
    "hdl": "2085-9",
    "ldl": "13457-7",
    "triglycerides": "2571-8",
    "hba1c": "4548-4",
    "systolic": "8480-6",
    "diastolic": "8462-4",
    "bmi": "39156-5",
}
NOT_MODELLED = {"bun~creatinine", "calcium~albumin", "chloride~co2", "platelets~wbc", "hba1c~glucose"}


@pytest.fixture(scope="module")
def nhanes():
    path = importlib.resources.files("carebundle") / "calibration" / "data" / "nhanes_targets.json"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def values():
    """Results f64[N, K] of people without the diseases, female and male."""
    rng, nothing = np.random.default_rng(0), np.zeros((2 * COUNT, len(diseases.NAMES)), bool)
    male = np.arange(2 * COUNT) >= COUNT
    own = rng.standard_normal((2 * COUNT, len(healthy.CODES)))
    seen = generator._visit(rng, np.full(2 * COUNT, 55), male, nothing, nothing, own)
    return {"F": seen.value[:COUNT], "M": seen.value[COUNT:]}


CODES = {**diseases.SYMPTOMS, **{code: row.name for code, row in diseases.DISEASES.items()}}


@pytest.mark.parametrize("code", CODES)
def test_codes_and_names_are_those_of_icd_10_cm(code):
    assert icd.is_valid_item(code)
    assert icd.is_leaf(code)  # what a record may hold: no heading
    assert icd.get_description(code) == CODES[code]
    assert icd.is_category(code[:3])


def test_what_carebundle_has_is_compared(nhanes):
    assert set(ANALYTES) == {key.split("/")[2] for key in nhanes["strata"]} - {"height_cm", "weight_kg"}
    assert set(ANALYTES.values()) == set(healthy.NHANES)


@pytest.mark.parametrize("sex", ["F", "M"])
@pytest.mark.parametrize("analyte", ANALYTES)
def test_healthy_marginals_are_those_of_nhanes(analyte, sex, nhanes, values):
    """Of people with HbA1c below 6.5 %, at all eleven quantiles, four of which are not in the table.

    A quantile q at level p of results that are rounded fits where P(x < q) - SHARE <= p <= P(x <= q) + SHARE, with four
    standard errors of the draw beside SHARE.
    """
    code = ANALYTES[analyte]
    k = healthy.CODES.index(code)
    quantiles = dict(nhanes["strata"][f"{sex}/nondiabetic/{analyte}"]["quantiles"])
    assert healthy.NHANES[code][sex == "M"] == pytest.approx([quantiles[p] for p in healthy.LEVELS], abs=0.0051)
    half = 0.5 * 10.0 ** -healthy.DECIMALS.get(healthy.SHORT[k], 0)
    seen = values[sex][:, k]
    seen = seen[~np.isnan(seen)]
    assert len(quantiles) == 11
    for level, quantile in quantiles.items():
        under, upto = np.mean(seen < quantile - half), np.mean(seen <= quantile + half)
        far = SHARE + 4 * (level * (1 - level) / len(seen)) ** 0.5
        assert under - far <= level <= upto + far, (level, quantile, under, upto)


def test_correlations_that_are_not_modelled_are_named(nhanes):
    """All others of one factor a panel come within .3 of NHANES."""
    far = set()
    for key, found in nhanes["correlations"].items():
        _, stratum, pair = key.split("/")
        tests = [TESTS[ANALYTES[name]] for name in pair.split("~") if name in ANALYTES]
        if stratum != "nondiabetic" or len(tests) < 2:
            continue
        together = tests[0].panel == tests[1].panel
        ours = together * np.prod([healthy.LOADINGS.get(test.short, 0.0) for test in tests])
        if abs(ours - found["pearson"]) > 0.3:
            far.add(pair)
    assert far == NOT_MODELLED
