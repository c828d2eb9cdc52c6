"""Laboratory results of people without the diseases of the table: quantiles by sex, what varies together, precision.

NHANES: 2017 to March 2020, pre-pandemic public files of the CDC (public domain), people of 45 to 65 years with HbA1c
below 6.5 %, unweighted, as carebundle 0.5.0 (Apache-2.0) summarises them (n = 584 to 1,301 each). Other tests: the
interval that holds 95 % of healthy adults and its median, our choice near the reference ranges of ranges.py. Healthy is
what is common, not what is ideal: most have a body mass index that counts as high.

One factor a panel makes its results vary together (LOADINGS), the products of which come within .3 of the published
correlations: of women, hemoglobin and hematocrit .72 for .96, sodium and chloride .64 for .65, ALT and AST .72 for .78,
triglycerides and HDL -.42 for -.45, systolic and diastolic pressure .64 for .70. Five are further away, as panels are
independent and have one factor each: urea nitrogen and creatinine 0 for .44 (men .54), calcium and albumin 0 for .47,
platelets and leukocytes 0 for .37, HbA1c and glucose 0 for .35, chloride and bicarbonate .16 for -.27.
"""

import math
import statistics

import numpy as np

from rlalign.clinical.loinc import TESTS

LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NHANES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # LOINC code -> female, male: quantiles at LEVELS
    "6690-2": ((3.2, 4.0, 5.4, 6.6, 8.1, 11.0, 12.9), (3.4, 4.2, 5.5, 6.8, 8.2, 10.7, 12.9)),
    "789-8": ((3.58, 3.92, 4.3, 4.54, 4.79, 5.18, 5.62), (3.64, 4.18, 4.65, 4.94, 5.21, 5.67, 6.16)),
    "718-7": ((8.9, 11.3, 12.7, 13.5, 14.1, 15.1, 16.0), (11.0, 12.7, 14.2, 15.0, 15.8, 16.7, 17.6)),
    "4544-3": ((28.6, 34.4, 38.0, 40.2, 42.1, 44.9, 47.4), (34.1, 38.09, 42.1, 44.2, 46.2, 49.3, 51.8)),
    "777-3": ((121.0, 165.0, 216.0, 253.0, 296.25, 378.0, 452.07), (104.99, 143.0, 192.0, 223.0, 259.0, 332.05, 389.0)),
    "2951-2": ((135.0, 137.0, 139.0, 141.0, 143.0, 145.0, 146.0), (134.0, 136.0, 139.0, 141.0, 142.0, 144.0, 146.0)),
    "2823-3": ((3.2, 3.4, 3.8, 4.0, 4.2, 4.5, 4.7), (3.3, 3.6, 3.9, 4.1, 4.4, 4.7, 5.0)),
    "2075-0": ((94.65, 97.0, 100.0, 102.0, 103.0, 106.0, 108.0), (94.0, 96.45, 100.0, 101.0, 103.0, 106.0, 108.0)),
    "2028-9": ((20.0, 22.0, 24.0, 26.0, 27.0, 29.0, 31.0), (20.0, 22.0, 24.0, 26.0, 27.0, 29.0, 31.0)),
    "3094-0": ((6.0, 8.0, 11.0, 13.0, 16.0, 22.0, 28.36), (7.0, 9.0, 12.0, 15.0, 18.0, 23.0, 29.62)),
    "2160-0": ((0.46, 0.54, 0.64, 0.73, 0.84, 1.04, 1.29), (0.61, 0.7, 0.85, 0.97, 1.1, 1.36, 1.99)),
    "2345-7": ((71.0, 79.0, 87.0, 92.0, 99.0, 116.0, 133.36), (70.69, 79.45, 88.0, 94.0, 101.0, 118.0, 138.62)),
    "17861-6": ((8.4, 8.7, 9.0, 9.2, 9.5, 9.9, 10.34), (8.4, 8.7, 9.0, 9.2, 9.5, 9.8, 10.1)),
    "1742-6": ((7.0, 9.0, 13.0, 16.0, 23.0, 41.0, 71.08), (8.0, 11.0, 16.0, 22.0, 30.0, 56.0, 101.32)),
    "1920-8": ((11.0, 12.0, 16.0, 18.0, 23.0, 37.0, 75.0), (12.0, 14.0, 18.0, 21.0, 26.0, 44.0, 90.14)),
    "6768-6": ((37.64, 48.0, 66.0, 80.0, 97.0, 126.0, 166.8), (38.68, 48.0, 63.0, 74.0, 88.0, 117.6, 154.96)),
    "1975-2": ((0.1, 0.2, 0.3, 0.3, 0.5, 0.8, 1.1), (0.2, 0.2, 0.3, 0.5, 0.6, 1.1, 1.6)),
    "1751-7": ((3.17, 3.5, 3.8, 4.0, 4.2, 4.5, 4.7), (3.2, 3.6, 3.9, 4.1, 4.3, 4.6, 4.8)),
    "2093-3": ((119.0, 140.0, 176.0, 198.0, 225.0, 271.0, 306.12), (105.25, 127.0, 165.0, 188.5, 217.0, 259.0, 294.5)),
    "2085-9": ((31.0, 37.0, 48.0, 57.0, 70.0, 91.0, 118.0), (28.0, 32.0, 40.0, 47.0, 57.0, 75.0, 101.0)),
    "13457-7": ((46.76, 64.9, 92.0, 115.0, 138.0, 177.2, 215.24), (45.3, 61.0, 92.0, 115.0, 138.0, 178.0, 205.85)),
    "2571-8": ((30.42, 39.1, 64.0, 88.0, 127.0, 221.7, 357.8), (30.0, 40.0, 67.25, 94.0, 138.75, 262.4, 386.3)),
    "4548-4": ((4.8, 5.0, 5.4, 5.6, 5.8, 6.2, 6.4), (4.6, 4.9, 5.4, 5.6, 5.9, 6.3, 6.4)),
    "8480-6": ((91.0, 99.0, 111.0, 122.0, 135.0, 158.0, 178.0), (94.0, 104.0, 116.0, 127.0, 139.0, 162.0, 180.84)),
    "8462-4": ((54.81, 60.0, 70.0, 77.0, 85.0, 97.0, 106.19), (54.16, 61.0, 71.0, 78.0, 86.0, 99.0, 109.0)),
    "39156-5": ((18.2, 20.23, 25.1, 29.2, 34.6, 46.13, 56.15), (18.19, 21.1, 25.2, 28.5, 32.0, 41.16, 47.5)),
}
INTERVALS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {  # at .025, .5, .975
    "711-2": ((0.04, 0.16, 0.49), (0.04, 0.18, 0.52)),
    "2324-2": ((7, 17, 50), (9, 25, 65)),
    "1558-6": ((78, 93, 111), (80, 96, 114)),
    "98979-8": ((62, 93, 120), (62, 92, 118)),
    "9318-7": ((3, 8, 40), (2, 6, 35)),
    "3084-1": ((2.9, 4.8, 7.4), (3.7, 6.0, 8.7)),
    "3016-3": ((0.45, 1.6, 4.4), (0.45, 1.6, 4.2)),
    "3024-7": ((0.9, 1.2, 1.65), (0.9, 1.2, 1.65)),
    "33762-6": ((12, 55, 220), (7, 35, 180)),
    "10839-9": ((0.003, 0.01, 0.035), (0.003, 0.012, 0.038)),
    "48065-7": ((0.12, 0.3, 0.8), (0.12, 0.28, 0.75)),
    "1988-5": ((0.3, 1.8, 12), (0.3, 1.5, 10)),
    "30341-2": ((3, 12, 32), (2, 8, 24)),
    "75241-0": ((0.02, 0.04, 0.09), (0.02, 0.04, 0.09)),
    "2276-4": ((12, 70, 220), (30, 140, 350)),
    "2744-1": ((7.36, 7.4, 7.44), (7.36, 7.4, 7.44)),
    "2019-8": ((34, 39, 44), (35, 40, 45)),
    "2703-7": ((76, 90, 103), (76, 90, 103)),
    "2524-7": ((0.5, 1.0, 1.9), (0.5, 1.0, 1.9)),
    "19926-5": ((70, 80, 89), (68, 78, 87)),
    "8867-4": ((56, 74, 98), (54, 71, 96)),
    "9279-1": ((12, 15, 19), (12, 15, 19)),
    "8310-5": ((36.1, 36.7, 37.4), (36.1, 36.7, 37.4)),
    "59408-5": ((95, 97.5, 99.5), (95, 97.5, 99.5)),
}
LOADINGS: dict[str, float] = {  # short name of a test -> correlation with its panel's factor; 0 where it is not here
    "hemoglobin": 0.85,
    "hematocrit": 0.85,
    "erythrocytes": 0.65,
    "sodium": 0.8,
    "chloride": 0.8,
    "potassium": 0.2,
    "bicarbonate": 0.2,
    "ALT": 0.85,
    "AST": 0.85,
    "GGT": 0.5,
    "alkaline phosphatase": 0.2,
    "cholesterol": 0.5,
    "LDL cholesterol": 0.4,
    "HDL cholesterol": -0.6,
    "triglycerides": 0.7,
    "HbA1c": 0.6,
    "fasting glucose": 0.6,
    "eGFR": -0.5,
    "urine albumin/creatinine": 0.4,
    "urate": 0.4,
    "TSH": 0.4,
    "free T4": -0.4,
    "NT-proBNP": 0.4,
    "troponin I": 0.4,
    "D-dimer": 0.3,
    "C-reactive protein": 0.7,
    "sedimentation rate": 0.7,
    "procalcitonin": 0.4,
    "ferritin": 0.3,
    "arterial pH": -0.5,
    "arterial pCO2": 0.5,
    "arterial pO2": -0.3,
    "lactate": 0.3,
    "systolic blood pressure": 0.8,
    "diastolic blood pressure": 0.8,
    "heart rate": 0.2,
}
DECIMALS: dict[str, int] = {  # short name -> places that are reported; 0 where it is not here
    **dict.fromkeys(("eosinophils", "erythrocytes", "creatinine", "TSH", "free T4", "D-dimer", "procalcitonin"), 2),
    **dict.fromkeys(("leukocytes", "hemoglobin", "hematocrit", "potassium", "calcium", "bilirubin", "albumin"), 1),
    **dict.fromkeys(("HbA1c", "urate", "C-reactive protein", "lactate", "temperature", "body mass index"), 1),
    "arterial pH": 2,
    "troponin I": 3,
}
CODES = tuple(TESTS)  # the order of tests wherever they are columns
SHORT = tuple(test.short for test in TESTS.values())
NORMAL_CDF = np.vectorize(statistics.NormalDist().cdf, otypes=[float])


def knots(code: str, male: bool) -> tuple[np.ndarray, np.ndarray]:
    """(z f64[n], x f64[n]): normal scores and the logarithms of the results there, both increasing.

    Equal quantiles of coarsely reported results are set 2 % of their precision apart.
    """
    table, levels = (NHANES, LEVELS) if code in NHANES else (INTERVALS, (0.025, 0.5, 0.975))
    values = np.array(table[code][male], float)
    step = 0.02 * 10.0 ** -DECIMALS.get(TESTS[code].short, 0)
    values = np.maximum.accumulate(values + step * np.arange(len(values))) if (np.diff(values) <= 0).any() else values
    return np.array([statistics.NormalDist().inv_cdf(p) for p in levels]), np.log(values)


def robust_sd(code: str, male: bool) -> float:
    """Of the logarithm of healthy results: the distance of its quartiles over 1.349, or of its 95 % over 3.92."""
    z, x = knots(code, male)
    low, high = (2, 4) if code in NHANES else (0, 2)
    return float((x[high] - x[low]) / (z[high] - z[low]))


def results_at(z: np.ndarray, code: str, male: bool) -> np.ndarray:
    """Logarithms of healthy results at normal scores f64[...]: linear between the quantiles and beyond them."""
    return _line(z, *knots(code, male))


def scores_at(x: np.ndarray, code: str, male: bool) -> np.ndarray:
    """The inverse of results_at."""
    z, of = knots(code, male)
    return _line(x, of, z)


def _line(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slope = np.diff(y) / np.diff(x)
    place = np.clip(np.searchsorted(x, at) - 1, 0, len(slope) - 1)
    return y[place] + slope[place] * (at - x[place])


def rounded(value: np.ndarray, short: str) -> np.ndarray:
    """As the laboratory reports them."""
    return np.round(value, DECIMALS.get(short, 0))


def edges(low: float | None, high: float | None, short: str) -> tuple[float, float]:
    """(below, above): an unrounded result is reported as low where it is under `below`, as high where over `above`.

    >>> edges(3.5, 5.0, "potassium")
    (3.45, 5.05)
    """
    unit = 10.0 ** -DECIMALS.get(short, 0)
    below = -math.inf if low is None else (math.ceil(low / unit - 1e-6) - 0.5) * unit
    above = math.inf if high is None else (math.floor(high / unit + 1e-6) + 0.5) * unit
    return round(below, 9), round(above, 9)
