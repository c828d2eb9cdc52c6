"""MEDS by pyarrow; make test-clinical."""

import collections
import datetime
import logging
import math

import pytest

pytest.importorskip("pyarrow", reason='pip install "rlalign[clinical]"')

import pyarrow
from pyarrow import parquet

from rlalign.clinical.events import Event, table_of
from rlalign.clinical.loaders import BadRecord, read_meds
from tests.clinical.loaders import records
from tests.clinical.loaders.records import CANARY, LOINC
from tests.clinical.test_privacy import told


def write_meds(folder):
    columns = list(zip(*records.meds_rows(), strict=True))
    at = lambda text: None if text is None else datetime.datetime.fromisoformat(text)
    arrays = {
        "subject_id": pyarrow.array(columns[0], pyarrow.int64()),
        "time": pyarrow.array(map(at, columns[1]), pyarrow.timestamp("us")),
        "code": pyarrow.array(columns[2], pyarrow.string()),
        "numeric_value": pyarrow.array(columns[3], pyarrow.float32()),
        "hadm_id": pyarrow.array(columns[4], pyarrow.int64()),
        "unit": pyarrow.array(columns[5], pyarrow.string()),
        "ref_range_lower": pyarrow.array(columns[6], pyarrow.float64()),
        "ref_range_upper": pyarrow.array(columns[7], pyarrow.float64()),
        "flag": pyarrow.array(columns[8], pyarrow.string()),
        "text_value": pyarrow.array([CANARY] * len(columns[0]), pyarrow.string()),
    }
    (folder / "data" / "train").mkdir(parents=True)
    parquet.write_table(pyarrow.table(arrays), folder / "data" / "train" / "0.parquet")
    return arrays


def test_meds_gives_the_same_table(tmp_path):
    arrays = write_meds(tmp_path)
    left_out = collections.Counter()
    table = table_of(read_meds(tmp_path / "data", loinc=LOINC, left_out=left_out))
    assert list(table) == list(table_of(Event(*row) for row in records.expected()))
    assert left_out == {"a code of no vocabulary that is read": 2}
    assert CANARY not in f"{left_out}{table!r}{table.names}"
    standard = [f"LOINC{slash}718-7" for slash in ("/", "//")] + [
        "ICD10CM/E11.9",
        "SNOMED/44054006",
        "LOINC//718-7//g/dL",
    ]
    few = {name: arrays[name].slice(0, len(standard)) for name in ("subject_id", "time", "numeric_value")}
    (tmp_path / "few").mkdir()
    parquet.write_table(pyarrow.table(few | {"code": pyarrow.array(standard)}), tmp_path / "few" / "0.parquet")
    assert [(event.system, event.code, event.unit) for event in read_meds(tmp_path / "few")] == [
        *(("loinc", "718-7", ""), ("loinc", "718-7", ""), ("icd10", "E119", ""), ("snomed", "44054006", "")),
        ("loinc", "718-7", "g/dL"),
    ]


def test_broken_meds(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.parquet file in it"):
        list(read_meds(tmp_path))
    path = tmp_path / "a.parquet"
    path.write_bytes(b"Jane")
    with pytest.raises(BadRecord, match=r"a.parquet: no parquet file, or a broken one$"):
        list(read_meds(tmp_path))
    parquet.write_table(pyarrow.table({"subject_id": [1], "Jane": [1]}), path)
    with pytest.raises(BadRecord, match=r"a.parquet, time: the file lacks this column"):
        list(read_meds(tmp_path))
    row = {"subject_id": [1], "code": ["LOINC/718-7"], "numeric_value": [1.5]}
    for name, said in (("time", "timestamp"), ("numeric_value", "float")):
        columns = row | {"time": pyarrow.array([0], pyarrow.timestamp("us"))} | {name: ["Jane"]}
        parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(BadRecord, match=rf"{name}: the column is of another type than MEDS has it \({said}\)$"):
            list(read_meds(tmp_path))
    columns = row | {"time": pyarrow.array([0], pyarrow.timestamp("us")), "numeric_value": [math.inf]}
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(BadRecord, match=r"a.parquet:1, numeric_value: is no number$"):
        list(read_meds(tmp_path))
    broken = columns | {"numeric_value": [1.5], "ref_range_lower": ["Jane"]}
    parquet.write_table(pyarrow.table(broken), path)
    with pytest.raises(BadRecord, match=r"a.parquet:1, ref_range_lower: is no number$"):
        list(read_meds(tmp_path))


def test_a_row_of_nobody(tmp_path):
    columns = {"subject_id": pyarrow.array([1, None, 3], pyarrow.int64()), "numeric_value": [1.5] * 3}
    columns |= {"code": ["LOINC/718-7"] * 3, "time": pyarrow.array([0] * 3, pyarrow.timestamp("us"))}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(BadRecord, match=r"a.parquet:2, subject_id: is missing$"):
        list(read_meds(tmp_path))
    left_out = collections.Counter()
    assert [event.subject for event in read_meds(tmp_path, on_error="skip", left_out=left_out)] == ["1", "3"]
    assert left_out == {"subject_id: is missing": 1}


def test_codes_that_are_none(tmp_path):
    """Of a diagnosis without version or code: counted, and no other error."""
    codes = [
        "DIAGNOSIS//ICD//",
        "DIAGNOSIS//ICD//10",
        "DIAGNOSIS//ICD//11//Jane",
        "DIAGNOSIS//Jane",
        "LAB//",
        "Jane",
        "",
    ]
    columns = {"subject_id": [1] * len(codes), "numeric_value": [1.5] * len(codes), "code": codes}
    columns["time"] = pyarrow.array([0] * len(codes), pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    left_out = collections.Counter()
    assert not list(read_meds(tmp_path, left_out=left_out))
    assert left_out == {"a code of no vocabulary that is read": len(codes)}


def test_planted_identifiers_of_broken_meds_are_nowhere(tmp_path, capfd, caplog):
    """Of files that are damaged somewhere, and texts that are no UTF-8."""
    caplog.set_level(logging.DEBUG)
    write_meds(tmp_path)
    path = tmp_path / "data" / "train" / "0.parquet"
    whole, said, places = path.read_bytes(), "", set()
    for at in range(4, len(whole), 37):
        path.write_bytes(whole[:at] + bytes(x ^ 255 for x in whole[at : at + 8]) + whole[at + 8 :])
        try:
            list(read_meds(tmp_path / "data"))
        except BadRecord as error:
            said, places = said + told(error), places | {error.line > 0}
    assert places == {False, True}  # the file as a whole, and its rows
    row = {"subject_id": [1], "numeric_value": [1.5], "time": pyarrow.array([0], pyarrow.timestamp("us"))}
    text = pyarrow.array([CANARY.encode() + b"\xff"]).cast(pyarrow.string(), safe=False)
    path.write_bytes(b"")
    parquet.write_table(pyarrow.table(row | {"code": text}), path)
    with pytest.raises(BadRecord, match=r"0\.parquet:1: what follows cannot be read") as caught:
        list(read_meds(tmp_path / "data"))
    assert CANARY not in f"{said}{told(caught.value)}{capfd.readouterr()}{caplog.text}"
