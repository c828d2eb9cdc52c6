"""The embedded patients' tables beside those of others: ICD-10-CM's names.

make test-clinical.
"""

import pytest

pytest.importorskip("simple_icd_10_cm", reason='pip install "rlalign[clinical]"')

import simple_icd_10_cm as icd

from rlalign.clinical import diseases

CODES = {**diseases.SYMPTOMS, **{code: row.name for code, row in diseases.DISEASES.items()}}


@pytest.mark.parametrize("code", CODES)
def test_codes_and_names_are_those_of_icd_10_cm(code):
    assert icd.is_valid_item(code)
    assert icd.is_leaf(code)  # what a record may hold: no heading
    assert icd.get_description(code) == CODES[code]
    assert icd.is_category(code[:3])
