"""The file of workups and the page made of it: what is read, what is refused without a value, what is on the page."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import cli
from rlalign.clinical.dialogue import NOTICE
from rlalign.clinical.workup import Workup
from rlalign.io.clinical_report import write_clinical_report
from rlalign.io.workups import read_workups, write_workups
from tests.io.episodes import Page

CANARY = "Jane Roe MRN 4711 born 1961-04-02"
WHOLE = {
    "asker": "mine",
    "gold": ["E11.9"],
    "ranked": ["E11.9", "I10"],
    "belief": [0.7, 0.2],
    "tests": ["diabetes panel", "blood count:718-7"],
    "orders": ["diabetes panel"],
    "results": 6,
    "abnormal": 2,
    "redundant": 0,
    "rejects": 0.5,
    "sex": "female",
    "age": "40-49",
    "lists": [["I10"], ["E11.9"], ["E11.9"]],
}


def save(folder, records):
    path = folder / "workups.jsonl"
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records))
    return path


def cohort():
    """Forty patients, twelve of them men and ten of those older, three askers."""
    for asker, hit in (("mine", True), ("random", False), ("prior", False)):
        for n in range(40):
            one = WHOLE | {"asker": asker, "sex": "male" if n < 12 else "female", "age": "60+" if n < 10 else "40-49"}
            if not hit:
                one |= {"ranked": ["I10", "E11.9"] if n % 2 else ["E11.9", "I10"]}
            if asker == "prior":
                one = {k: v for k, v in one.items() if k not in ("tests", "redundant", "rejects", "lists")}
            yield one


def page_of(folder, records):
    text = write_clinical_report(save(folder, records)).read_text(encoding="utf-8")
    return Page(text).root, text


def test_the_page_opens_with_the_notice_and_says_all(tmp_path):
    page, _ = page_of(tmp_path, cohort())
    main = page.one("main")
    assert main.text.startswith(NOTICE)
    assert page.one("h1").text == "How “mine” asks and diagnoses"
    assert [one.text for one in page.all("h2")] == [
        *("Diagnosis", "What tests bring", "Calibration", "Asking", "By sex", "By age", "How to read this")
    ]
    assert page.one("ul", "chips").text == "40 held-out patients 1 diagnoses 2 others beside it"
    first = next(page.all("table"))
    head = [one.text for one in first.one("thead").all("th")]
    assert head[:3] == ["Asker", "Recall @1", "Recall @5"]
    rows = [[cell.text for cell in row.inside] for row in first.one("tbody").all("tr")]
    assert [row[0] for row in rows] == ["mine", "random", "prior"]
    assert rows[0][1].startswith("100.0% ")
    assert rows[1][1].startswith("50.0% ")
    assert all(one["aria-label"] and one["role"] == "img" for one in page.all("svg"))
    sex = page.one("main").text
    assert "female 28" in sex
    assert "male 12" in sex
    assert "diabetes panel 100.0%" in sex
    assert "hemoglobin blood count, 718-7 100.0%" in sex
    assert "LOINC is copyright" in sex


def test_the_page_loads_nothing_and_runs_no_script(tmp_path):
    page, text = page_of(tmp_path, cohort())
    (policy,) = [one["content"] for one in page.all("meta") if one["http-equiv"]]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert {one.tag for one in page.all()}.isdisjoint({"script", "img", "iframe", "link", "object", "a", "form"})
    assert not any(one["src"] or one["href"] for one in page.all())
    assert "url(" not in text
    assert not re.search(r"\b(nan|inf)\b", text)


def test_small_groups_are_hidden_on_the_page(tmp_path):
    records = [one | {"age": "60+" if n % 40 < 7 else "40-49"} for n, one in enumerate(cohort())]
    page, _ = page_of(tmp_path, records)
    table = list(page.all("table"))[-1]
    assert [[cell.text for cell in row.inside] for row in table.one("tbody").all("tr")] == [
        [band, *["hidden"] * 4] for band in ("40-49", "60+")
    ]
    assert "<10" in page.one("dl").text


def test_what_is_not_known_is_left_out(tmp_path):
    page, _ = page_of(tmp_path, [{"asker": "mine", "gold": ["R51.9"], "ranked": ["I10"]}] * 12)
    assert [one.text for one in page.all("h2")] == ["Diagnosis", "Asking", "How to read this"]
    assert "Macro recall@1 0.0%" in page.one("section", "facts").text


def test_rare_diagnoses_have_their_names(tmp_path):
    records = [WHOLE | {"gold": [code]} for code in ("E11.9", "I10", "J45901") for _ in range(10 + len(code))]
    save(tmp_path, records)
    path = write_clinical_report(tmp_path, names={"I10": "<i>pressure</i>"})
    page = Page(path.read_text(encoding="utf-8")).root
    row = next(row for row in page.all("tr") if row.text.startswith("I10"))
    assert row.text.startswith("I10 <i>pressure</i> 13 0.0%")


def test_a_second_file_stands_beside(tmp_path):
    one, two = list(cohort())[:40], list(cohort())[40:]
    (tmp_path / "b").mkdir()
    beside = save(tmp_path / "b", two)
    path = write_clinical_report(save(tmp_path, one), beside=beside)
    assert path == tmp_path / "workups.html"
    assert path.read_text(encoding="utf-8") == page_of(tmp_path, cohort())[1]
    with pytest.raises(ValueError, match=r"b/workups\.jsonl:1: its asker was given other patients"):
        write_clinical_report(save(tmp_path, one[:-1]), beside=beside)


def test_the_command_prints_the_path(tmp_path, capsys):
    save(tmp_path, cohort())
    assert cli.main(["clinical-report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'workups.html'}\n"
    assert cli.main(["clinical-report", str(tmp_path / "none.jsonl")]) == 2
    assert "rlalign clinical-report: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (WHOLE | {CANARY: 1}, "field 14 of the line is none of asker, gold, ranked,"),
        (WHOLE | {"patient_id": CANARY}, "field 14 of the line is none of"),
        (WHOLE | {"asker": CANARY + "?"}, "asker must be a name"),
        (WHOLE | {"gold": [CANARY]}, "entry 1 of gold is none of ICD-10 codes"),
        (WHOLE | {"gold": CANARY}, "gold is a text, must be an array"),
        (WHOLE | {"gold": {CANARY: CANARY}}, "gold is an object, must be an array"),
        (WHOLE | {"ranked": [CANARY]}, "entry 1 of ranked"),
        (WHOLE | {"belief": [CANARY, 0.1]}, "entry 1 of belief"),
        (WHOLE | {"tests": [[CANARY]]}, "entry 1 of tests"),
        (WHOLE | {"orders": [CANARY + "?"]}, "entry 1 of orders"),
        (WHOLE | {"lists": [[CANARY]]}, "entry 1 of lists"),
        (WHOLE | {"results": CANARY}, "results must be a whole number"),
        (WHOLE | {"rejects": CANARY}, "rejects must be a number"),
        (WHOLE | {"abstained": CANARY}, "abstained must be true or false"),
        (WHOLE | {"sex": CANARY}, "sex must be one of"),
        (WHOLE | {"age": CANARY}, "age must be a band"),
        ({"asker": CANARY, "gold": ["I10"]}, "no field 'ranked'; add it"),
        (f'{{"asker": "{CANARY}" "gold"', "broken JSON"),
        (f'["{CANARY}"]', "an array, not an object"),
    ],
)
def test_bad_lines_are_named_and_their_values_are_not(tmp_path, capsys, line, complaint):
    save(tmp_path, [*cohort(), "", line])
    assert cli.main(["clinical-report", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert f"workups.jsonl:122: {complaint}" in said.err
    assert not any(word in said.err + said.out for word in ("Jane", "4711", "1961"))
    assert not (tmp_path / "workups.html").exists()


NEARLY = {  # texts that have the shape of their field
    "gold": ["M47110"],
    "tests": ["MRN 4711", "Jane Roe"],
    "orders": ["diabetes panel", "Jane Roe"],
    "ranked": ["M47110", "E11.9"],
    "lists": [["M47110"], ["M47110"], ["M47110"]],
}


@pytest.mark.parametrize("field", NEARLY)
def test_an_identifier_that_looks_like_a_code_is_not_on_the_page(tmp_path, field):
    """Planted with one patient of 40, whatever the field."""
    records = list(cohort())
    for n in (3, 43, 83):  # the same patient
        records[n] |= {field: NEARLY[field]} if field in records[n] else {}
    _, text = page_of(tmp_path, records)
    assert not any(word in text for word in ("Jane", "4711"))


def test_an_asker_of_one_patient_is_refused_without_its_name(tmp_path, capsys):
    save(tmp_path, [*cohort(), WHOLE | {"asker": "Jane Roe"}])
    assert cli.main(["clinical-report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "workups.jsonl:121: its asker has 1 patients" in said
    assert "Jane" not in said


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"workups\.jsonl: no such file"):
        read_workups(tmp_path)
    save(tmp_path, [""])
    with pytest.raises(ValueError, match=r"workups\.jsonl has no workup: give one line of JSON a patient"):
        read_workups(tmp_path)


CODES = st.sampled_from(["A00", "I10", "E11.9", "C7A.1", "S72.001A", "Z99"])
LISTS = st.lists(CODES, min_size=1, max_size=4, unique=True).map(tuple)
WORKUPS = st.builds(
    Workup,
    asker=st.sampled_from(["mine", "random"]),
    gold=LISTS,
    ranked=LISTS,
    tests=st.none() | st.lists(st.sampled_from(["a", "b:2345-7"]), max_size=3).map(tuple),
    orders=st.none() | st.just(("a",)),
    abstained=st.booleans(),
    sex=st.none() | st.just("other"),
    age=st.none() | st.just("90+"),
    lists=st.none() | st.lists(LISTS, min_size=1, max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=25)
@given(st.lists(WORKUPS, min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory, workups):
    folder = tmp_path_factory.mktemp("workups")
    workups = [dataclasses.replace(one, belief=(0.1234567,) * len(one.ranked)) for one in workups]
    found = read_workups(write_workups(folder, workups))
    assert list(found) == list(range(1, len(workups) + 1))
    for got, want in zip(found.values(), workups, strict=True):
        assert got == dataclasses.replace(want, belief=(0.123457,) * len(want.ranked))
