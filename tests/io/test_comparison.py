"""The page that sets runs beside each other."""

import json

import pytest

from rlalign.io.comparison import at_equal_cost, comparison_table, last_values, shown, write_comparison


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


def test_groups_may_have_metrics_and_units_of_their_own(tmp_path):
    folder = run(tmp_path / "a", [0.1, 0.5])
    runs = {"gprs": [folder]}
    how = {"metric": {"right": "eval_accuracy", "cost": "loss"}, "unit": {"right": "%", "cost": ""}}
    table = comparison_table({"right": runs, "cost": runs}, how["metric"])
    assert (table["right"]["gprs"].value, table["cost"]["gprs"].value) == (0.5, 1.0)
    page = write_comparison(tmp_path, "Sweep", {"right": runs, "cost": runs}, **how).read_text()
    assert "<td>50.0%</td>" in page
    assert "<td>1</td>" in page


def test_a_run_without_the_metric_is_named(tmp_path):
    folder = run(tmp_path / "x", [None])
    with pytest.raises(ValueError, match=r"x/metrics\.jsonl has no value of 'eval_accuracy'"):
        last_values([folder], "eval_accuracy")
    with pytest.raises(ValueError, match="nothing to compare"):
        write_comparison(tmp_path, "t", {})


def spending(folder, accuracy, cost):
    rows = [{"step": k, "eval_accuracy": a, "actions": c} for k, (a, c) in enumerate(zip(accuracy, cost, strict=True))]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_are_compared_where_they_have_spent_as_much(tmp_path):
    """The value of a row was measured before its step was paid for; null where there was no evaluation."""
    slow = spending(tmp_path / "slow", [0.0, None, 0.4, 0.8], [100, 100, 200, None])  # 0 at 0, .4 at 200, .8 at 400
    fast = spending(tmp_path / "fast", [0.2, 0.6, 0.9], [200, 40, None])  # .2 at 0, .6 at 200, .9 at 240
    runs = {"a": [slow], "b": [fast]}
    found = at_equal_cost(runs, "eval_accuracy", "actions", points=3)
    assert [row["step"] for row in found["a"][0]] == [row["step"] for row in found["b"][0]] == [0.0, 120.0, 240.0]
    assert [row["eval_accuracy"] for row in found["a"][0]] == pytest.approx([0.0, 0.24, 0.48])
    assert [row["eval_accuracy"] for row in found["b"][0]] == pytest.approx([0.2, 0.44, 0.9])
    table = comparison_table({"level": runs}, cost="actions")["level"]
    assert (table["a"].value, table["b"].value) == (pytest.approx(0.48), pytest.approx(0.9))
    page = write_comparison(tmp_path, "Sweep", {"level": runs}, cost="actions").read_text()
    for text in ("a 48.0%", "b 90.0%", "value at equal actions", ">actions</text>"):
        assert text in page
    with pytest.raises(ValueError, match=r"one/metrics\.jsonl has 1 values of 'eval_accuracy': a curve takes two"):
        at_equal_cost({"a": [spending(tmp_path / "one", [0.5], [1])]}, "eval_accuracy", "actions")
    with pytest.raises(ValueError, match=r"fast/metrics\.jsonl has no 'typo' above 0 in step 0: curves at equal cost"):
        at_equal_cost({"a": [fast]}, "eval_accuracy", "typo")
    gap = spending(tmp_path / "gap", [0.2, 0.6, 0.9], [200, None, None])
    with pytest.raises(ValueError, match="no 'actions' above 0 in step 1"):
        at_equal_cost({"a": [fast], "b": [gap]}, "eval_accuracy", "actions")
    late = spending(tmp_path / "late", [None, 0.6, 0.9], [200, 40, None])
    with pytest.raises(ValueError, match="2 values of 'eval_accuracy': a curve takes two, one before the first step"):
        at_equal_cost({"a": [late]}, "eval_accuracy", "actions")
    for runs in ({}, {"a": []}):
        with pytest.raises(ValueError, match="give at least one run, a folder of each"):
            at_equal_cost(runs, "eval_accuracy", "actions")
