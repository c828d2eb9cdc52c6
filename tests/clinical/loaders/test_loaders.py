"""Loaders: one content in every format gives one table; what is broken is named without what it holds."""

import calendar
import collections
import copy
import csv
import gzip
import io
import json
import logging
import re
import traceback

import pytest

from rlalign.clinical.events import Event, table_of
from rlalign.clinical.loaders import BadRecord, read_fhir, read_meds, read_mimic, read_omop, read_synthea
from rlalign.clinical.loaders.files import MAX_LINE_BYTES, lines, number, seconds
from tests.clinical.loaders import records
from tests.clinical.loaders.records import CANARY, LOINC


def fhir(folder, **settings):
    return read_fhir(sorted(folder.iterdir()), loinc=LOINC, clock="wall", **settings)


def mimic(folder, **settings):
    return read_mimic(folder, loinc=LOINC, **settings)


FORMATS = {  # name -> (writes, reads, fields that the format has not)
    "ndjson": (records.write_ndjson, fhir, {}),
    "bundle": (records.write_bundle, fhir, {}),
    "mimic": (records.write_mimic, mimic, {}),
    "omop": (records.write_omop, read_omop, {"flag": ""}),
    "synthea": (records.write_synthea, read_synthea, {"flag": "", "low": None, "high": None}),
}
each_format = pytest.mark.parametrize("name", FORMATS)


def wanted(lacking, local=True):
    """The expected table, as a format without these fields has it."""
    events = [Event(*row)._replace(**lacking) for row in records.expected()]
    return list(table_of(e for e in events if local or e.system != records.LOCAL[0]))


@each_format
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_content_gives_the_same_table(name, packed, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    write, read, lacking = FORMATS[name]
    write(tmp_path, packed=packed)
    left_out = collections.Counter()
    table = table_of(read(tmp_path, left_out=left_out))
    assert list(table) == wanted(lacking, local=name not in ("omop", "synthea"))
    assert CANARY not in f"{table!r}{left_out}{capfd.readouterr()}{caplog.text}{list(table)}"


def test_what_is_left_out_is_counted(tmp_path):
    records.write_bundle(tmp_path)
    left_out = collections.Counter()
    list(fhir(tmp_path, left_out=left_out))
    assert left_out == {"other resources": 1}
    records.write_omop(tmp_path)
    left_out = collections.Counter()
    list(read_omop(tmp_path, left_out=left_out))
    assert left_out == {"measurement: a concept of no vocabulary that is read": 1}


# What errors say


def heard(error, *, of=BadRecord):
    """All that an exception tells, and those that it came from."""
    assert isinstance(error, of), repr(error)
    said = ""
    while error is not None:
        said += f"{''.join(traceback.format_exception_only(error))}{error.args}{vars(error)}"
        error = error.__cause__ or error.__context__
    return said


def outcome(read, folder, **settings):
    """What was said about a folder: by an error, or by the counts."""
    left_out = collections.Counter()
    try:
        list(read(folder, left_out=left_out, **settings))
    except BadRecord as error:
        return heard(error)
    return str(left_out)


def cells(path):
    rows = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))
    yield from ((i, j, rows) for i in {1, len(rows) - 1} for j in range(len(rows[i])) if i > 1 or j % 2)


@pytest.mark.parametrize("name", ["mimic", "omop", "synthea"])
def test_a_broken_cell_is_named_without_its_value(name, tmp_path):
    write, read, _ = FORMATS[name]
    write(tmp_path, packed=False)
    secret, broken = "Jane 1970-13-77 Secret", set()
    for path in sorted(tmp_path.iterdir()):
        text = path.read_bytes()
        for i, j, rows in cells(path):
            changed = copy.deepcopy(rows)
            changed[i][j] = secret
            buffer = io.StringIO()
            csv.writer(buffer).writerows(changed)
            path.write_text(buffer.getvalue(), newline="")
            said = outcome(read, tmp_path)
            assert "Jane" not in said
            assert "Secret" not in said
            assert CANARY not in said
            if found := re.search(r"([\w.]+):(\d+), (\w+): is ", said):
                assert (found[1], found[3]) == (path.name, rows[0][j])
                line = 1 + sum(cell.count("\n") for row in rows[: i + 1] for cell in row) + i
                assert int(found[2]) == line
                broken.add(found[3])
            assert "Jane" not in outcome(read, tmp_path, on_error="skip")
        path.write_bytes(text)
    assert len(broken) >= 4, broken


def leaves(value, path=()):
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield path
    for key, child in inside:
        yield from leaves(child, (*path, key))


@pytest.mark.parametrize(
    "value", ["Jane 1970-13-77 Secret", {"Jane": "Secret"}, ["Secret"], None, 10**400], ids=range(5)
)
def test_any_part_of_a_resource_may_be_anything(value, tmp_path):
    path, broken = tmp_path / "one.ndjson", set()
    first = {resource["resourceType"]: resource for resource in reversed(list(records.fhir_resources()))}
    for resource in first.values():
        for place in leaves(resource):
            changed = copy.deepcopy(resource) if place else value
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            if place:
                holder[place[-1]] = value
            try:
                path.write_text("\n" + json.dumps(changed))
            except ValueError:  # more digits than json writes
                continue
            said = outcome(fhir, tmp_path)
            assert "Jane" not in said
            assert "Secret" not in said
            assert CANARY not in said
            if found := re.search(r"one.ndjson:2, ?([\w.]*)", said):
                broken.add(found[1])
            assert "Secret" not in outcome(fhir, tmp_path, on_error="skip")
    if isinstance(value, dict):
        assert {"Patient.birthDate", "Patient.gender", "Observation.valueQuantity.value"} <= broken
        assert {"Observation.subject.reference", "Encounter.period.end"} <= broken


def test_a_file_that_ends_anywhere(tmp_path):
    for packed in (True, False):
        folder = tmp_path / str(packed)
        folder.mkdir()
        records.write_ndjson(folder, packed=packed)
        for path in folder.iterdir():
            whole = path.read_bytes()
            for end in range(0, len(whole), 31 if packed else 211):
                path.write_bytes(whole[:end])
                assert CANARY not in outcome(fhir, folder)
                path.write_bytes(whole[:end] + b"\xff" + whole[end + 1 :])
                assert CANARY not in outcome(fhir, folder)
            path.write_bytes(whole)


def one(tmp_path, text, name="a.ndjson"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadRecord) as caught:
        list(read_fhir(path))
    assert str(caught.value).startswith(f"{path}:")
    assert "Jane" not in heard(caught.value)
    return str(caught.value).removeprefix(f"{path}:")


def test_broken_json_is_named_by_line_and_column(tmp_path):
    assert one(tmp_path, "{}x\n") == "1: broken JSON at line 1, column 3 of the record"
    good = '{"resourceType": "Basic"}\n\n'
    assert one(tmp_path, good + '{"resourceType": "Jane') == "3: broken JSON at line 1, column 18 of the record"
    assert one(tmp_path, good + "[1]") == "3: is no JSON object"
    assert one(tmp_path, '{"Jane": 1}') == "1, resourceType: is missing, or is no text"
    assert one(tmp_path, b'{"Jane": "\xe4"}') == "1: not UTF-8; convert the file"
    assert one(tmp_path, "[" * 10**6) == "1: nested too deeply"
    assert one(tmp_path, '{"Jane": %s}' % ("9" * 5000)) == "1: broken JSON: a number that cannot be read"
    bundle = {"resourceType": "Bundle", "entry": [{"resource": {"resourceType": "Patient", "gender": "Jane"}}]}
    said = one(tmp_path, json.dumps(bundle), "b.json")
    assert said == "1, entry[0] Patient.id: is missing, or is no text"
    path = tmp_path / "c.ndjson.gz"
    path.write_bytes(gzip.compress(good.encode() * 9)[:-9])
    with pytest.raises(BadRecord, match=r"c.ndjson.gz:\d+: the archive is broken or cut off"):
        list(read_fhir(path))
    path.write_bytes(b"Jane")
    with pytest.raises(BadRecord, match=r"c.ndjson.gz:1: the archive is broken"):
        list(read_fhir(path))


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("rlalign.clinical.loaders.files.MAX_LINE_BYTES", 100)
    assert one(tmp_path, '{"resourceType": "Basic"}\n' + "Jane" * 100).startswith("2: longer than 100 bytes")
    assert MAX_LINE_BYTES == 1 << 26


def test_one_broken_resource_costs_one(tmp_path):
    records.write_bundle(tmp_path)
    path = tmp_path / "bundle.json"
    whole = list(fhir(tmp_path))
    path.write_text(path.read_text().replace('"value": 1.4', '"value": "Jane"'))
    left_out = collections.Counter()
    assert len(list(fhir(tmp_path, on_error="skip", left_out=left_out))) == len(whole) - 1
    assert left_out == {"Observation.valueQuantity.value: is no number": 1, "other resources": 1}


def test_columns_and_rows_of_csv(tmp_path):
    records.write_mimic(tmp_path, packed=False)
    path = tmp_path / "patients.csv"
    whole = path.read_text()
    cases = {
        whole.replace("anchor_year,", "year,"): ":1, anchor_year: the header lacks this column",
        whole + "10001,Jane\n": ": 2 values under 6 columns",
        whole + '10001,"Jane\n': ": no row of comma-separated values",
        "": ":1, subject_id: the header lacks",
        "\ufeff" + whole: None,  # as spreadsheets write it
        whole + "\n": None,
    }
    for text, said in cases.items():
        path.write_text(text)
        found = outcome(mimic, tmp_path)
        assert "Jane" not in found
        assert (said in found) if said else ("patients" not in found)
    path.write_bytes(b"subject_id,gender,anchor_age,anchor_year\n1,J\xe4ne,1,2\n")
    assert "patients.csv:2, gender: not UTF-8" in outcome(mimic, tmp_path)
    for header, said in ((b"J\xe4ne", ":1: not UTF-8"), (b'"Jane', ":1: no row of comma-separated values")):
        path.write_bytes(b"subject_id,gender,anchor_age,anchor_year," + header + b"\n1,F,1,2,3\n")
        for on_error in ("raise", "skip"):
            assert f"patients.csv{said}" in outcome(mimic, tmp_path, on_error=on_error)


BROKEN_ROWS = {  # what is wrong -> the row in bytes, and how it is counted
    "too few": (b"Jane,2\n", "{0} values under {1} columns"),
    "an open quote": (b'Jane,"2\n', "no row of comma-separated values"),
    "a quote inside": (b'"Ja"ne",2\n', "no row of comma-separated values"),
    "too long": (b"Jane,%b\n" % (b"9" * 131073), "no row of comma-separated values"),
    "not UTF-8": (b"Jane \xe4", "not UTF-8; convert the file"),
    "not UTF-8 on two lines": (b'"Jane\n\xe4"', "not UTF-8; convert the file"),
}


@pytest.mark.parametrize("name", ["mimic", "omop", "synthea"])
@pytest.mark.parametrize("what", BROKEN_ROWS)
def test_one_broken_row_costs_one(what, name, tmp_path):
    """Of each file, before its first rows and behind the last one: what is left is what was there."""
    write, read, _ = FORMATS[name]
    write(tmp_path, packed=False)
    before, whole = collections.Counter(), list(table_of(read(tmp_path)))
    list(read(tmp_path, left_out=before))
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        table = list(csv.reader(io.StringIO(content.decode(), newline="")))
        broken, said = BROKEN_ROWS[what]
        if what.startswith("not UTF-8"):
            broken += b"," * (len(table[0]) - 1) + b"\n"
        for i in {1, 2, len(table)}:
            parts = io.StringIO(newline=""), io.StringIO(newline="")
            for part, rows in zip(parts, (table[:i], table[i:]), strict=True):
                csv.writer(part).writerows(rows)
            path.write_bytes(parts[0].getvalue().encode() + broken + parts[1].getvalue().encode())
            left_out = collections.Counter()
            found = list(table_of(read(tmp_path, on_error="skip", left_out=left_out)))
            assert found == whole
            (more,) = (left_out - before).items()
            assert more[1] == 1
            assert said.format(2, len(table[0])) in more[0]
            line = parts[0].getvalue().count("\n") + 1 + ("two" in what)
            assert re.search(rf"{path.name}:{line}(, \w+)?: ", raised := outcome(read, tmp_path))
            assert "Jane" not in f"{left_out}{raised}"
        path.write_bytes(content)


def test_files_that_are_not_there(tmp_path):
    for read in (mimic, read_synthea, read_omop):
        with pytest.raises(FileNotFoundError, match=r"no such file, nor \w+\.csv\.gz"):
            list(read(tmp_path))
    with pytest.raises(FileNotFoundError):
        list(read_fhir(tmp_path / "nothing.ndjson"))


def test_arguments(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="clock is 'local'"):
        list(read_fhir([], clock="local"))
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        list(read_fhir(tmp_path / "a.json", on_error="ignore"))


# What values mean


def test_times():
    at = lambda text, clock="utc": seconds(text, "f", clock)
    assert at("1970-01-02") == at("1970-01-02 00:00:00") == at("1970-01-02T00:00:00Z") == 86400
    assert at("1970-01-01T00:00:00-04:00") == 4 * 3600
    assert at("1970-01-01T00:00:00-04:00", "wall") == 0
    assert at("1971") == at("1971-01") == 365 * 86400
    assert at("1970-01-01T00:00:01.999") == 1
    assert at("1969-12-31T23:59:59.5Z") == -1
    assert at("2016-12-31T23:59:60Z") == at("2016-12-31T23:59:60.5Z") == at("2017-01-01")  # a leap second
    assert at("2180-05-06 22:23:00") == calendar.timegm((2180, 5, 6, 22, 23, 0))
    assert at(None) is at("") is None
    for text in (
        "Jane",
        "12345678",
        "1970-13",
        "197",
        "1970-W01-1x",
        1970,
        "1970-01-01T99",
        "1970-01-01T00:00:61",
        "1970-01-01T00:60",
    ):
        with pytest.raises(Exception, match="is no ISO 8601") as caught:
            at(text)
        assert "Jane" not in heard(caught.value, of=Exception)


def test_numbers():
    assert [number(x, "f") for x in (1, 1.5, "2", " 3.5 ", "1e3", "", None, "nan")] == [1, 1.5, 2, 3.5, 1e3] + [
        None
    ] * 3
    for bad in ("Jane", "1_000", True, [], {}, "inf", 10**400, "1,5"):
        with pytest.raises(Exception, match="is no number") as caught:
            number(bad, "f")
        assert "Jane" not in heard(caught.value, of=Exception)


def observation(**fields):
    return {"resourceType": "Observation", "status": "final", "subject": {"reference": "Patient/1"}} | (
        {"code": {"coding": [{"system": "http://loinc.org", "code": "718-7"}]}} | fields
    )


def read_one(tmp_path, resource, **settings):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(resource))
    return list(read_fhir(path, **settings))


def coding(system, code):
    return {"coding": [{"system": system, "code": code}]}


def test_blood_pressure_is_in_components(tmp_path):
    part = lambda code, value: {"code": coding("http://loinc.org", code), "valueQuantity": {"value": value}}
    panel = observation(code=coding("http://loinc.org", "85354-9"), effectivePeriod={"start": "1970-01-02"})
    panel["component"] = [part("8480-6", 120), part("8462-4", 80), {"code": {"text": "Jane"}}]
    found = read_one(tmp_path, panel)
    assert found == [Event("1", 86400, "", "loinc", code, value) for code, value in (("8480-6", 120), ("8462-4", 80))]
    assert len(read_one(tmp_path, panel | {"valueInteger": 3})) == 3


RANGE = {"low": {"value": 1, "unit": "g/dL"}, "high": {"value": 2}}
MEANING = "http://terminology.hl7.org/CodeSystem/referencerange-meaning"


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"referenceRange": [RANGE]}, (1.0, 2.0)),
        ({"referenceRange": [RANGE, RANGE]}, (1.0, 2.0)),
        ({"referenceRange": [RANGE, {"low": {"value": 3}}]}, (None, None)),  # for men and for women, say
        ({"referenceRange": [RANGE, {"low": {"value": 3}, "type": coding(MEANING, "treatment")}]}, (1.0, 2.0)),
        ({"referenceRange": [RANGE | {"type": coding(MEANING, "normal")}]}, (1.0, 2.0)),
        ({"referenceRange": [{"low": {"value": 10, "unit": "g/L"}}]}, (None, None)),
        ({"referenceRange": [{"high": {"value": 2}}]}, (None, 2.0)),
        ({"referenceRange": [{"text": "1-2"}]}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_reference_ranges(fields, found, tmp_path):
    quantity = {"value": 1.5, "unit": "G/DL", "system": "http://unitsofmeasure.org", "code": "g/dL"}
    (event,) = read_one(tmp_path, observation(valueQuantity=quantity, **fields))
    assert (event.value, event.unit) == (1.5, "g/dL")
    assert (event.low, event.high) == found


def test_interpretations(tmp_path):
    v3 = "http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation"
    cases = {"HH": [coding(v3, "HH")], "L": [coding(v3, "POS"), coding(v3, "L")], "A": [{"text": "Abnormal"}], "": []}
    for flag, stated in cases.items():
        (event,) = read_one(tmp_path, observation(interpretation=stated))
        assert event.flag == flag[:1]


def test_what_did_not_happen(tmp_path):
    assert not read_one(tmp_path, observation(status="cancelled"))
    assert not read_one(tmp_path, observation(subject=None))
    assert not read_one(tmp_path, observation(subject={"reference": "Patient?identifier=mrn|Jane"}))
    assert not read_one(tmp_path, observation(code={"text": "Jane"}))
    sick = observation(resourceType="Condition", code=coding("http://hl7.org/fhir/sid/icd-10", "e11.9"))
    assert [e.code for e in read_one(tmp_path, sick)] == ["E119"]
    refuted = coding("http://terminology.hl7.org/CodeSystem/condition-ver-status", "refuted")
    assert not read_one(tmp_path, sick | {"verificationStatus": refuted})
    times = {"recordedDate": "1970-01-02", "onsetDateTime": "1970-01-01"}
    assert [e.time for e in read_one(tmp_path, sick | times)] == [86400]
    assert [e.time for e in read_one(tmp_path, sick | {"onsetDateTime": "1970-01-01"})] == [0]


def test_references_of_all_kinds(tmp_path):
    for reference in ("Patient/7", "urn:uuid:7", "https://x.org/fhir/Patient/7", "Patient/7/_history/3"):
        (event,) = read_one(tmp_path, observation(subject={"reference": reference}, valueInteger=1))
        assert event.subject == "7"


def test_what_a_bundle_creates_has_the_id_of_its_url(tmp_path):
    patient = {"resourceType": "Patient", "gender": "female"}
    result = observation(subject={"reference": "urn:uuid:7f"}, valueInteger=1)
    entries = [{"resource": result}, {"fullUrl": "urn:uuid:7f", "resource": patient}]
    found = read_one(tmp_path, {"resourceType": "Bundle", "entry": entries})
    assert [event.subject for event in found] == ["7f", "7f"]
    entries[1]["resource"]["id"] = "9"
    found = read_one(tmp_path, {"resourceType": "Bundle", "entry": entries})
    assert [event.subject for event in found] == ["9", "9"]


def test_of_several_codes_the_preferred_one(tmp_path):
    codes = [{"system": "urn:local", "code": "hb"}, {"system": "http://loinc.org", "code": "718-7"}, {"code": "x"}]
    (event,) = read_one(tmp_path, observation(code={"coding": codes}))
    assert event[3:5] == ("loinc", "718-7")
    (event,) = read_one(tmp_path, observation(code={"coding": codes[:1]}))
    assert event[3:5] == ("urn:local", "hb")
    (event,) = read_one(tmp_path, observation(code={"coding": codes[:1]}), loinc={"hb": "718-7"})
    assert event[3:5] == ("loinc", "718-7")


def test_icd_versions_of_mimic(tmp_path):
    records.write_mimic(tmp_path, packed=False)
    path = tmp_path / "diagnoses_icd.csv"
    path.write_text(path.read_text().replace(",9\n", ",11\n").replace(",9\r\n", ",11\r\n"))
    assert re.search(r"diagnoses_icd.csv:\d+, icd_version: is neither 9 nor 10", outcome(mimic, tmp_path))


def test_a_stream_takes_no_more_than_is_asked_for(tmp_path):
    path = tmp_path / "a.ndjson"
    path.write_text("\n".join(map(json.dumps, records.fhir_resources())) + "\nJane")
    stream = read_fhir(path)
    assert next(stream).code == "2160-0"  # the last line is broken, and has not been read
    with pytest.raises(BadRecord):
        list(stream)
    assert len(list(lines(path))) == 14


def test_meds_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'read_meds needs pyarrow: pip install "rlalign\[clinical\]"'):
        list(read_meds(tmp_path))
