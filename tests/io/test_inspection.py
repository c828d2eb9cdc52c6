"""rlalign check: what it says of run folders, sound and spoilt."""

import json
import shutil

import pytest

from rlalign.cli import main
from rlalign.io.checkpoint import Checkpoints
from rlalign.io.inspection import check_run
from rlalign.io.metrics import MetricsLog
from tests.io.test_checkpoint import STATE


@pytest.fixture
def run(tmp_path):
    """Checkpoints of steps 10 and 20, the first the best, and 22 lines of metrics."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(10, STATE, {}, best=0.5)
        checkpoints.save(20, STATE, {})
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=0) as log:
        for step in range(22):
            log.write(step, {"loss": 1.0})
    return tmp_path


def written(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def spoil(run, step):
    """Flips a bit of a step's largest file; its name."""
    path = max((run / "checkpoints" / str(step)).rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def test_a_sound_run(run, capsys):
    before = written(run)
    assert main(["check", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[0], line.split("MB   ")[-1]) for line in lines[1:3]] == [
        ("10", "intact, the best"),
        ("20", "intact"),
    ]
    assert lines[3:] == ["metrics.jsonl: steps 0 to 21", "A run that is continued here begins at step 20."]
    assert written(run) == before


def test_damage_is_named_and_where_the_run_would_go_on(run, capsys):
    name = spoil(run, 20)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 22, "lo')
    assert main(["check", str(run)]) == 1
    said = capsys.readouterr().out
    assert "DAMAGED: " in said
    assert f"{name} is not what was saved (its CRC-32 differs)" in said
    assert "metrics.jsonl: steps 0 to 21, and a torn line, which a continued run removes" in said
    assert said.endswith("A run that is continued here begins at step 10.\n")


def test_without_an_intact_step_a_run_is_not_continued(run):
    spoil(run, 10), spoil(run, 20)
    text, sound = check_run(run)
    assert not sound
    assert text.endswith(
        "No step is intact: a run is not continued here. Put one back from a copy, or use another folder."
    )


def test_a_run_that_saved_nothing_yet_is_told_from_one_whose_checkpoints_are_gone(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints" / "saving-0-1-1").mkdir(parents=True)
    text, sound = check_run(run)
    assert sound
    assert text.endswith("Nothing is saved yet: a run begins at step 0 here.")
    rows = [{"step": step, "seconds_save": 0.1} for step in range(2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, sound = check_run(run)
    assert not sound
    assert "No step is intact: a run is not continued here" in text


def test_damaged_metrics_do_not_hide_the_checkpoints(run, capsys):
    (run / "metrics.jsonl").write_text('{"step": 0}\nnothing\n{"step": 2}\n')
    assert main(["check", str(run)]) == 1
    said = capsys.readouterr().out
    assert "metrics.jsonl:2: not a JSON object" in said
    assert said.count("intact") == 2


def test_a_step_that_the_run_removes_meanwhile_is_left_out(run, monkeypatch):
    problem = Checkpoints.problem

    def removed(self, step):
        found = problem(self, step)
        if step == 10:
            shutil.rmtree(self.folder / "10")
        return found

    monkeypatch.setattr(Checkpoints, "problem", removed)
    text, sound = check_run(run)
    assert sound
    assert " 10 " not in text
    assert text.endswith("begins at step 20.")


@pytest.mark.parametrize("how", ["half", "another step"])
def test_a_damaged_mark_of_the_best_step_is_told(run, capsys, how):
    path = run / "checkpoints" / "best.json"
    text = path.read_text()
    path.write_text(text[:10] if how == "half" else text.replace("10", "20", 1))
    assert main(["check", str(run)]) == 1
    said = capsys.readouterr().out
    assert f"DAMAGED: {path} is damaged" in said
    assert "the best" not in said
    assert said.endswith("begins at step 20.\n")


def test_another_folder_is_refused(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "has no checkpoints/ and no metrics.jsonl: give the folder of a run" in capsys.readouterr().err
