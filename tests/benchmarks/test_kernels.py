"""The scripts that measure on hardware, run as a whole where there is none."""

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rlalign_kernels.attention import blocks
from rlalign_kernels.attention.blocks import ROWS, Row, Tile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """A module of benchmarks/ by its name: the folder is a script's, not a package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def script(name, *arguments):
    """What a script prints on stdout, line by line, and its exit code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, ROOT / "benchmarks" / name, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    return done.stdout.splitlines(), done.returncode, done.stderr


def test_every_step_of_the_measurement_runs():
    forms = ["xla", "xla, repeated", "cudnn"]
    lines, code, told = script("attention.py", "--preset", "smoke", *(x for form in forms for x in ("--form", form)))
    assert code == 0, told
    result = json.loads(lines[-1])
    assert set(result["errors"]) == set(forms[:2])
    assert all(0 < error < 1e-2 for error in result["errors"].values())
    assert result["absent"]["cudnn"]
    assert result["peak_tflops"] is None
    assert [(row["form"], row["pass"]) for row in result["rows"]] == [
        (form, name) for form in forms[:2] for name in ("forward", "both")
    ]
    shared, repeated = result["rows"][1], result["rows"][3]
    assert shared["gain"] == pytest.approx(repeated["ms"] / shared["ms"], rel=1e-2)
    assert repeated["gain"] == 1
    assert shared["alpha"] == pytest.approx((2 * 64 * 65) / (40 * 41 + 48 * 105), abs=1e-3)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| 40, 24, 2")]
    assert [row[3] for row in cells] == [str(row["ms"]) for row in result["rows"]]


def test_log_probs_are_measured_beside_plain_products():
    quick = ("--repeats", "1", "--least-ms", "0", "--form", "xla")
    lines, code, told = script("logprobs.py", "--preset", "smoke", *quick)
    assert code == 0, told
    result = json.loads(lines[-1])
    assert 0 < result["errors"]["xla"] < 1e-2
    assert [row["pass"] for row in result["rows"]] == ["forward", "both"]
    for row, count in zip(result["rows"], (1, 4), strict=True):
        assert row["products"] == pytest.approx(row["ms"] / result["product_ms"] / count, rel=0.2)


def test_a_batch_that_does_not_fit_is_run_in_pieces(benchmark):
    timing = benchmark("timing")

    def measure(pieces, room):
        if pieces < room:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return 12.0 / pieces

    assert timing.in_pieces(lambda n: measure(n, 1), 8) == (12.0, 1)
    assert timing.in_pieces(lambda n: measure(n, 3), 8) == (12.0, 4)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        timing.in_pieces(lambda n: measure(n, 9), 8)
    with pytest.raises(ZeroDivisionError):
        timing.in_pieces(lambda n: 1 / 0, 8)


def test_peaks_by_kind_of_device(benchmark):
    peak = benchmark("timing").peak_tflops
    kinds = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "TPU v5 lite", "TPU v5p", "TPU v6 lite", "cpu")
    assert [peak(kind) for kind in kinds] == [989, 756, 989, 197, 459, 918, None]


def test_copies_of_a_prompt_and_back(benchmark):
    attention = benchmark("attention")
    shape = attention.GroupShape(3, 2, 2)
    copies, x = attention.Copies(shape), np.arange(7.0)[None, :, None, None]
    rows = copies.repeat(x)
    np.testing.assert_array_equal(rows[:, :, 0, 0], [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]])
    np.testing.assert_array_equal(copies.fold(copies.once(rows)), x)
    np.testing.assert_array_equal(copies.fold(rows)[0, :, 0, 0], [0, 2, 4, 3, 4, 5, 6])
    np.testing.assert_array_equal(attention.forest(shape), [[7, 7, 7, 5, 5, 7, 7]])
    np.testing.assert_array_equal(attention.repeated(shape, 2), [[5] * 5] * 2)


def test_the_table_is_rewritten_for_the_device_at_hand(tmp_path):
    table = tmp_path / "blocks.py"
    shutil.copy(blocks.__file__, table)
    before = table.read_text()
    flags = {"shape": "smoke", "heads": "4", "kv-heads": "1", "width": "64", "repeats": "1", "least-ms": "0"}
    smoke = [x for name, value in flags.items() for x in (f"--{name}", value)]
    lines, code, told = script("autotune.py", *smoke, "--table", str(table))
    assert code == 0, told
    result = json.loads(lines[-1])
    written = runpy.run_path(str(table))
    [new] = set(written["ROWS"]) - {tuple(row) for row in ROWS}
    assert json.loads(json.dumps(new)) == result["row"]
    assert new[:4] == ("interpret_triton", jax.devices()[0].device_kind, 64, 2)
    head = {"group": 4, "width": 64, "dtype": "bfloat16"}
    assert written["tile_of"]("interpret_triton", 40, **head) == (16, 16, 2, *new.tile[3:])
    assert written["tile_of"]("interpret_triton", 40, **head | {"width": 96}) == blocks.tile_of(
        "interpret_triton", 40, **head
    )
    comment = " ".join(x.strip(" #") for x in table.read_text().splitlines() if x not in before.splitlines()[:-1])
    assert f"cpu, jax {jax.__version__}, " in comment
    assert f"autotune.py {' '.join(smoke)}" in comment
    assert Path(blocks.__file__).read_text() == before


def rows_of(text):
    found = {"__name__": "blocks"}
    exec(compile(text, "blocks.py", "exec"), found)
    return tuple(Row(*row[:5], Tile(*row.tile)) for row in found["ROWS"])


def test_a_row_is_put_before_the_general_one_and_in_place_of_its_own(benchmark):
    rewritten, text = benchmark("autotune").rewritten, Path(blocks.__file__).read_text()
    general = next(row for row in ROWS if row.backend == "triton" and row.width == 128)
    mine = general._replace(device="NVIDIA H100", tile=Tile(64, 64, 1, (4, 4, 8), (3, 2, 1), 512))
    once = rewritten(text, ROWS, general, mine, "NVIDIA H100, a command of more than one line: " + "x " * 80)
    at = ROWS.index(general)
    assert rows_of(once) == (*ROWS[:at], mine, *ROWS[at:])
    assert max(map(len, once.splitlines())) <= 120
    better = mine._replace(tile=mine.tile._replace(block_q=128))
    twice = rewritten(once, rows_of(once), mine, better, "again")
    assert rows_of(twice) == (*ROWS[:at], better, *ROWS[at:])
    assert "x x x" not in twice
    assert twice.replace("    # again\n", "").count("\n") == text.count("\n") + 1
