"""Dialogues: what is rendered is read back, and nothing is in them that gives the diagnosis away."""

import calendar
import datetime
import doctest
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.clinical import dialogue
from rlalign.clinical.dialogue import (
    NOTICE,
    TEMPLATES,
    VERBS,
    Abstains,
    Asks,
    Diagnoses,
    Means,
    Opens,
    Result,
    dialogues_of,
    messages,
    parse,
    read_action,
    read_dialogues,
    render,
    write_dialogues,
)
from rlalign.clinical.events import Event, table_of
from rlalign.clinical.loinc import NOTICE as LOINC_NOTICE
from rlalign.clinical.loinc import PANELS, TESTS
from rlalign.clinical.reference import WORDS

TEXT = st.sampled_from(
    ["718-7", "E11", "blood count", "", '"]', "[1]\n[2]", "{x}", "é\u2028\x85", "\\", " "]
) | st.text(max_size=4)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
TURNS = st.one_of(
    st.builds(Opens, st.none() | st.integers(0, 199), st.sampled_from([None, "female", "male"]), TEXTS, TEXTS),
    st.builds(Asks, TEXT),
    st.builds(Result, TEXT, st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(), TEXT),
    st.builds(Means, TEXT, st.sampled_from(sorted(WORDS)), TEXTS),
    st.builds(Diagnoses, TEXTS),
    st.just(Abstains()),
)
DIALOGUES = st.lists(TURNS, max_size=6).map(tuple)


@given(DIALOGUES, st.integers(0, 9), st.dictionaries(TEXT, TEXT, max_size=3))
def test_what_is_rendered_is_read_back(given_turns, seed, names):
    text = render(given_turns, seed=seed, names=names)
    found = parse(text)
    assert found == given_turns
    assert list(map(type, found)) == list(map(type, given_turns))
    assert text.count("\n") == 2 * len(given_turns)
    assert text == render(found, seed=seed, names=names)
    said = messages(given_turns, seed=seed, names=names)
    assert "\n".join(message["content"] for message in said) == text[:-1]
    assert all(a["role"] != b["role"] for a, b in itertools.pairwise(said))


def nested(children):
    return st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*VERBS, *WORDS]), nested, max_leaves=8
)


@given(st.text(max_size=20) | JSON.map(json.dumps) | st.lists(JSON, min_size=1, max_size=5).map(json.dumps))
def test_any_line_is_an_action_or_none(line):
    found = read_action(line)
    if found is not None:
        assert parse(render((found,), seed=0)) == (found,)


@pytest.mark.parametrize(
    "line",
    [
        *('{"abstains": 1}', '{"asks": 1, "thyroid panel": 2}', '"asks"', '{"opens": 1}', "{}", '[{"abstains": 1}]'),
        *('["asks"]', '["asks", 3]', '["asks", "a", "b"]', '["asks", ["a"]]', '[["asks"], "a"]', "[]", "7", "null"),
        *('["result", "a", NaN, ""]', '["result", "a", true, ""]', '["result", "a", Infinity, ""]', "[" * 10**5),
        *('["means", "a", "lowish", []]', '["means", "a", ["low"], []]', '["diagnoses", "E11"]', '["diagnoses", [1]]'),
        *('["opens", -1, null, [], []]', '["opens", true, null, [], []]', '["opens", 3, "F", [], []]'),
        *('["opens", 3.0, null, [], []]', '["result", "a", %s, ""]' % 10**400, "[" + "9" * 5000 + "]"),
    ],
)
def test_what_is_no_action(line):
    assert read_action(line) is None
    if line.startswith("["):
        with pytest.raises(ValueError, match=r"^line 2 of the dialogue is no action, such as") as caught:
            parse("Doctor: yes.\n" + line)
        assert line not in str(caught.value)


def test_sentences():
    turns = (
        Opens(61, "female", ("R05",), ("I10",)),
        Asks("718-7"),
        Result("718-7", 11.2, "g/dL"),
        Means("718-7", "low", ("D50",)),
        Asks("blood count"),
        Result("9999-9", None),
        Diagnoses(("D50", "I10")),
    )
    names = {"R05": "cough", "D50": "iron deficiency anaemia"}
    text = render(turns, seed=0, names=names)
    assert text == (
        "Patient: I have cough. I am a 61-year-old woman, and my history is I10.\n"
        '["opens", 61, "female", ["R05"], ["I10"]]\n'
        "Doctor: Let us do the hemoglobin next.\n"
        '["asks", "718-7"]\n'
        "Laboratory: hemoglobin: 11.2 g/dL.\n"
        '["result", "718-7", 11.2, "g/dL"]\n'
        "Doctor: I read hemoglobin as low, which argues for iron deficiency anaemia.\n"
        '["means", "718-7", "low", ["D50"]]\n'
        "Doctor: Please measure the blood count.\n"
        '["asks", "blood count"]\n'
        "Laboratory: The result for 9999-9 is not available.\n"
        '["result", "9999-9", null, ""]\n'
        "Doctor: I think of iron deficiency anaemia, I10.\n"
        '["diagnoses", ["D50", "I10"]]\n'
    )
    said = [render(turns, seed=seed) for seed in range(20)]
    assert len(set(said)) > 5
    assert {parse(text) for text in said} == {turns}
    assert [message["role"] for message in messages(turns, seed=0)] == [
        *("user", "assistant", "user", "assistant", "user", "assistant")
    ]
    assert set(TEMPLATES) == set(VERBS.values())
    with pytest.raises(ValueError, match="JSON"):
        render((Result("718-7", math.nan),), seed=0)
    assert doctest.testmod(dialogue).failed == 0


def test_a_file_begins_with_the_notices(tmp_path):
    path, turns = tmp_path / "d.txt", [(Asks("718-7"), Abstains()), (Opens(None, None), Diagnoses(("E11",)))]
    assert write_dialogues(path, turns, seed=0) == 2
    text = path.read_text(encoding="utf-8")
    assert text.split("\n")[:2] == [f"# {NOTICE}", f"# {LOINC_NOTICE}"]
    assert NOTICE == "Research software; not a medical device; not for diagnosis or treatment."
    assert read_dialogues(path) == turns
    path.write_text(text.replace('["asks"', '["Jane"'))
    with pytest.raises(ValueError, match=r"d\.txt:5 is no action, such as") as caught:
        read_dialogues(path)
    assert "Jane" not in str(caught.value)
    path.write_bytes(b"J\xe4ne")
    with pytest.raises(ValueError, match=r"d\.txt: not UTF-8; convert the file$") as caught:
        read_dialogues(path)
    assert caught.value.__context__ is None


# From records

DAY = 86400
BASE = [
    Event("s", 0, "", "person", "birth"),
    Event("s", None, "", "person", "sex/female"),
    Event("s", 9000 * DAY, "1", "visit", "start"),
    Event("s", 9002 * DAY, "1", "visit", "end"),
    Event("s", None, "1", "icd10", "I10"),
    Event("s", None, "1", "icd10", "Z720"),
    Event("s", 20000 * DAY, "2", "visit", "start"),
    Event("s", 20005 * DAY, "2", "visit", "end"),
    Event("s", None, "2", "icd10", "E119"),
    Event("s", None, "2", "icd10", "E118"),
    Event("s", None, "2", "icd10", "J441"),
    Event("s", None, "2", "icd10", "R739"),
    Event("s", None, "2", "icd10", "W19"),
    Event("s", None, "2", "icd9", "25000"),
    Event("s", 30000 * DAY, "3", "visit", "start"),
    Event("s", 30001 * DAY, "3", "visit", "end"),
    Event("s", None, "3", "icd10", "N18"),
    Event("s", 8000 * DAY, "", "icd10", "K21"),
    Event("s", 25000 * DAY, "", "icd10", "K29"),
]
LABS = [
    Event("s", 20000 * DAY + 600 * i, "2" if i % 2 else "", "loinc", code, 5.0 + i, TESTS[code].unit)
    for i, code in enumerate(TESTS)
]


def of(labs, **settings):
    return dialogues_of(table_of([*BASE, *labs]).of("s"), **{"seed": 0} | settings)


def test_what_a_dialogue_holds():
    (found,) = of(LABS)
    opening, *middle, end = found
    assert opening == Opens(54, "female", ("R739",), ("I10", "K21"))
    assert end == Diagnoses(("E11", "J44"))
    asked = [turn.name for turn in middle if isinstance(turn, Asks)]
    assert 1 <= len(asked) <= 8
    assert len(set(asked)) == len(asked)
    for name, turns in zip(asked, [middle[i : i + 3] for i in range(0, len(middle), 3)], strict=True):
        (lab,) = [lab for lab in LABS if lab.code == name]
        assert turns[:2] == [Asks(name), Result(name, lab.value, lab.unit)]
        assert turns[2].word in WORDS
    assert {turn.word for d in range(30) for turn in of(LABS, seed=d)[0] if isinstance(turn, Means)} >= {
        *("low", "high", "normal")
    }


BIRTHDAYS = [  # born, the first moment of an age, the age
    ("2006-11-29T23:00:00", "2024-11-29T00:00:00", 18),  # the day counts, not its hour
    ("2007-03-01T00:00:00", "2025-03-01T00:00:00", 18),
    ("2000-02-29T00:00:00", "2001-03-01T00:00:00", 1),
    ("2000-02-29T00:00:00", "2004-02-29T00:00:00", 4),
    ("1899-12-31T00:00:00", "2020-12-31T00:00:00", 121),
    ("1960-01-01T00:00:00", "1969-01-01T00:00:00", 9),
]


@pytest.mark.parametrize(("born", "birthday", "age"), BIRTHDAYS)
def test_ages_change_on_birthdays(born, birthday, age):
    at = lambda text: calendar.timegm(datetime.datetime.fromisoformat(text).timetuple())
    for start, completed in ((at(birthday) - 1, age - 1), (at(birthday), age)):
        visit = [Event("s", start, "1", "visit", "start"), Event("s", None, "1", "icd10", "I10")]
        lab = Event("s", start, "1", "loinc", "718-7", 9.0, "g/dL")
        (found,) = dialogues_of([Event("s", at(born), "", "person", "birth"), *visit, lab], seed=0)
        assert found[0].age == completed
        assert found[3].word == ("low" if completed >= 18 else "unknown")  # ranges are of adults


def test_a_dialogue_does_not_tell_what_else_was_ordered():
    seen = set()
    for seed in range(25):
        (found,) = of(LABS, seed=seed)
        asked = {turn.name for turn in found if isinstance(turn, Asks)}
        assert of([lab for lab in LABS if lab.code in asked], seed=seed) == [found]
        assert of(list(reversed(LABS)), seed=seed) == [found]
        moved = [lab._replace(time=lab.time + DAY) for lab in reversed(LABS)]
        assert of(moved, seed=seed) == [found]
        seen.add((len(asked), next(turn.name for turn in found if isinstance(turn, Asks))))
    assert len({count for count, _ in seen}) > 4
    assert len({first for _, first in seen}) > 10


def test_panels():
    (found,) = of(LABS, panels=True, horizon=3)
    names = [turn.name for turn in found if isinstance(turn, Asks)]
    assert set(names) <= set(PANELS)
    given_codes = [turn.code for turn in found if isinstance(turn, Result)]
    assert sorted(given_codes) == sorted(code for name in names for code in PANELS[name])


def test_the_first_result_of_a_test_counts_and_no_result_is_none():
    twice = [LABS[0]._replace(time=LABS[0].time + 9, value=99.0), LABS[0], LABS[1]._replace(value=None)]
    (found,) = of(twice)
    assert [turn for turn in found if isinstance(turn, Result)] == [Result(LABS[0].code, 5.0, LABS[0].unit)]
    (found,) = of([LABS[0]._replace(value=None, flag="H")])
    assert found[2:4] == (Result(LABS[0].code, None, LABS[0].unit), Means(LABS[0].code, "high"))
    assert of([]) == []
    assert of([LABS[0]._replace(visit="2", time=None)]) != []
    assert of([LABS[0]._replace(visit="", time=26000 * DAY)]) == []


def test_arguments():
    with pytest.raises(ValueError, match="horizon is 0"):
        of(LABS, horizon=0)
    with pytest.raises(ValueError, match="of one subject"):
        dialogues_of([Event("a"), Event("b")], seed=0)
