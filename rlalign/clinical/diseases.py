"""The diseases and symptoms of the embedded patients: how common, what is felt, which results move.

ICD-10-CM codes and names (public domain) of DiaLLM's three systems (arXiv 2506.20059): metabolic and kidney (E, N),
respiratory (J), circulatory (I). How common a disease is among those who come, what its symptoms' chances
are and how far results move is our choice, in the order that textbooks describe, and no epidemiology: only what a
result counts as follows a published definition (ranges.py).
"""

from typing import NamedTuple

AGES = (18, 40, 60, 75)  # first year of each age band of `common`
OLDEST = 95

SYMPTOMS: dict[str, str] = {  # ICD-10-CM code -> its name
    "R05.9": "Cough, unspecified",
    "R06.02": "Shortness of breath",
    "R06.2": "Wheezing",
    "R07.9": "Chest pain, unspecified",
    "R50.9": "Fever, unspecified",
    "R53.83": "Other fatigue",
    "R60.9": "Edema, unspecified",
    "R63.1": "Polydipsia",
    "R35.89": "Other polyuria",
    "R63.4": "Abnormal weight loss",
    "R63.5": "Abnormal weight gain",
    "R00.2": "Palpitations",
    "R42": "Dizziness and giddiness",
    "R51.9": "Headache, unspecified",
    "R11.2": "Nausea with vomiting, unspecified",
    "R41.0": "Disorientation, unspecified",
}
BACKGROUND = 0.04  # chance of a symptom that a disease does not list


class Disease(NamedTuple):
    """A row of the table.

    Attributes:
      name: of ICD-10-CM.
      common: weight at AGES, of both sexes; weights of one age and sex are scaled to add up to 1.
      female: what the weight of women is multiplied by.
      chronic: whether it stays from one visit to the next.
      symptoms: words of `_FELT` -> chance.
      results: short name of a test -> shift, in robust standard deviations of the healthy logarithm, at severity 1.
    """

    name: str
    common: tuple[float, float, float, float]
    female: float
    chronic: bool
    symptoms: dict[str, float]
    results: dict[str, float]


_FELT = {
    "cough": "R05.9",
    "breathless": "R06.02",
    "wheeze": "R06.2",
    "chest pain": "R07.9",
    "fever": "R50.9",
    "tired": "R53.83",
    "edema": "R60.9",
    "thirst": "R63.1",
    "polyuria": "R35.89",
    "loss": "R63.4",
    "gain": "R63.5",
    "palpitations": "R00.2",
    "dizzy": "R42",
    "headache": "R51.9",
    "vomiting": "R11.2",
    "confused": "R41.0",
}

DISEASES: dict[str, Disease] = {
    "E11.9": Disease(
        "Type 2 diabetes mellitus without complications",
        (3.0, 8.0, 10.0, 8.0),
        0.85,
        True,
        {"thirst": 0.45, "polyuria": 0.45, "tired": 0.4, "loss": 0.1, "gain": 0.15},
        {"HbA1c": 3.5, "fasting glucose": 4.5, "glucose": 3.0, "triglycerides": 0.7, "HDL cholesterol": -0.5},
    ),
    "E10.9": Disease(
        "Type 1 diabetes mellitus without complications",
        (1.2, 0.4, 0.2, 0.1),
        0.9,
        True,
        {"thirst": 0.7, "polyuria": 0.7, "tired": 0.5, "loss": 0.55, "vomiting": 0.25},
        {"HbA1c": 5.5, "fasting glucose": 8.0, "glucose": 6.0, "bicarbonate": -1.8, "body mass index": -1.0},
    ),
    "E03.9": Disease(
        "Hypothyroidism, unspecified",
        (2.0, 3.5, 4.0, 4.0),
        3.0,
        True,
        {"tired": 0.7, "gain": 0.45, "edema": 0.2, "dizzy": 0.12},
        {"TSH": 3.5, "free T4": -2.6, "cholesterol": 0.9, "LDL cholesterol": 0.9, "heart rate": -1.0, "sodium": -0.4},
    ),
    "E05.90": Disease(
        "Thyrotoxicosis, unspecified without thyrotoxic crisis or storm",
        (1.0, 1.0, 0.8, 0.6),
        3.0,
        True,
        {"palpitations": 0.6, "loss": 0.5, "tired": 0.4, "dizzy": 0.15, "breathless": 0.15},
        {"TSH": -5.0, "free T4": 4.0, "heart rate": 2.3, "cholesterol": -0.8, "LDL cholesterol": -0.7},
    ),
    "E78.2": Disease(
        "Mixed hyperlipidemia",
        (3.0, 7.0, 7.0, 4.0),
        0.8,
        True,
        {"tired": 0.1, "gain": 0.12},
        {"cholesterol": 2.0, "LDL cholesterol": 1.8, "triglycerides": 1.9, "HDL cholesterol": -0.8},
    ),
    "E66.9": Disease(
        "Obesity, unspecified",
        (6.0, 7.0, 5.0, 2.0),
        1.2,
        True,
        {"gain": 0.6, "tired": 0.3, "breathless": 0.2, "edema": 0.1},
        {"body mass index": 2.0, "triglycerides": 0.6, "HDL cholesterol": -0.6, "urate": 0.6, "HbA1c": 0.4, "ALT": 0.5},
    ),
    "E87.1": Disease(
        "Hypo-osmolality and hyponatremia",
        (0.4, 0.8, 2.0, 4.0),
        1.3,
        False,
        {"confused": 0.45, "vomiting": 0.4, "headache": 0.35, "tired": 0.4, "dizzy": 0.3},
        {"sodium": -4.5, "chloride": -3.0, "urea nitrogen": -0.7, "urate": -0.8},
    ),
    "E21.0": Disease(
        "Primary hyperparathyroidism",
        (0.1, 0.4, 0.7, 0.6),
        2.5,
        True,
        {"tired": 0.5, "thirst": 0.3, "polyuria": 0.3, "vomiting": 0.2, "confused": 0.12},
        {"calcium": 4.0, "alkaline phosphatase": 1.0, "chloride": 0.7, "urate": 0.4},
    ),
    "E27.1": Disease(
        "Primary adrenocortical insufficiency",
        (0.25, 0.3, 0.2, 0.1),
        1.5,
        True,
        {"tired": 0.8, "loss": 0.6, "vomiting": 0.45, "dizzy": 0.5},
        {"sodium": -2.8, "potassium": 2.8, "systolic blood pressure": -2.0, "eosinophils": 1.3, "glucose": -1.2},
    ),
    "E83.110": Disease(
        "Hereditary hemochromatosis",
        (0.1, 0.5, 0.4, 0.2),
        0.4,
        True,
        {"tired": 0.65, "loss": 0.2, "palpitations": 0.12},
        {"ferritin": 4.0, "ALT": 1.8, "AST": 1.8, "GGT": 0.8, "HbA1c": 0.6},
    ),
    "N18.30": Disease(
        "Chronic kidney disease, stage 3 unspecified",
        (0.6, 2.0, 6.0, 9.0),
        1.1,
        True,
        {"tired": 0.35, "edema": 0.3, "polyuria": 0.2},
        {
            "eGFR": -3.8,
            "creatinine": 2.6,
            "urea nitrogen": 1.8,
            "urine albumin/creatinine": 2.4,
            "urate": 1.2,
            "hemoglobin": -1.0,
            "hematocrit": -1.0,
            "potassium": 0.8,
            "bicarbonate": -0.7,
        },
    ),
    "N17.9": Disease(
        "Acute kidney failure, unspecified",
        (0.5, 1.0, 2.5, 4.0),
        0.8,
        False,
        {"vomiting": 0.4, "edema": 0.35, "confused": 0.3, "tired": 0.4, "breathless": 0.2},
        {
            "creatinine": 6.0,
            "urea nitrogen": 4.0,
            "eGFR": -7.0,
            "potassium": 2.4,
            "bicarbonate": -2.0,
            "C-reactive protein": 1.0,
            "arterial pH": -1.5,
            "lactate": 0.8,
        },
    ),
    "J18.9": Disease(
        "Pneumonia, unspecified organism",
        (2.0, 3.0, 5.0, 8.0),
        0.9,
        False,
        {"cough": 0.8, "fever": 0.75, "breathless": 0.55, "chest pain": 0.3, "confused": 0.15, "tired": 0.4},
        {
            "C-reactive protein": 3.8,
            "leukocytes": 2.3,
            "procalcitonin": 4.0,
            "sedimentation rate": 1.8,
            "temperature": 4.0,
            "respiratory rate": 3.0,
            "oxygen saturation": -3.0,
            "arterial pO2": -2.5,
            "heart rate": 1.6,
            "sodium": -0.8,
            "albumin": -1.0,
        },
    ),
    "J44.9": Disease(
        "Chronic obstructive pulmonary disease, unspecified",
        (0.2, 3.0, 7.0, 7.0),
        0.9,
        True,
        {"breathless": 0.8, "cough": 0.7, "wheeze": 0.45, "tired": 0.25},
        {
            "FEV1/FVC": -4.0,
            "arterial pCO2": 2.4,
            "bicarbonate": 1.3,
            "oxygen saturation": -2.2,
            "arterial pO2": -2.2,
            "hemoglobin": 0.7,
            "hematocrit": 0.7,
            "respiratory rate": 1.4,
        },
    ),
    "J45.901": Disease(
        "Unspecified asthma with (acute) exacerbation",
        (4.0, 3.0, 1.5, 1.0),
        1.4,
        True,
        {"wheeze": 0.8, "breathless": 0.8, "cough": 0.6, "chest pain": 0.2},
        {
            "FEV1/FVC": -3.2,
            "eosinophils": 2.2,
            "respiratory rate": 2.4,
            "heart rate": 1.4,
            "arterial pCO2": -1.4,
            "oxygen saturation": -1.5,
        },
    ),
    "J11.1": Disease(
        "Influenza due to unidentified influenza virus with other respiratory manifestations",
        (5.0, 4.0, 3.0, 3.0),
        1.0,
        False,
        {"fever": 0.85, "cough": 0.75, "headache": 0.55, "tired": 0.7, "vomiting": 0.12},
        {"temperature": 4.5, "C-reactive protein": 1.6, "leukocytes": -0.9, "heart rate": 1.2, "platelets": -0.5},
    ),
    "J20.9": Disease(
        "Acute bronchitis, unspecified",
        (5.0, 5.0, 4.0, 3.0),
        1.1,
        False,
        {"cough": 0.95, "fever": 0.3, "wheeze": 0.25, "breathless": 0.25, "chest pain": 0.15},
        {"C-reactive protein": 1.0, "leukocytes": 0.5, "temperature": 1.0},
    ),
    "J84.10": Disease(
        "Pulmonary fibrosis, unspecified",
        (0.05, 0.3, 1.0, 1.2),
        0.7,
        True,
        {"breathless": 0.9, "cough": 0.75, "tired": 0.4, "loss": 0.2},
        {
            "oxygen saturation": -2.6,
            "arterial pO2": -2.6,
            "arterial pCO2": -1.2,
            "FEV1/FVC": 1.0,
            "respiratory rate": 1.8,
            "sedimentation rate": 0.8,
        },
    ),
    "I10": Disease(
        "Essential (primary) hypertension",
        (4.0, 10.0, 12.0, 10.0),
        0.95,
        True,
        {"headache": 0.3, "dizzy": 0.25},
        {"systolic blood pressure": 2.0, "diastolic blood pressure": 1.8, "urine albumin/creatinine": 0.5},
    ),
    "I50.9": Disease(
        "Heart failure, unspecified",
        (0.2, 1.5, 5.0, 9.0),
        0.9,
        True,
        {"breathless": 0.85, "edema": 0.7, "tired": 0.55, "palpitations": 0.2, "gain": 0.2, "cough": 0.25},
        {
            "NT-proBNP": 4.5,
            "sodium": -1.2,
            "creatinine": 1.0,
            "urea nitrogen": 1.2,
            "eGFR": -1.2,
            "oxygen saturation": -1.2,
            "heart rate": 1.0,
            "troponin I": 0.9,
            "respiratory rate": 1.4,
        },
    ),
    "I21.4": Disease(
        "Non-ST elevation (NSTEMI) myocardial infarction",
        (0.3, 2.0, 3.5, 4.0),
        0.6,
        False,
        {"chest pain": 0.85, "breathless": 0.4, "vomiting": 0.25, "dizzy": 0.15, "palpitations": 0.15},
        {"troponin I": 6.5, "NT-proBNP": 1.6, "AST": 1.2, "glucose": 1.0, "leukocytes": 0.7, "heart rate": 0.5},
    ),
    "I48.91": Disease(
        "Unspecified atrial fibrillation",
        (0.2, 1.2, 4.0, 7.0),
        0.8,
        True,
        {"palpitations": 0.7, "dizzy": 0.3, "tired": 0.35, "breathless": 0.35, "chest pain": 0.1},
        {"heart rate": 3.0, "NT-proBNP": 2.4, "TSH": -0.4, "systolic blood pressure": -0.4},
    ),
    "I26.99": Disease(
        "Other pulmonary embolism without acute cor pulmonale",
        (0.6, 1.0, 1.6, 2.0),
        1.1,
        False,
        {"breathless": 0.8, "chest pain": 0.6, "cough": 0.2, "dizzy": 0.2, "palpitations": 0.25, "edema": 0.2},
        {
            "D-dimer": 4.5,
            "oxygen saturation": -2.2,
            "arterial pO2": -2.2,
            "arterial pCO2": -2.2,
            "heart rate": 2.0,
            "respiratory rate": 2.4,
            "troponin I": 1.2,
            "NT-proBNP": 1.2,
        },
    ),
    "I33.0": Disease(
        "Acute and subacute infective endocarditis",
        (0.2, 0.3, 0.4, 0.5),
        0.6,
        False,
        {"fever": 0.9, "tired": 0.55, "loss": 0.35, "breathless": 0.3, "edema": 0.15},
        {
            "C-reactive protein": 3.4,
            "sedimentation rate": 3.2,
            "procalcitonin": 2.4,
            "leukocytes": 1.7,
            "hemoglobin": -1.8,
            "hematocrit": -1.8,
            "temperature": 3.0,
            "albumin": -1.2,
            "urine albumin/creatinine": 1.2,
            "D-dimer": 1.2,
            "NT-proBNP": 1.2,
        },
    ),
}
NAMES = tuple(DISEASES)  # the order of diseases wherever they are columns
CHANCES: dict[str, dict[str, float]] = {  # disease -> symptom's code -> chance
    code: {_FELT[word]: chance for word, chance in disease.symptoms.items()} for code, disease in DISEASES.items()
}

TOGETHER: dict[tuple[str, str], float] = {  # two diseases -> how many times as likely the second is beside the first
    ("E11.9", "E78.2"): 3.0,
    ("E11.9", "I10"): 2.5,
    ("E11.9", "E66.9"): 3.0,
    ("E11.9", "N18.30"): 2.5,
    ("E66.9", "I10"): 2.0,
    ("E66.9", "E78.2"): 2.0,
    ("I10", "N18.30"): 2.5,
    ("I10", "I50.9"): 2.5,
    ("I10", "I48.91"): 2.0,
    ("I50.9", "I48.91"): 4.0,
    ("I50.9", "N18.30"): 2.5,
    ("I50.9", "I21.4"): 2.0,
    ("N18.30", "N17.9"): 3.0,
    ("J44.9", "J18.9"): 3.0,
    ("J44.9", "I50.9"): 2.0,
    ("J11.1", "J18.9"): 2.0,
    ("E10.9", "E03.9"): 3.0,
    ("E10.9", "E27.1"): 5.0,
}
APART: tuple[tuple[str, str], ...] = (("E11.9", "E10.9"), ("E03.9", "E05.90"))  # never both
