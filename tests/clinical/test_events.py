"""The table of events: what goes in comes out, in an order of its own, and no subject is in two parts."""

import calendar
import doctest
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.clinical import events
from rlalign.clinical.events import Event, completed_years, flag_of, part_of, split_by_subject, table_of

NUMBER = st.sampled_from([None, -1.5, 0.0, 3.0, 1e300, math.inf])
EVENTS = st.lists(
    st.builds(
        Event,
        subject=st.sampled_from("abc"),
        time=st.sampled_from([None, -(2**62), -1, 0, 1, 2**62]),
        visit=st.sampled_from(["", "1", "2"]),
        system=st.sampled_from(["loinc", "person", "somewhere"]),
        code=st.sampled_from(["", "a", "b", "é", "10", "9"]),
        value=NUMBER,
        unit=st.sampled_from(["", "g/dL"]),
        low=NUMBER,
        high=NUMBER,
        flag=st.sampled_from(events.FLAGS),
    ),
    max_size=8,
)


def key(event):
    """The order as the field names have it: what is missing first, except numbers, where it comes last."""
    number = lambda x: (x is None, 0.0 if x is None else x)
    return (
        event.subject,
        (event.time is not None, event.time or 0),
        *(event.visit, event.system, event.code, number(event.value), event.unit),
        *(number(event.low), number(event.high), event.flag),
    )


@given(EVENTS, st.randoms(use_true_random=False))
def test_a_table_holds_its_events_in_one_order(given_events, draw):
    table = table_of(given_events)
    assert list(table) == sorted(set(given_events), key=key)
    shuffled = [*given_events, *given_events[:3]]
    draw.shuffle(shuffled)
    again = table_of(iter(shuffled))
    assert again.names == table.names
    assert [again[i] for i in range(len(again))] == list(table)
    assert sorted({event.subject for event in given_events}) == list(table.subjects)
    for subject, own in zip(table.subjects, table.by_subject(), strict=True):
        assert own == table.of(subject) == [event for event in table if event.subject == subject]


def test_chunks_make_no_difference(monkeypatch):
    rows = [Event(f"s{i % 7}", i, code=str(i % 5)) for i in range(100)]
    whole = list(table_of(rows))
    monkeypatch.setattr(events, "CHUNK", 8)
    assert list(table_of(rows)) == whole
    assert len(whole) == 100


def test_a_diagnosis_without_a_time_is_dated_by_its_visit():
    table = table_of(
        [
            Event("a", None, "v", "icd10", "E119"),
            Event("a", None, "v", "loinc", "718-7"),
            Event("a", None, "w", "icd10", "I10"),
            Event("a", None, "", "icd10", "J45"),
            Event("a", 5, "v", "icd9", "250"),
            Event("a", 3, "v", "visit", "start"),
            Event("a", 9, "v", "visit", "end"),
            Event("a", 7, "", "visit", "end"),
        ]
    )
    when = {event.code: event.time for event in table}
    assert when == {"E119": 9, "718-7": None, "I10": None, "J45": None, "250": 5, "start": 3, "end": 7} | {"end": 9}


def test_visits_of_several_subjects_may_share_a_name():
    rows = [Event("a", None, "1", "icd10", "I10"), Event("b", None, "1", "icd10", "J45")]
    rows += [Event("c", None, "1", "icd10", "N18"), Event("b", 9, "1", "visit", "end")]
    rows += [Event("c", time, "1", "visit", "end") for time in (5, 7, 6)]
    for given_events in (rows, rows[::-1]):
        when = {event.code: event.time for event in table_of(given_events) if event.system == "icd10"}
        assert when == {"I10": None, "J45": 9, "N18": 7}


def test_no_subject_is_in_two_parts():
    table = table_of(Event(f"subject {i % 400}", i, code=str(i)) for i in range(1200))
    parts = split_by_subject(table, (0.5, 0.3, 0.2), seed=3)
    assert sorted(event.code for part in parts for event in part) == sorted(str(i) for i in range(1200))
    owners = [set(part.subjects) for part in parts]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 400
    for share, owner in zip((0.5, 0.3, 0.2), owners, strict=True):
        assert abs(len(owner) / 400 - share) < 4 * math.sqrt(share * (1 - share) / 400)
    other = split_by_subject(table, (0.5, 0.3, 0.2), seed=4)
    assert [set(part.subjects) for part in other] != owners
    # Others come and go: nobody moves. And a part carries no text of another.
    fewer = split_by_subject(table.where(table.rows["subject"] % 2 == 0), (0.5, 0.3, 0.2), seed=3)
    assert all(set(part.subjects) <= owner for part, owner in zip(fewer, owners, strict=True))
    assert all(set(part.names["code"]) == {event.code for event in part} for part in parts)


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.5, -0.5), (0.0, 1.0), (math.nan, 1.0)])
def test_fractions_that_are_none(fractions):
    with pytest.raises(ValueError, match="positive and add up to 1"):
        part_of("a", fractions, 0)


def test_the_last_part_takes_what_rounding_leaves():
    assert {part_of(str(i), (0.1,) * 10, 0) for i in range(500)} == set(range(10))


def test_nothing_that_is_said_names_a_row():
    table = table_of([Event("Jane Canary", 1, "MRN-4711", "loinc", "718-7", 13.37)])
    assert repr(table) == str(table) == "EventTable(1 subjects, 1 events)"
    with pytest.raises(KeyError, match="no event of this subject") as error:
        table.of("John Canary")
    assert "Canary" not in str(error.value)
    with pytest.raises(ValueError, match="a flag is none of") as error:
        table_of([Event("a", flag="Canary")])
    assert "Canary" not in str(error.value)
    with pytest.raises(IndexError):
        table[1]
    assert not table.rows.flags.writeable
    assert not table.rows.dtype.hasobject


@given(st.dates(), st.dates())
def test_ages_are_those_of_the_calendar(born, day):
    born, day = sorted((born, day))
    at = lambda date: calendar.timegm(date.timetuple())
    years = range(born.year + 1, day.year + 1)
    birthdays = sum((year, born.month, born.day) <= (day.year, day.month, day.day) for year in years)
    assert completed_years(at(born), at(day)) == birthdays


def test_a_column_that_holds_too_many_texts():
    assert len(table_of(Event("a", system=f"Jane {i}") for i in range(255))) == 255
    with pytest.raises(ValueError, match=r"^column 'system' has more than 255 different texts, 300 by now: ") as error:
        table_of(Event("a", system=f"Jane {i}") for i in range(300))
    assert "leave out events by their system, or give several texts one name" in str(error.value)
    assert "Jane" not in str(error.value)


def test_memory_a_row():
    table = table_of(Event(str(random.Random(i).randrange(50)), i, value=0.5) for i in range(1000))
    assert table.rows.nbytes == 48 * len(table)
    assert np.isnan(table.rows["low"]).all()


def test_flags():
    said = ["H", "hh", ">", "LL", "low", "A", "abnormal", "N", " Normal ", "R", "POS", "", None]
    assert [flag_of(x) for x in said] == [*"HHHLLAANN", "", "", "", ""]
    assert doctest.testmod(events).failed == 0
