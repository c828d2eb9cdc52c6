"""Files that others' programs make; make test-clinical."""

import collections
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("carebundle", reason='pip install "rlalign[clinical]"')
pytest.importorskip("clinosim", reason='pip install "rlalign[clinical]"')

from rlalign.clinical.dialogue import dialogues_of, parse, render
from rlalign.clinical.events import split_by_subject, table_of
from rlalign.clinical.loaders import BadRecord, read_fhir
from rlalign.clinical.loinc import TESTS, is_loinc
from rlalign.clinical.reference import interpret_event


def run(name, *arguments):
    command = [Path(sys.executable).with_name(name), *map(str, arguments)]
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def carebundle(tmp_path_factory):
    """The same eight patients as transaction bundles and as a bulk export."""
    folder = tmp_path_factory.mktemp("carebundle")
    people = ("--profile", "mixed", "--count", 8, "--seed", 3, "--sex", "mixed")
    run("carebundle", "generate", *people, "--format", "ndjson", "--out", folder / "ndjson")
    run("carebundle", "generate", *people, "--out", folder / "bundles")
    return folder


@pytest.fixture(scope="module")
def clinosim(tmp_path_factory):
    """Two months of a small hospital, in FHIR and in the simulator's own CSV."""
    folder = tmp_path_factory.mktemp("clinosim")
    months = ("--start", "2025-01-01", "--end", "2025-03-01")
    run(
        "clinosim",
        "simulate",
        "-p",
        200,
        "-s",
        5,
        "--country",
        "US",
        *months,
        "--format",
        "csv",
        "fhir-r4",
        "-o",
        folder,
    )
    return folder


def words_of(table):
    """(event, what it means) of the results of a table's known tests."""
    for events in table.by_subject():
        sex = next((e.code.removeprefix("sex/") for e in events if e.code.startswith("sex/")), None)
        birth = next((e.time for e in events if e.code == "birth"), None)
        for event in events:
            if event.system == "loinc" and event.code in TESTS and event.value is not None:
                age = None if birth is None else (event.time - birth) / 31556952
                yield event, interpret_event(event, sex=sex, age=age).word


def test_bundles_and_exports_of_carebundle_are_the_same(carebundle):
    tables = [table_of(read_fhir((carebundle / name).iterdir())) for name in ("ndjson", "bundles")]
    assert list(tables[0]) == list(tables[1])
    assert len(tables[0].subjects) == 8
    systems = collections.Counter(event.system for event in tables[0])
    assert set(systems) == {"person", "visit", "icd10", "loinc"}
    assert systems["person"] == 16
    assert all(is_loinc(event.code) for event in tables[0] if event.system == "loinc")
    words = collections.Counter(word for _, word in words_of(tables[0]))
    assert sum(words.values()) >= 200
    assert words["unknown"] == 0  # of adults, in US units
    assert words["normal"] > words["high"] > 0
    parts = split_by_subject(tables[0], (0.5, 0.5), seed=0)
    assert sum(len(part) for part in parts) == len(tables[0])


def test_results_of_clinosim_are_those_of_its_tables(clinosim):
    """Its CSV has other names for patients and tests: results are compared as (time, value, unit)."""
    table = table_of(read_fhir((clinosim / "fhir_r4").glob("*.ndjson")))
    with (clinosim / "csv" / "patients.csv").open(newline="") as file:
        assert len(table.subjects) >= len({row["patient_id"] for row in csv.DictReader(file)}) > 20
    with (clinosim / "csv" / "lab_results.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    read = {(event.value, event.unit) for event in table if event.value is not None}
    numbers = [(float(row["value"]), row["unit"]) for row in written if row["value"].replace(".", "", 1).isdigit()]
    found = sum(pair in read for pair in numbers)
    assert len(numbers) > 100
    assert found >= 0.9 * len(numbers), (found, len(numbers))
    agree = collections.Counter((event.flag, word) for event, word in words_of(table))
    assert agree["N", "normal"] + agree["H", "high"] + agree["L", "low"] > 500
    assert not agree["H", "low"] + agree["L", "high"]


def test_names_of_clinosim_are_nowhere(clinosim, tmp_path, capfd):
    names = set()
    for line in (clinosim / "fhir_r4" / "Patient.ndjson").read_text().splitlines():
        names |= {part["family"] for part in json.loads(line)["name"]}
    left_out = collections.Counter()
    table = table_of(read_fhir((clinosim / "fhir_r4").glob("*.ndjson"), left_out=left_out))
    said = f"{table!r}{left_out}{capfd.readouterr()}{table.names}"
    assert len(names) > 10
    assert not [name for name in names if name in said]
    path = tmp_path / "Patient.ndjson"
    text = (clinosim / "fhir_r4" / "Patient.ndjson").read_text()
    path.write_text(text.replace('"birthDate": "', '"birthDate": "on ').replace('"birthDate":"', '"birthDate":"on '))
    with pytest.raises(BadRecord, match=r"Patient.ndjson:1, Patient.birthDate: is no ISO 8601") as caught:
        list(read_fhir(path))
    assert not [name for name in names if name in str(caught.value)]


def test_dialogues_of_clinosim(clinosim):
    table = table_of(read_fhir((clinosim / "fhir_r4").glob("*.ndjson")))
    found = [dialogue for events in table.by_subject() for dialogue in dialogues_of(events, seed=0)]
    assert len(found) >= 5
    assert all(parse(render(dialogue, seed=i)) == dialogue for i, dialogue in enumerate(found))
