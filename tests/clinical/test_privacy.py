"""Identifiers planted in records of every format are in no log, error, metric, page or checkpoint."""

import collections
import logging
import traceback
import warnings

import numpy as np
import pytest

import rlalign as ra
from rlalign.clinical.dialogue import dialogues_of, messages, read_dialogues, render, write_dialogues
from rlalign.clinical.events import split_by_subject, table_of
from rlalign.clinical.loaders import BadRecord
from rlalign.models.config import ModelConfig
from rlalign.types import Demonstration, Prompt
from tests.clinical.loaders.records import CANARY
from tests.clinical.loaders.test_loaders import FORMATS

PLANTED = {  # of records.py -> what nothing else contains
    b"10001": b"880142710001",
    b"10002": b"880142710002",
    b"20001": b"771305920001",
    b"20002": b"771305920002",
}
SECRETS = (CANARY, "8801427", "7713059", "2180-05", "2154-01", "1970-13", "Quetzal")
BROKEN = b"Quetzal 880142710001 1970-13-77"
VOCABULARY = 256  # bytes, and 0 as the end


def planted(name, folder):
    write, read, _ = FORMATS[name]
    folder.mkdir()
    write(folder, packed=False)
    for path in folder.iterdir():
        text = path.read_bytes()
        for old, new in PLANTED.items():
            text = text.replace(old, new)
        path.write_bytes(text)
    return read


def damages(text):
    """Versions of a file that are broken at or beside an identifier."""
    places = [text.find(new) for new in PLANTED.values() if new in text]
    for at in places:
        yield text[: at + 6]  # cut off
        yield text[:at] + b"\xff" + text[at:]
        yield text[:at] + b'"' + text[at:]
        yield text[:at] + b'{"' + text[at:]
    for value in (b"2180-05-06", b"2154-01-02", b"1970-01-01", b'"1970"', b"1.4", b"2022"):
        if value in text:
            yield text.replace(value, BROKEN)
            yield text.replace(value, b'"%s"' % BROKEN)
    yield text + BROKEN
    yield text + b'\n"' + BROKEN


def told(error):
    """All that an exception and those behind it say, attributes included, and the traceback as it is printed."""
    said = "".join(traceback.format_exception(error))
    while error is not None:
        said += f"{error!r}{error.args}{vars(error)}{getattr(error, 'doc', '')}{getattr(error, 'object', '')}"
        error = error.__cause__ or error.__context__
    return said


def silent(text):
    return not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize("name", FORMATS)
def test_loaders_and_dialogues_tell_nothing(name, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    read = planted(name, tmp_path / "data")
    left_out, errors = collections.Counter(), 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        table = table_of(read(tmp_path / "data", left_out=left_out))
        assert set(table.subjects) == {"880142710001", "880142710002"}
        parts = split_by_subject(table, (0.5, 0.5), seed=0)
        found = [dialogue for events in table.by_subject() for dialogue in dialogues_of(events, seed=0)]
        assert found
        said = f"{table!r}{parts!r}{left_out}"
        said += "".join(f"{render(d, seed=0)}{messages(d, seed=0)}{d!r}" for d in found)
        for wrong in (lambda: table.of(BROKEN.decode()), lambda: dialogues_of(list(table), seed=0)):
            with pytest.raises((KeyError, ValueError)) as caught:
                wrong()
            said += told(caught.value)
        for path in sorted((tmp_path / "data").iterdir()):
            whole = path.read_bytes()
            for broken in damages(whole):
                path.write_bytes(broken)
                try:
                    list(read(tmp_path / "data"))
                except BadRecord as error:
                    said, errors = said + told(error), errors + (path.name in str(error))
                skipped = collections.Counter()
                try:
                    list(read(tmp_path / "data", on_error="skip", left_out=skipped))
                except BadRecord as error:  # of the file as a whole
                    said += told(error)
                said += str(skipped)
            path.write_bytes(whole)
    assert errors > 20
    assert silent(said)
    assert silent(f"{capfd.readouterr()}{caplog.text}{[str(w.message) for w in warned]}")


def test_files_of_dialogues_are_written_where_they_are_asked_for(tmp_path):
    path = tmp_path / "dialogues.txt"
    read = planted("mimic", tmp_path / "data")
    found = [d for events in table_of(read(tmp_path / "data")).by_subject() for d in dialogues_of(events, seed=0)]
    write_dialogues(path, found, seed=0)
    assert silent(path.read_text())
    path.write_bytes(path.read_bytes() + b"\n[" + BROKEN)
    for broken in (path.read_bytes(), path.read_bytes() + b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"dialogues\.txt") as caught:
            read_dialogues(path)
        assert silent(told(caught.value))


def demonstrations(folder):
    """What the doctor says, as answers to what was said before; the records they are from lie beside them."""
    read = planted("ndjson", folder)
    found = []
    for events in table_of(read(folder)).by_subject():
        for dialogue in dialogues_of(events, seed=0):
            said = messages(dialogue, seed=0)
            for i, message in enumerate(said):
                if message["role"] == "assistant":
                    text = "\n".join(m["content"] for m in said[:i])
                    record = {"subject": events[0].subject, "visit": events[-1].visit, "note": CANARY}
                    prompt = Prompt(len(found), np.frombuffer(text.encode(), np.uint8).astype(np.int32), text, record)
                    response = np.frombuffer(message["content"].encode() + b"\0", np.uint8).astype(np.int32)
                    found.append(Demonstration(prompt, response))
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("algorithm", ["sft", "gsil_bernoulli"])
def test_a_run_keeps_nothing_of_its_records(algorithm, tmp_path, capfd, caplog):
    """Of fit_offline on dialogues, and no sentence of theirs either.

    Where the policy answers prompts itself, the page shows some with their answers unless samples_shown is 0.
    """
    caplog.set_level(logging.DEBUG)
    examples = demonstrations(tmp_path / "data")
    shape = {"width": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_width": 4, "mlp_width": 16, "tied_head": True}
    decoder = ra.Decoder(ModelConfig(vocab_size=VOCABULARY, max_positions=1024, **shape))
    answers = {"generation": ra.SampleConfig(1, 2, eos_ids=(0,)), "samples_shown": 0}
    config = ra.OfflineConfig(
        folder=str(tmp_path / "run"),
        algorithm=algorithm,
        examples_per_step=1,
        optimizer=ra.OptimizerConfig(learning_rate=1e-2),
        row_length=1024,
        **({} if algorithm == "sft" else answers),
    )
    ra.fit_offline(config, decoder=decoder, params=decoder.init(0), examples=examples)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name: path for path in files}
    assert {"metrics.jsonl", "config.json", "report.html"} <= set(names)
    assert any("checkpoints" in path.parts for path in files)
    assert "samples.jsonl" not in names or not names["samples.jsonl"].read_text()
    written = "".join(path.read_bytes().decode("latin-1") + str(path.relative_to(tmp_path)) for path in files)
    heard = f"{capfd.readouterr()}{caplog.text}"
    sentences = {line for example in examples for line in example.prompt.text.split("\n")}
    for text in (written, heard):
        assert silent(text)
        assert not [line for line in sentences if line in text]
    wrong = examples[0]._replace(response=np.array([VOCABULARY], np.int32))
    with pytest.raises(ValueError, match=r"^examples\[0\] holds") as caught:
        ra.fit_offline(config, decoder=decoder, params=decoder.init(0), examples=[wrong])
    assert silent(told(caught.value))
