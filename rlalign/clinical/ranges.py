"""Reference ranges of adults, by unit, sex and age band, each with its source.

A bound that a source gives as "< 200" is the largest value below it at the precision that laboratories report.

The rows of NBME and ABIM agree with what public repositories have typed from these documents (NBME's of 2026, ABIM's
without a year); neither they nor any other row was compared with the document itself.
"""

from typing import NamedTuple

SOURCES = {
    "ABIM": "American Board of Internal Medicine, Laboratory Test Reference Ranges, 2024",
    "NBME": "National Board of Medical Examiners, Laboratory Reference Values, 2020",
    "ACC/AHA 2017": "Whelton et al., Hypertension 71:e13, 2018",
    "ADA": "American Diabetes Association, Standards of Care in Diabetes, Diabetes Care 47 (Suppl. 1), 2024",
    "AHA": "American Heart Association, All About Heart Rate, 2024",
    "ADJUST-PE": "Righini et al., JAMA 311:1117, 2014: age x 10 ng/mL over 50; here that of a band's first year",
    "ATP III": "National Cholesterol Education Program, Adult Treatment Panel III, JAMA 285:2486, 2001",
    "Bottiger": "Bottiger and Svedberg, British Medical Journal 2:85, 1967",
    "GOLD": "Global Initiative for Chronic Obstructive Lung Disease, 2024 report: a fixed ratio of 0.70",
    "Januzzi": "Januzzi and Chen-Tournoux, Circulation 119:2339, 2009: 125 pg/mL under 75 years, 450 from then on",
    "KDIGO": "KDIGO 2024 Clinical Practice Guideline for Chronic Kidney Disease, Kidney International 105 (4S)",
    "Mackowiak": "Mackowiak, Wasserman and Levine, JAMA 268:1578, 1992, and below 36 the criterion of Bone et al. 1992",
    "NEWS2": "Royal College of Physicians, National Early Warning Score 2, 2017",
    "Sepsis-3": "Singer et al., JAMA 315:801, 2016",
    "Surks": "Surks and Hollowell, J. Clin. Endocrinology and Metabolism 92:4575, 2007: NHANES III, 97.5th percentile",
    "Valent": "Valent et al., J. Allergy and Clinical Immunology 130:607, 2012",
    "WHO": "World Health Organization, Technical Report Series 894, 2000",
}


class Range(NamedTuple):
    """A row of the table.

    Attributes:
      loinc: of the test.
      unit: of the bounds.
      sex: "female", "male", or "" for both.
      age: (first, last) year of life in completed years, both inclusive.
      low, high: inclusive bounds; None for no bound.
      source: of SOURCES.
    """

    loinc: str
    unit: str
    sex: str
    age: tuple[int, int]
    low: float | None
    high: float | None
    source: str


ADULT, FEMALE, MALE = (18, 130), "female", "male"

RANGES: tuple[Range, ...] = (
    Range("6690-2", "10*3/uL", "", ADULT, 4.5, 11.0, "NBME"),
    Range("711-2", "10*3/uL", "", ADULT, None, 0.5, "Valent"),
    Range("789-8", "10*6/uL", FEMALE, ADULT, 3.5, 5.5, "NBME"),
    Range("789-8", "10*6/uL", MALE, ADULT, 4.3, 5.9, "NBME"),
    Range("718-7", "g/dL", FEMALE, ADULT, 12.0, 16.0, "NBME"),
    Range("718-7", "g/dL", MALE, ADULT, 13.5, 17.5, "NBME"),
    Range("4544-3", "%", FEMALE, ADULT, 36.0, 46.0, "NBME"),
    Range("4544-3", "%", MALE, ADULT, 41.0, 53.0, "NBME"),
    Range("777-3", "10*3/uL", "", ADULT, 150.0, 400.0, "NBME"),
    Range("2951-2", "mmol/L", "", ADULT, 136.0, 146.0, "NBME"),
    Range("2823-3", "mmol/L", "", ADULT, 3.5, 5.0, "NBME"),
    Range("2075-0", "mmol/L", "", ADULT, 95.0, 105.0, "NBME"),
    Range("2028-9", "mmol/L", "", ADULT, 22.0, 28.0, "NBME"),
    Range("3094-0", "mg/dL", "", ADULT, 7.0, 18.0, "NBME"),
    Range("2160-0", "mg/dL", FEMALE, ADULT, 0.5, 1.1, "ABIM"),
    Range("2160-0", "mg/dL", MALE, ADULT, 0.7, 1.3, "ABIM"),
    Range("2345-7", "mg/dL", "", ADULT, 70.0, 139.0, "NBME"),  # not fasting; the low bound is that of fasting
    Range("17861-6", "mg/dL", "", ADULT, 8.4, 10.2, "NBME"),
    Range("1742-6", "U/L", "", ADULT, 10.0, 40.0, "NBME"),
    Range("1920-8", "U/L", "", ADULT, 12.0, 38.0, "NBME"),
    Range("6768-6", "U/L", "", ADULT, 25.0, 100.0, "NBME"),
    Range("2324-2", "U/L", FEMALE, ADULT, 8.0, 40.0, "ABIM"),
    Range("2324-2", "U/L", MALE, ADULT, 9.0, 50.0, "ABIM"),
    Range("1975-2", "mg/dL", "", ADULT, 0.1, 1.0, "NBME"),
    Range("1751-7", "g/dL", "", ADULT, 3.5, 5.5, "NBME"),
    Range("2093-3", "mg/dL", "", ADULT, None, 199.0, "ATP III"),
    Range("2085-9", "mg/dL", "", ADULT, 40.0, None, "ATP III"),
    Range("13457-7", "mg/dL", "", ADULT, None, 129.0, "ATP III"),
    Range("2571-8", "mg/dL", "", ADULT, None, 149.0, "ATP III"),
    Range("4548-4", "%", "", ADULT, 4.0, 5.6, "ADA"),
    Range("1558-6", "mg/dL", "", ADULT, 70.0, 99.0, "ADA"),
    Range("98979-8", "mL/min/{1.73_m2}", "", ADULT, 60.0, None, "KDIGO"),
    Range("9318-7", "mg/g", "", ADULT, None, 29.0, "KDIGO"),
    Range("3084-1", "mg/dL", "", ADULT, 3.0, 8.2, "NBME"),
    Range("3016-3", "m[IU]/L", "", (18, 69), 0.4, 4.0, "NBME"),
    Range("3016-3", "m[IU]/L", "", (70, 79), 0.4, 5.9, "Surks"),
    Range("3016-3", "m[IU]/L", "", (80, 130), 0.4, 7.5, "Surks"),
    Range("3024-7", "ng/dL", "", ADULT, 0.9, 1.7, "NBME"),
    Range("33762-6", "pg/mL", "", (18, 74), None, 125.0, "Januzzi"),
    Range("33762-6", "pg/mL", "", (75, 130), None, 450.0, "Januzzi"),
    Range("10839-9", "ng/mL", "", ADULT, None, 0.04, "ABIM"),
    Range("48065-7", "ug/mL{FEU}", "", (18, 59), None, 0.5, "ADJUST-PE"),
    Range("48065-7", "ug/mL{FEU}", "", (60, 69), None, 0.6, "ADJUST-PE"),
    Range("48065-7", "ug/mL{FEU}", "", (70, 79), None, 0.7, "ADJUST-PE"),
    Range("48065-7", "ug/mL{FEU}", "", (80, 130), None, 0.8, "ADJUST-PE"),
    Range("1988-5", "mg/L", "", ADULT, None, 8.0, "ABIM"),
    Range("30341-2", "mm/h", FEMALE, (18, 49), None, 20.0, "NBME"),
    Range("30341-2", "mm/h", MALE, (18, 49), None, 15.0, "NBME"),
    Range("30341-2", "mm/h", FEMALE, (50, 130), None, 30.0, "Bottiger"),
    Range("30341-2", "mm/h", MALE, (50, 130), None, 20.0, "Bottiger"),
    Range("75241-0", "ng/mL", "", ADULT, None, 0.1, "ABIM"),
    Range("2276-4", "ng/mL", FEMALE, ADULT, 10.0, 120.0, "NBME"),
    Range("2276-4", "ng/mL", MALE, ADULT, 20.0, 250.0, "NBME"),
    Range("2744-1", "[pH]", "", ADULT, 7.35, 7.45, "NBME"),
    Range("2019-8", "mm[Hg]", "", ADULT, 33.0, 45.0, "NBME"),
    Range("2703-7", "mm[Hg]", "", ADULT, 75.0, 105.0, "NBME"),
    Range("2524-7", "mmol/L", "", ADULT, None, 2.0, "Sepsis-3"),
    Range("19926-5", "%", "", ADULT, 70.0, None, "GOLD"),
    Range("8480-6", "mm[Hg]", "", ADULT, 91.0, 129.0, "ACC/AHA 2017"),  # low: NEWS2's worst score begins at 90
    Range("8462-4", "mm[Hg]", "", ADULT, None, 79.0, "ACC/AHA 2017"),
    Range("8867-4", "/min", "", ADULT, 60.0, 100.0, "AHA"),
    Range("9279-1", "/min", "", ADULT, 12.0, 20.0, "NEWS2"),
    Range("8310-5", "Cel", "", ADULT, 36.0, 37.7, "Mackowiak"),
    Range("59408-5", "%", "", ADULT, 95.0, None, "ABIM"),
    Range("39156-5", "kg/m2", "", ADULT, 18.5, 24.9, "WHO"),
)
