import io
import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from rlalign.io.files import write_atomic
from rlalign.io.metrics import MetricsLog, progress, read_metrics


def write_steps(path, steps, **kwargs):
    with MetricsLog(path, **kwargs) as log:
        for step in steps:
            log.write(step, {"loss": step / 3})


def test_values_read_back_as_the_same_numbers(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    values = {
        "python": 0.1,
        "count": 3,
        "flag": True,
        "text": "naïve",
        "nothing": None,
        "jax": jnp.float32(0.1),
        "half": jnp.bfloat16(0.1),
        "numpy": np.float64(1 / 3),
        "integer": np.int64(2**53 + 1),
        "bool": np.bool_(True),
        "array": jnp.array([1.5, jnp.nan]),
        "list": [1, np.float32(0.5)],
    }
    with MetricsLog(path) as log:
        log.write(0, values)
    (row,) = read_metrics(path)
    assert row == {
        "step": 0,
        "python": 0.1,
        "count": 3,
        "flag": True,
        "text": "naïve",
        "nothing": None,
        "jax": float(np.float32(0.1)),
        "half": float(jnp.bfloat16(0.1)),
        "numpy": 1 / 3,
        "integer": 2**53 + 1,
        "bool": True,
        "array": [1.5, None],
        "list": [1, 0.5],
    }
    assert np.float32(row["jax"]) == np.float32(0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), jnp.float32(jnp.inf)])
def test_what_is_not_finite_is_null_and_the_line_strict_json(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(0, {"loss": value})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"step": 0, "loss": None}


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(0, {"loss": 1.0})
        assert read_metrics(path) == [{"step": 0, "loss": 1.0}]


def test_resume_drops_the_steps_that_will_be_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(6))
    before = path.read_bytes().splitlines(keepends=True)
    with MetricsLog(path, resume_step=4):
        assert path.read_bytes() == b"".join(before[:4])  # bitwise, and before anything is written
    write_steps(path, [4, 5, 6], resume_step=4)
    assert [row["step"] for row in read_metrics(path)] == list(range(7))
    assert path.read_bytes().splitlines(keepends=True)[:6] == before


def test_resume_at_zero_starts_anew_and_beyond_the_end_keeps_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3))
    write_steps(path, [7], resume_step=7)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 7]
    write_steps(path, [0])
    assert [row["step"] for row in read_metrics(path)] == [0]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_line_torn_anywhere_is_left_out_and_removed_on_resume(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3))
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    torn = whole[: len(whole) - len(last) + min(cut, len(last) - 2)]
    path.write_bytes(torn)
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    write_steps(path, [2], resume_step=2)
    assert path.read_bytes() == whole


def test_a_last_line_that_lacks_only_its_newline_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert len(read_metrics(path)) == 3
    write_steps(path, [], resume_step=3)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("bad", [b'{"loss": 1}', b"[1]", b'{"step": "1"}', b"\xff", b"{", b'{"step": true}'])
def test_damage_before_the_last_line_is_an_error_that_names_the_place(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + bad + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object with an integer \"step\""):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        MetricsLog(path, resume_step=1)
    assert path.read_bytes().count(b"\n") == 3  # left as it was for a person to look at


def test_a_kill_during_the_cut_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3))
    whole, fired = path.read_bytes(), []

    def killed(*_):
        fired.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rlalign.io.files.os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsLog(path, resume_step=1)
    assert fired == [1]
    assert path.read_bytes() == whole


def test_a_reader_of_a_file_that_is_replaced_sees_the_old_text_whole(tmp_path):
    path = tmp_path / "file.json"
    write_atomic(path, "old")
    with path.open() as reader:
        write_atomic(path, "new \ud800")
        assert reader.read() == "old"
    assert path.read_text() == "new ?"
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_step_is_written_once_and_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [0, 1])
    with MetricsLog(path, resume_step=2) as log, pytest.raises(ValueError, match="step 1 after step 1"):
        log.write(1, {})


def test_a_value_json_has_no_place_for_is_named(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        with pytest.raises(TypeError, match="metric 'table' is a dict"):
            log.write(0, {"table": {}})
        log.write(0, {"loss": 1.0})  # nothing was written, so the step is still free
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1


def test_an_absent_file_reads_as_no_lines(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_tensorboard_mirror_gets_the_finite_scalars(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *args):
            calls.append(args)

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with MetricsLog(tmp_path / "m.jsonl", resume_step=5, tensorboard=tmp_path / "tb") as log:
        log.write(5, {"loss": jnp.float32(0.5), "bad": math.nan, "text": "x"})
    assert calls == [(str(tmp_path / "tb"), 5), ("loss", 0.5, 5), "closed"]


def test_tensorboard_without_tensorboardx_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install rlalign\[tensorboard\]"):
        MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path / "tb")
    assert not (tmp_path / "m.jsonl").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
    with progress(25, start=2, every=10) as show:
        for step in range(2, 25):
            metrics = {"accuracy": jnp.float32(step / 100), "reward": 1.0, "loss": None, "tokens_per_second": 12345.6}
            show(metrics | ({"eval_accuracy": 0.5} if step == 15 else {}))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step  3", "step 10", "step 16", "step 20", "step 25"]
    assert "accuracy 2.0%  reward 1.000  tokens/s 12,346" in lines[0]
    assert "held-out 50.0%" in lines[2]
    assert "loss" not in err
    assert lines[-1].endswith("0s left")


def test_progress_draws_a_bar_on_a_terminal_and_keeps_stdout_clean(capsys):
    terminal = Terminal()
    with progress(3, stream=terminal) as show:
        show({"eval_accuracy": 0.25})
        show({"accuracy": 0.5})
        print('{"result": 1}')
        show({"accuracy": 0.75})
    assert capsys.readouterr().out == '{"result": 1}\n'
    assert "3/3" in terminal.getvalue()
    assert "held-out 25.0%  accuracy 75.0%" in terminal.getvalue()


def test_progress_lets_errors_through(capsys):
    with pytest.raises(ZeroDivisionError), progress(3) as show:
        show({"loss": 1 / 0})
