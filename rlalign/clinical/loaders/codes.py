"""Code systems and sexes, from what sources call them to what the table does."""

from collections.abc import Mapping

from rlalign.clinical.events import FEMALE, LOINC, MALE, PERSON, Event

SYSTEMS = {  # of FHIR, Synthea, OMOP and MEDS
    "http://loinc.org": LOINC,
    "http://hl7.org/fhir/sid/icd-10-cm": "icd10",
    "http://hl7.org/fhir/sid/icd-10": "icd10",
    "http://hl7.org/fhir/sid/icd-9-cm": "icd9",
    "http://snomed.info/sct": "snomed",
    "SNOMED-CT": "snomed",
    "LOINC": LOINC,
    "ICD10": "icd10",
    "ICD10CM": "icd10",
    "ICD9CM": "icd9",
    "SNOMED": "snomed",
}
MIMIC_LABITEM = "mimic-labitem"
_MIMIC = {"diagnosis-icd10": "icd10", "diagnosis-icd9": "icd9", "d-labitems": MIMIC_LABITEM}  # ends of MIMIC's URLs
PREFERENCE = ("icd10", LOINC, "icd9", "snomed")  # of several codes for one thing


def system_of(name: str) -> str:
    """The table's name of a code system; the source's own where it has none."""
    if name in SYSTEMS:
        return SYSTEMS[name]
    if "mimic" in name:
        return next((system for end, system in _MIMIC.items() if name.endswith(end)), name)
    return name


def code_of(system: str, code: str) -> str:
    """A code as the table has it: of ICD in capitals without a dot.

    >>> code_of("icd10", "e11.9"), code_of("loinc", "718-7")
    ('E119', '718-7')
    """
    code = code.strip()
    return code.replace(".", "").upper() if system in ("icd10", "icd9") else code


def code_of_test(system: str, code: str, loinc: Mapping[str, str]) -> tuple[str, str]:
    """(system, code) of a test; LOINC where the user's map has a local code."""
    if system != LOINC and code in loinc:
        return LOINC, loinc[code]
    return system, code


def sex_of(word: str) -> str | None:
    """The code of a sex; None for what is neither female nor male.

    >>> sex_of("F"), sex_of("male"), sex_of("other")
    ('sex/female', 'sex/male', None)
    """
    return {"f": FEMALE, "female": FEMALE, "m": MALE, "male": MALE}.get(word.strip().lower())


def person(subject: str, sex: str, birth: int | None) -> list[Event]:
    """The rows of who somebody is."""
    rows = [Event(subject, birth, "", PERSON, "birth")] if birth is not None else []
    if found := sex_of(sex):
        rows.append(Event(subject, None, "", PERSON, found))
    return rows
