"""The clinical test reference: units, check digits, and rules beside a slow reading of them."""

import doctest
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.clinical import loinc, reference, units
from rlalign.clinical.events import FLAGS, Event
from rlalign.clinical.loinc import PANELS, TESTS, check_digit, is_loinc
from rlalign.clinical.ranges import RANGES, SOURCES, Range
from rlalign.clinical.reference import WORDS, Result, interpret, interpret_event
from rlalign.clinical.units import UNITS, canonical, convert


def word(*args, **settings):
    return interpret(*args, **settings).word


def users_guide_digit(number):
    """The seven steps of the LOINC Users' Guide, on strings."""
    digits = str(number)[::-1]
    doubled = str(2 * int(digits[::2][::-1]))
    total = sum(map(int, (digits[1::2][::-1] or "0") + doubled))
    return (10 - total % 10) % 10


def test_check_digits():
    assert check_digit(12345) == 5  # the guide's own example
    assert all(check_digit(n) == users_guide_digit(n) for n in itertools.chain(range(1, 3000), range(98000, 99999)))
    assert all(map(is_loinc, TESTS))
    for code in TESTS:
        number, digit = code.split("-")
        assert not any(is_loinc(f"{number}-{other}") for other in range(10) if str(other) != digit)
    assert not any(map(is_loinc, ["", "-", "718", "718-", "718-7 ", "७-१", "718-07", "x-7"]))


def test_the_table():
    assert sum(PANELS.values(), ()) == tuple(TESTS)
    assert 40 <= len(TESTS) <= 60
    assert 10 <= len(PANELS) <= 12
    assert len({test.short for test in TESTS.values()}) == len(TESTS)
    assert {row.loinc for row in RANGES} == set(TESTS)
    assert {row.source for row in RANGES} == set(SOURCES)
    assert all(row.unit == TESTS[row.loinc].unit and row.unit in UNITS for row in RANGES)
    for module in (loinc, units, reference):
        assert doctest.testmod(module).failed == 0


SAME = [  # test, what one laboratory writes, what another does; from textbooks' factors, to the digits they have
    ("2345-7", 90.0, "mg/dL", 4.996, "mmol/L"),
    ("2093-3", 200.0, "mg/dL", 5.17, "mmol/L"),
    ("2571-8", 150.0, "mg/dL", 1.694, "mmol/L"),
    ("2160-0", 1.0, "mg/dL", 88.4, "umol/L"),
    ("3094-0", 14.0, "mg/dL", 5.0, "mmol/L"),
    ("3084-1", 6.0, "mg/dL", 357.0, "umol/L"),
    ("1975-2", 1.0, "mg/dL", 17.1, "umol/L"),
    ("3024-7", 1.0, "ng/dL", 12.87, "pmol/L"),
    ("17861-6", 10.0, "mg/dL", 2.495, "mmol/L"),
    ("17861-6", 10.0, "mg/dL", 4.99, "mEq/L"),
    ("718-7", 14.5, "g/dL", 9.0, "mmol/L"),
    ("718-7", 14.5, "g/dL", 145.0, "g/L"),
    ("2951-2", 140.0, "mmol/L", 140.0, "MEQ/L"),
    ("4548-4", 7.0, "%", 53.0, "mmol/mol"),
    ("4544-3", 41.0, "%", 0.41, "L/L"),
    ("6690-2", 7.1, "10*3/uL", 7100.0, "/uL"),
    ("6690-2", 7.1, "10*3/uL", 7.1, "K/uL"),
    ("789-8", 4.8, "10*6/uL", 4.8, "x10^12/L"),
    ("1742-6", 30.0, "U/L", 0.5, "µkat/L"),
    ("8310-5", 37.0, "Cel", 98.6, "degF"),
    ("2019-8", 40.0, "mm[Hg]", 5.333, "kPa"),
    ("1988-5", 8.0, "mg/L", 0.8, "mg/dL"),
    ("48065-7", 0.5, "ug/mL{FEU}", 500.0, "ng/mL"),
    ("48065-7", 0.5, "ug/mL{FEU}", 500.0, "ng/mL FEU"),
    ("9318-7", 30.0, "mg/g", 3.39, "mg/mmol"),
    ("3016-3", 2.0, "m[IU]/L", 2.0, "uIU/mL"),
    ("33762-6", 125.0, "pg/mL", 125.0, "ng/L"),
    ("2276-4", 50.0, "ng/mL", 50.0, "mcg/L"),
    ("2744-1", 7.4, "[pH]", 7.4, ""),
    ("2744-1", 7.4, "[pH]", 7.4, "units"),
]


@pytest.mark.parametrize(("code", "value", "unit", "other_value", "other_unit"), SAME)
def test_conversions(code, value, unit, other_value, other_unit):
    assert convert(value, unit, TESTS[code].unit, code) == value
    assert convert(other_value, other_unit, unit, code) == pytest.approx(value, rel=2e-3)
    person = {"sex": "female", "age": 40}
    assert interpret(code, other_value, other_unit, **person) == interpret(code, value, unit, **person)
    assert word(code, 50 * other_value + 10, other_unit, **person) in ("high", "normal")


SPELLED = {  # as laboratories write it -> UCUM
    "10*3/uL": "x10(3)/uL 10*3/mm3 10^3/mm3 X10E3/UL x10^3/µL ×10³/µL 10e3/mcL K/uL K/mm3 x10(3)/mcL 10³/cumm",
    "10*9/L": "x10(9)/L 10(9)/L x10*9/L ×10⁹/L 10^9/L 10E9/L Gpt/L",
    "10*6/uL": "x10(6)/uL 10*6/mm3 x10^6/uL M/uL 10⁶/µL",
    "10*12/L": "T/L x10(12)/L 10^12/L x10*12/L ×10¹²/L Tpt/L",
    "/uL": "/mm3 cells/mm3 cells/uL",
    "m[IU]/mL": "mIU/mL mU/mL m[IU]/mL",
    "m[IU]/L": "mIU/L uIU/mL µIU/mL",
    "g/L": "g/L G/L",
}


def test_spellings():
    for unit, spelled in SPELLED.items():
        assert {text: canonical(text) for text in spelled.split()} == dict.fromkeys(spelled.split(), unit)
    assert convert(2.0, "mIU/mL", "m[IU]/L", "3016-3") == 2000.0
    assert convert(5.0, "T/L", "10*6/uL", "789-8") == 5.0
    assert convert(7.0, "x10(9)/L", "10*3/uL", "6690-2") == convert(7.0, "10*3/mm3", "10*3/uL", "6690-2") == 7.0


def test_what_does_not_convert():
    assert convert(1.0, "furlongs", "g/dL", "718-7") is None
    assert convert(1.0, "", "g/dL", "718-7") is None
    assert convert(1.0, "mmol/L", "g/dL", "1751-7") is None  # no molar mass of albumin here
    assert convert(1.0, "mL/min", "mL/min/{1.73_m2}", "98979-8") is None  # another quantity
    assert convert(1.0, "U/L", "mg/dL", "2345-7") is None
    assert convert(53.0, "mmol/mol", "%", "4544-3") is None
    assert all(canonical(unit) == unit for unit in UNITS)
    assert all(UNITS[canonical(f" {unit.lower()} ")] == UNITS[unit] for unit in UNITS)


def test_bounds_are_inclusive():
    for row in RANGES:
        people = {"sex": row.sex or "male", "age": row.age[0]}
        label = lambda value, row=row, people=people: word(row.loinc, value, row.unit, **people)
        if row.low is not None:
            assert [label(row.low), label(math.nextafter(row.low, -1))] == ["normal", "low"], row
        if row.high is not None:
            assert [label(row.high), label(math.nextafter(row.high, 1e9))] == ["normal", "high"], row
    assert word("1988-5", 0.8, "mg/dL") == "normal"  # 8 mg/L, and no rounding beyond it
    assert word("718-7", 135, "g/L", sex="male", age=30) == "normal"


CASES = [  # what is known, what it means
    (("718-7", 13.0, "g/dL", {"sex": "female", "age": 40}), "normal"),
    (("718-7", 13.0, "g/dL", {"sex": "male", "age": 40}), "low"),
    (("718-7", 13.0, "g/dL", {"age": 40}), "unknown"),  # it depends on the sex
    (("718-7", 9.0, "g/dL", {"age": 40}), "low"),  # it does not
    (("718-7", 19.0, "g/dL", {}), "high"),
    (("718-7", 14.0, "g/dL", {}), "normal"),
    (("33762-6", 300.0, "pg/mL", {"age": 74.9}), "high"),
    (("33762-6", 300.0, "pg/mL", {"age": 75}), "normal"),
    (("33762-6", 300.0, "pg/mL", {}), "unknown"),  # it depends on the age
    (("33762-6", 500.0, "pg/mL", {}), "high"),
    (("33762-6", 100.0, "pg/mL", {"sex": "male"}), "normal"),
    (("30341-2", 18.0, "mm/h", {"sex": "male", "age": 30}), "high"),
    (("30341-2", 18.0, "mm/h", {"sex": "male"}), "unknown"),
    (("30341-2", 25.0, "mm/h", {"age": 60}), "unknown"),
    (("30341-2", 35.0, "mm/h", {}), "high"),
    (("718-7", 9.0, "g/dL", {"sex": "female", "age": 7}), "unknown"),  # the table is of adults
    (("718-7", 9.0, "g/dL", {"sex": "female", "age": 7, "low": 11.5, "high": 15.5}), "low"),
    (("718-7", 9.0, "g/dL", {"sex": "female", "age": 40, "low": 8.0, "high": 10.0, "flag": "N"}), "low"),  # table first
    (("718-7", 9.0, "", {"sex": "female", "age": 40}), "unknown"),  # no unit, no row
    (("718-7", 9.0, "", {"low": 8.0, "high": 10.0, "flag": "H"}), "normal"),  # its own range before its flag
    (("718-7", 9.0, "", {"low": 9.0}), "normal"),
    (("718-7", 9.0, "", {"high": 8.0}), "high"),
    (("718-7", 9.0, "", {"low": 10.0, "high": 8.0, "flag": "L"}), "low"),  # a range that is none
    (("718-7", 9.0, "", {"low": math.nan, "high": math.nan, "flag": "A"}), "abnormal"),
    (("99999-9", 9.0, "g/dL", {"flag": "H"}), "high"),
    (("99999-9", 9.0, "g/dL", {"flag": "N"}), "normal"),
    (("99999-9", 9.0, "g/dL", {"flag": ""}), "unknown"),
    (("718-7", None, "g/dL", {"flag": "A"}), "abnormal"),  # a result in words
    (("718-7", None, "g/dL", {"sex": "female", "age": 40}), "unknown"),
    (("718-7", math.nan, "g/dL", {"sex": "female", "age": 40}), "unknown"),
    (("718-7", math.inf, "g/dL", {"sex": "female", "age": 40}), "unknown"),
]


@pytest.mark.parametrize(("known", "meaning"), CASES)
def test_the_rules_one_by_one(known, meaning):
    *result, settings = known
    assert word(*result, **settings) == meaning


ROWS = [
    Range("718-7", "g/dL", "", (0, 130), 10.0, 20.0, "NBME"),
    Range("718-7", "g/dL", "", (50, 59), 12.0, 14.0, "NBME"),
    Range("718-7", "g/L", "female", (0, 130), None, 150.0, "NBME"),
    Range("718-7", "g/dL", "female", (55, 70), 16.0, None, "NBME"),
    Range("718-7", "g/dL", "", (0, 48), 8.0, None, "NBME"),
]


def slowly(value, sex, age, rows):
    """Every sex and every year that is possible, and of the rows for them the most specific one."""
    labels = set()
    for who in [sex] if sex else ["female", "male"]:
        for years in [math.floor(age)] if age is not None else range(131):
            fitting = [r for r in rows if r.sex in ("", who) and years in range(r.age[0], r.age[1] + 1)]
            for_sex = [r for r in fitting if r.sex] or fitting
            narrow = min((r.age[1] - r.age[0] for r in for_sex), default=None)
            for r in [r for r in for_sex if r.age[1] - r.age[0] == narrow]:
                x = value * 10 if r.unit == "g/L" else value
                low, high = r.low is not None and x < r.low, r.high is not None and x > r.high
                labels.add("low" if low else "high" if high else "normal")
    return "unknown" if not labels or (len(labels) > 1 and "normal" in labels) else "/".join(sorted(labels))


@given(
    st.sampled_from([x / 2 for x in range(10, 50)]),
    st.sampled_from([None, "female", "male"]),
    st.none() | st.integers(0, 140) | st.floats(0, 140),
    st.lists(st.sampled_from(ROWS), unique=True),
)
def test_the_most_specific_row_decides(value, sex, age, rows):
    found = interpret("718-7", value, "g/dL", sex=sex, age=age, ranges=tuple(rows))
    expected = slowly(value, sex, age, rows).replace("high/low", "abnormal")
    assert found.word == expected
    again = interpret("718-7", value * 10, "g/L", sex=sex, age=age, ranges=tuple(reversed(rows)))
    assert again == found


@given(
    st.sampled_from([*TESTS, "", "99999-9"]),
    st.none() | st.floats(allow_nan=True),
    st.sampled_from([*UNITS, "", "furlongs"]),
    st.sampled_from([None, "female", "male"]),
    st.none() | st.floats(0, 1e3),
    st.none() | st.floats(allow_nan=True),
    st.none() | st.floats(allow_nan=True),
    st.sampled_from(FLAGS),
)
def test_anything_has_a_meaning(code, value, unit, sex, age, low, high, flag):
    found = interpret(code, value, unit, sex=sex, age=age, low=low, high=high, flag=flag)
    assert found in WORDS.values()
    assert WORDS[found.word] == found
    if not flag and low is None and high is None and (value is None or code not in TESTS):
        assert found == Result("unknown")


def test_an_unknown_age_is_every_age():
    """Also those between two narrow bands, where a wide one decides."""
    rows = [
        Range("718-7", "g/dL", "", (18, 80), 12.0, 14.0, "NBME"),
        Range("718-7", "g/dL", "", (18, 40), 9.0, 14.0, "NBME"),
        Range("718-7", "g/dL", "", (60, 80), 9.0, 14.0, "NBME"),
    ]
    for value in (8.0, 11.0, 13.0, 15.0):
        assert word("718-7", value, "g/dL", ranges=tuple(rows)) == slowly(value, None, None, rows)
    assert word("718-7", 11.0, "g/dL", ranges=tuple(rows)) == "unknown"
    assert word("718-7", 11.0, "g/dL", ranges=tuple(rows), age=50) == "low"


def test_low_for_some_and_high_for_others_is_abnormal():
    assert interpret("718-7", 15.0, "g/dL", ranges=(ROWS[1], ROWS[3])) == Result("abnormal")
    assert interpret("718-7", 15.0, "g/dL", sex="male", ranges=(ROWS[1], ROWS[3])) == Result("abnormal", "high")


def test_an_event():
    event = Event("s", 0, "v", "loinc", "718-7", 9.0, "g/dL", 8.0, 10.0)
    assert interpret_event(event, sex="female", age=30).word == "low"
    assert interpret_event(event._replace(system="local"), sex="female", age=30).word == "normal"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sex": "F"}, "sex must be"), ({"age": -1}, "age must be"), ({"age": math.nan}, "age"), ({"flag": "x"}, "flag")],
)
def test_what_cannot_be_asked(settings, message):
    with pytest.raises(ValueError, match=message):
        interpret("718-7", 9.0, "g/dL", **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loinc": "718-8"}, "check digit"),
        ({"unit": "MG/DL"}, "did you mean 'mg/dL'"),
        ({"sex": "F"}, "its sex"),
        ({"age": (9, 3)}, "its ages"),
        ({"low": None, "high": None}, "a low, a high"),
        ({"low": 9.0, "high": 3.0}, "in order"),
        ({"age": (100, 230)}, "as specific and overlaps"),
    ],
)
def test_tables_that_contradict_themselves(change, message):
    with pytest.raises(ValueError, match=message):
        interpret("718-7", 9.0, "g/dL", ranges=(ROWS[0], ROWS[0]._replace(**{"age": (200, 220)} | change)))
