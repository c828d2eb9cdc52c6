"""The laboratory tests and vital signs of the embedded table: LOINC codes, names, units and panels.

Names are LOINC's long common names, unaltered, and NOTICE goes with every copy of them. Panels are ours: what hospitals
order and report together.
"""

from typing import NamedTuple

NOTICE = (
    "This material contains content from LOINC (http://loinc.org). LOINC is copyright © Regenstrief Institute, Inc. "
    "and the Logical Observation Identifiers Names and Codes (LOINC) Committee and is available at no cost under the "
    "license at http://loinc.org/license. LOINC® is a registered United States trademark of Regenstrief Institute, Inc."
)


class Test(NamedTuple):
    """What is measured.

    Attributes:
      name: LOINC's.
      short: in a word or two; no two tests share theirs.
      unit: that of the embedded ranges, in UCUM.
      panel: of PANELS.
    """

    __test__ = False  # pytest collects classes of this name

    name: str
    short: str
    unit: str
    panel: str


_PANELS: dict[str, dict[str, tuple[str, str, str]]] = {  # panel -> code -> name, short, unit
    "blood count": {
        "6690-2": ("Leukocytes [#/volume] in Blood by Automated count", "leukocytes", "10*3/uL"),
        "711-2": ("Eosinophils [#/volume] in Blood by Automated count", "eosinophils", "10*3/uL"),
        "789-8": ("Erythrocytes [#/volume] in Blood by Automated count", "erythrocytes", "10*6/uL"),
        "718-7": ("Hemoglobin [Mass/volume] in Blood", "hemoglobin", "g/dL"),
        "4544-3": ("Hematocrit [Volume Fraction] of Blood by Automated count", "hematocrit", "%"),
        "777-3": ("Platelets [#/volume] in Blood by Automated count", "platelets", "10*3/uL"),
    },
    "basic metabolic panel": {
        "2951-2": ("Sodium [Moles/volume] in Serum or Plasma", "sodium", "mmol/L"),
        "2823-3": ("Potassium [Moles/volume] in Serum or Plasma", "potassium", "mmol/L"),
        "2075-0": ("Chloride [Moles/volume] in Serum or Plasma", "chloride", "mmol/L"),
        "2028-9": ("Carbon dioxide, total [Moles/volume] in Serum or Plasma", "bicarbonate", "mmol/L"),
        "3094-0": ("Urea nitrogen [Mass/volume] in Serum or Plasma", "urea nitrogen", "mg/dL"),
        "2160-0": ("Creatinine [Mass/volume] in Serum or Plasma", "creatinine", "mg/dL"),
        "2345-7": ("Glucose [Mass/volume] in Serum or Plasma", "glucose", "mg/dL"),
        "17861-6": ("Calcium [Mass/volume] in Serum or Plasma", "calcium", "mg/dL"),
    },
    "liver panel": {
        "1742-6": ("Alanine aminotransferase [Enzymatic activity/volume] in Serum or Plasma", "ALT", "U/L"),
        "1920-8": ("Aspartate aminotransferase [Enzymatic activity/volume] in Serum or Plasma", "AST", "U/L"),
        "6768-6": (
            "Alkaline phosphatase [Enzymatic activity/volume] in Serum or Plasma",
            "alkaline phosphatase",
            "U/L",
        ),
        "2324-2": ("Gamma glutamyl transferase [Enzymatic activity/volume] in Serum or Plasma", "GGT", "U/L"),
        "1975-2": ("Bilirubin.total [Mass/volume] in Serum or Plasma", "bilirubin", "mg/dL"),
        "1751-7": ("Albumin [Mass/volume] in Serum or Plasma", "albumin", "g/dL"),
    },
    "lipid panel": {
        "2093-3": ("Cholesterol [Mass/volume] in Serum or Plasma", "cholesterol", "mg/dL"),
        "2085-9": ("Cholesterol in HDL [Mass/volume] in Serum or Plasma", "HDL cholesterol", "mg/dL"),
        "13457-7": (
            "Cholesterol in LDL [Mass/volume] in Serum or Plasma by calculation",
            "LDL cholesterol",
            "mg/dL",
        ),
        "2571-8": ("Triglyceride [Mass/volume] in Serum or Plasma", "triglycerides", "mg/dL"),
    },
    "diabetes panel": {
        "4548-4": ("Hemoglobin A1c/Hemoglobin.total in Blood", "HbA1c", "%"),
        "1558-6": ("Fasting glucose [Mass/volume] in Serum or Plasma", "fasting glucose", "mg/dL"),
    },
    "kidney panel": {
        "98979-8": (
            "Glomerular filtration rate [Volume Rate/Area] in Serum, Plasma or Blood by Creatinine-based formula "
            "(CKD-EPI 2021)/1.73 sq M",
            "eGFR",
            "mL/min/{1.73_m2}",
        ),
        "9318-7": ("Albumin/Creatinine [Mass Ratio] in Urine", "urine albumin/creatinine", "mg/g"),
        "3084-1": ("Urate [Mass/volume] in Serum or Plasma", "urate", "mg/dL"),
    },
    "thyroid panel": {
        "3016-3": ("Thyrotropin [Units/volume] in Serum or Plasma", "TSH", "m[IU]/L"),
        "3024-7": ("Thyroxine (T4) free [Mass/volume] in Serum or Plasma", "free T4", "ng/dL"),
    },
    "heart panel": {
        "33762-6": (
            "Natriuretic peptide.B prohormone N-Terminal [Mass/volume] in Serum or Plasma",
            "NT-proBNP",
            "pg/mL",
        ),
        "10839-9": ("Troponin I.cardiac [Mass/volume] in Serum or Plasma", "troponin I", "ng/mL"),
        "48065-7": ("Fibrin D-dimer FEU [Mass/volume] in Platelet poor plasma", "D-dimer", "ug/mL{FEU}"),
    },
    "inflammation panel": {
        "1988-5": ("C reactive protein [Mass/volume] in Serum or Plasma", "C-reactive protein", "mg/L"),
        "30341-2": ("Erythrocyte [Sedimentation Rate] in Blood", "sedimentation rate", "mm/h"),
        "75241-0": ("Procalcitonin [Mass/volume] in Serum or Plasma by Immunoassay", "procalcitonin", "ng/mL"),
        "2276-4": ("Ferritin [Mass/volume] in Serum or Plasma", "ferritin", "ng/mL"),
    },
    "blood gas": {
        "2744-1": ("pH of Arterial blood", "arterial pH", "[pH]"),
        "2019-8": ("Carbon dioxide [Partial pressure] in Arterial blood", "arterial pCO2", "mm[Hg]"),
        "2703-7": ("Oxygen [Partial pressure] in Arterial blood", "arterial pO2", "mm[Hg]"),
        "2524-7": ("Lactate [Moles/volume] in Serum or Plasma", "lactate", "mmol/L"),
    },
    "spirometry": {
        "19926-5": ("FEV1/FVC", "FEV1/FVC", "%"),
    },
    "vital signs": {
        "8480-6": ("Systolic blood pressure", "systolic blood pressure", "mm[Hg]"),
        "8462-4": ("Diastolic blood pressure", "diastolic blood pressure", "mm[Hg]"),
        "8867-4": ("Heart rate", "heart rate", "/min"),
        "9279-1": ("Respiratory rate", "respiratory rate", "/min"),
        "8310-5": ("Body temperature", "temperature", "Cel"),
        "59408-5": ("Oxygen saturation in Arterial blood by Pulse oximetry", "oxygen saturation", "%"),
        "39156-5": ("Body mass index (BMI) [Ratio]", "body mass index", "kg/m2"),
    },
}

TESTS: dict[str, Test] = {
    code: Test(name, short, unit, panel)
    for panel, tests in _PANELS.items()
    for code, (name, short, unit) in tests.items()
}
PANELS: dict[str, tuple[str, ...]] = {panel: tuple(tests) for panel, tests in _PANELS.items()}  # panel -> codes


def check_digit(number: int) -> int:
    """The digit after the hyphen of a LOINC code: Mod 10, every second digit from the right doubled.

    Source: LOINC Users' Guide, appendix on the Mod 10 check digit.

    >>> check_digit(12345)
    5
    """
    total, left, double = 0, number, True
    while left:
        left, digit = divmod(left, 10)
        total += sum(divmod(2 * digit, 10)) if double else digit
        double = not double
    return -total % 10


def is_loinc(code: str) -> bool:
    """Whether a text has the form of a LOINC code and the check digit that belongs to it.

    >>> is_loinc("718-7"), is_loinc("718-8"), is_loinc("hemoglobin")
    (True, False, False)
    """
    number, _, digit = code.partition("-")
    return number.isascii() and number.isdigit() and digit == str(check_digit(int(number)))
