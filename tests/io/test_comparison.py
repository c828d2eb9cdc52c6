"""The page that sets runs beside each other."""

import json

import pytest

from rlalign.io.comparison import comparison_table, last_values, shown, write_comparison


def run(folder, values):
    folder.mkdir(parents=True)
    rows = [{"step": k, "loss": 1.0} | ({} if v is None else {"eval_accuracy": v}) for k, v in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def groups(tmp_path):
    return {
        "good <b>": {"gprs": [run(tmp_path / "a", [0.1, 0.5]), run(tmp_path / "b", [0.1, 0.7, None])]},
        "bad": {"gprs": [run(tmp_path / "c", [0.1, 0.2])], "grpo": [run(tmp_path / "d", [0.0, 0.25])]},
    }


def test_the_table_has_means_and_students_intervals(groups):
    table = comparison_table(groups)
    value, low, high = table["good <b>"]["gprs"]
    assert value == pytest.approx(0.6)
    assert high - value == pytest.approx(12.7062 * 0.1, rel=1e-4)  # t of one degree of freedom, s / sqrt(2) = .1
    assert value - low == pytest.approx(high - value)
    assert table["bad"]["grpo"].value == 0.25


def test_the_page_shows_every_run_and_no_markup_of_names(groups, tmp_path):
    page = write_comparison(tmp_path, "Sweep", groups, note="three & more").read_text()
    for text in ("good &lt;b&gt;", "grpo 25.0%", "60.0% ± 127.1", "three &amp; more", "mean of 2 seeds"):
        assert text in page
    assert "<b>" not in page.split("</style>", 1)[1].split("<svg")[0]


def test_one_seed_has_no_interval(groups):
    assert shown(comparison_table(groups)["bad"]["grpo"], "%") == "25.0%"


def test_a_run_without_the_metric_is_named(tmp_path):
    folder = run(tmp_path / "x", [None])
    with pytest.raises(ValueError, match=r"x/metrics\.jsonl has no value of 'eval_accuracy'"):
        last_values([folder], "eval_accuracy")
    with pytest.raises(ValueError, match="nothing to compare"):
        write_comparison(tmp_path, "t", {})
