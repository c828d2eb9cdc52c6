import html.parser
import itertools
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rlalign.io import charts
from rlalign.io.report import write_report

HOSTILE = (
    '</pre></td><script>alert("1")</script><img src=x onerror=alert(2)> & \' {body} \u202eevil \x00\x1b[31m \ud800'
)


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside <style>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def having(self, tag, **attributes):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attributes.items())]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


FULL = {
    "accuracy": 0.3,
    "reward": 0.25,
    "loss": -0.01,
    "entropy": 1.1,
    "ratio_error": 3e-6,
    "kl": 0.01,
    "grad_norm": 0.5,
    "clip_share": 0.01,
    "response_length": 12.0,
    "truncated_share": 0.02,
    "groups_without_signal": 3,
    "tokens_stored": 100,
    "tokens_repeated": 250,
    "tokens_per_second": 4000.0,
    "seconds": 0.5,
    "seconds_rollout": 0.2,
    "seconds_reward": 0.01,
    "seconds_pack": 0.02,
    "seconds_update": 0.27,
    "learning_rate": 5e-4,
    "skipped": 0,
    "invalid_rewards": 0,
    "compiles": 0,
}
DRAWN = {
    "accuracy": "Accuracy",
    "eval_accuracy": "Accuracy",
    "reward": "Reward",
    "loss": "Loss",
    "entropy": "Entropy",
    "kl": "KL to the reference",
    "ratio_error": "Off-policy distance",
    "clip_share": "Clipped ratios",
    "grad_norm": "Gradient norm",
    "groups_without_signal": "Groups without signal",
    "learning_rate": "Learning rate",
    "response_length": "Response length",
    "truncated_share": "Truncated responses",
    "seconds": "Step time by phase",
    "seconds_update": "Step time by phase",
    "tokens_per_second": "Tokens per second",
}


def make_run(folder, rows, config=None, samples=()):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def page_of(*args, **kwargs):
    return Page(write_report(make_run(*args, **kwargs)).read_text(encoding="utf-8"))


def drawn(page):
    return {attrs["aria-label"] for attrs in page.having("svg")}


def full_rows(steps=40):
    rows = [{"step": step, **FULL} for step in range(steps)]
    for row in rows[::10]:
        row["eval_accuracy"] = 0.25 + row["step"] / 100
    return rows


def sample(step, prompt, completion, reward, **more):
    return {
        "step": step,
        "prompt": prompt,
        "completion": completion,
        "reward": reward,
        "stop": "eos",
        "split": "eval",
    } | more


def test_a_full_run_shows_everything(tmp_path):
    config = {
        "algorithm": "gprs",
        "seed": 3,
        "versions": {"jax": "0.10.2"},
        "sampling": {"eos_ids": [1, 2]},
        "empty": {},
    }
    samples = [sample(0, "1+1=", "3", 0.0), sample(30, "1+1=", "2", 1.0)]
    page = page_of(tmp_path / "sums", full_rows(), config, samples)
    assert drawn(page) == {*DRAWN.values(), "Shared-prefix gain"}
    assert not page.open  # every tag is closed, in order
    for expected in (
        "rlalign run sums gprs seed 3 jax 0.10.2 40 steps 20 s",
        "Held-out accuracy 25.0% → 55.0% +30.0 points , steps 0 to 30",
        "Best step 30 held-out 55.0%",
        "Tokens/s 4,000",
        "Prefix gain 2.50×",
        "Faults ✓ 0 skipped 0 bad rewards 0 compiles",
        "Prompt Before, step 0 After, step 30 1+1= 3 ✗ 0 2 ✓ 1",
        "sampling.eos_ids [1, 2] empty {}",
    ):
        assert expected in page.text


@pytest.mark.parametrize("key", DRAWN)
def test_a_chart_is_drawn_only_if_its_metric_is_present(tmp_path, key):
    assert drawn(page_of(tmp_path, [{"step": 0, key: 0.5}, {"step": 1, key: 0.25}])) == {DRAWN[key]}


@pytest.mark.parametrize(
    "rows", [[{"step": 0}], [{"step": 0, "reward": None}, {"step": 1, "reward": "text", "kl": [1.0]}]]
)
def test_a_run_without_numbers_still_has_a_page(tmp_path, rows):
    assert drawn(page_of(tmp_path, rows)) == set()


@pytest.mark.parametrize(
    "values",
    [[0.0], [1.0], [0.5] * 3, [0.0, 0.0], [-1.0, 1e9], [1e-9, 2e-9], [None, 3.0, None, 4.0], [math.nan, 3.0, math.inf]],
)
def test_extreme_values_are_drawn_with_finite_coordinates(tmp_path, values):
    rows = [{"step": 5 * i, **dict.fromkeys(DRAWN, value)} for i, value in enumerate(values)]
    page = page_of(tmp_path, rows)
    assert drawn(page) == set(DRAWN.values())
    coordinates = " ".join(
        value for _, attrs in page.tags for name, value in attrs.items() if name in ("d", "x", "y", "cy")
    )
    assert coordinates
    assert "nan" not in coordinates
    assert "inf" not in coordinates
    assert "None" not in page.text


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    config = {
        "title": HOSTILE,
        "algorithm": HOSTILE,
        "model": HOSTILE[:60],
        "versions": {HOSTILE: HOSTILE},
        HOSTILE: [HOSTILE],
    }
    samples = [sample(0, HOSTILE, HOSTILE, 0.0), sample(1, HOSTILE, HOSTILE, HOSTILE, stop=HOSTILE)]
    page = page_of(tmp_path, full_rows(), config, samples)
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "link", "object", "base", "form", "a"})
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count('<script>alert("1")</script>') >= 8
    assert "{body}" in page.text
    assert not any(character in page.text for character in "\u202e\x00\x1b\ud800")


def test_the_page_loads_nothing(tmp_path):
    samples = [sample(0, "see https://example.org/a.js", "url(http://example.org/b.css)", 1.0)]
    path = write_report(make_run(tmp_path, full_rows(), {}, samples))
    text, page = path.read_text(), Page(path.read_text())
    assert not [(tag, attrs) for tag, attrs in page.tags if {"src", "href", "srcset", "action"} & attrs.keys()]
    (policy,) = [a["content"] for a in page.having("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    for known in ("https://example.org/a.js", "http://example.org/b.css", "http-equiv"):
        text = text.replace(known, "")
    assert "http" not in text


def test_points_tell_their_values_when_hovered(tmp_path):
    page = page_of(tmp_path, [{"step": 0, "eval_accuracy": 0.25, "accuracy": 0.5}, {"step": 7, "accuracy": 0.75}])
    assert "step 0 training 50.0% held-out 25.0%" in page.text
    assert "step 7 training 75.0%" in page.text


def test_samples_pair_the_same_prompt_and_none_is_picked(tmp_path):
    prompts = [f"prompt {i}." for i in range(20)]
    samples = [sample(0, prompt, "no", 0.0) for prompt in prompts]
    samples += [sample(9, prompt, "yes", float(i > 3), stop="max_tokens") for i, prompt in enumerate(prompts)]
    samples += [sample(5, "between", "no", 0.0), sample(9, "train only", "no", 0.0, split="train")]
    page = page_of(tmp_path, [{"step": 0}], samples=samples)
    assert "Held-out prompts, the first 12 of 20 in the file." in page.text
    assert [f"prompt {i}." in page.text for i in range(20)] == [True] * 12 + [False] * 8
    assert page.text.count("truncated") == 12
    assert len(page.having("span", **{"class": "tag right"})) == 8
    assert "between" not in page.text
    assert "train only" not in page.text


def test_right_and_wrong_come_from_the_sample_where_it_says_so(tmp_path):
    samples = [sample(0, "a", "x", 5.0, correct=False), sample(0, "b", "y", 0.49), sample(0, "c", "z", None)]
    page = page_of(tmp_path, [{"step": 0}], samples=samples)
    assert len(page.having("pre", **{"class": "wrong"})) == 3
    assert "no reward" in page.text


def test_torn_files_of_a_running_experiment_are_reported_as_far_as_they_go(tmp_path):
    make_run(tmp_path, full_rows(), {}, [sample(0, "a", "x", 1.0)])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 40, "rew')
    assert "40 steps" in Page(write_report(tmp_path).read_text()).text


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no step to report"):
        write_report(tmp_path)


def test_the_command_prints_the_path(tmp_path):
    make_run(tmp_path, full_rows())
    command = [sys.executable, "-W", "error", "-m", "rlalign.io.report", str(tmp_path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tmp_path / "report.html"), "")


def seeds(count, steps=30):
    return [[{"step": s, "reward": s / 10 + seed} for s in range(0, steps, 5)] for seed in range(count)]


def test_curve_svg_is_a_standalone_file_with_means_and_seeds():
    text = charts.curve_svg({"GPRS <b>": seeds(3), "GRPO": seeds(1)}, "reward", title="Reward & more")
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    kinds = [path.get("class") for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert (kinds.count("raw"), kinds.count("curve")) == (3, 2)  # one seed needs no thin line
    words = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Reward & more", "mean of 1 to 3 seeds; thin lines: each seed", "GPRS <b> 3.50", "GRPO 2.50"} <= set(words)
    assert "prefers-color-scheme: dark" in text


def test_curve_svg_names_the_run_that_has_nothing_to_draw():
    with pytest.raises(ValueError, match="no value of 'kl' in GPRS"):
        charts.curve_svg({"GPRS": seeds(2)}, "kl")
    with pytest.raises(ValueError, match="the seeds of GPRS have no step in common"):
        charts.curve_svg({"GPRS": [[{"step": 0, "kl": 1.0}], [{"step": 1, "kl": 1.0}]]}, "kl")


def test_labels_never_cover_each_other():
    runs = {f"run {i}": [[{"step": 0, "kl": 1.0}, {"step": 1, "kl": 2.0}]] for i in range(6)}
    root = ElementTree.fromstring(charts.curve_svg(runs, "kl"))
    labels = [t for t in root.iter("{http://www.w3.org/2000/svg}text") if (t.text or "").startswith("run ")]
    heights = sorted(float(t.get("y")) for t in labels)
    assert len(heights) == 6
    assert all(b - a >= 16.9 for a, b in itertools.pairwise(heights))


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.879, "%", "87.9%"),
        (12345, "", "12.3k"),
        (1234, "", "1,234"),
        (2.5e6, "", "2.5M"),
        (0.0312, "", "0.031"),
        (-0.5, "", "−0.500"),
        (2e-6, "", "2e−6"),
        (0, "", "0"),
        (1.0, "", "1"),
        (2.2241, "×", "2.22×"),
        (0.0164, "s", "16.4\u2009ms"),
        (1.5, "s", "1.50\u2009s"),
    ],
)
def test_numbers_are_written_as_people_do(value, unit, expected):
    assert charts.number(value, unit) == expected


def test_ticks_are_round_inside_and_told_apart():
    for low, high in ((0, 1), (-0.013, 0.02), (3, 3.7), (0, 1e-7), (1e5, 9e5), (0.2, 0.9)):
        for unit in ("", "%", "s", "×"):
            marks, step = charts.ticks(low, high, 4)
            names = [charts.number(mark, unit, step=step) for mark in marks]
            assert 2 <= len(marks) <= 5
            assert low - 1e-9 * step <= marks[0]
            assert marks[-1] <= high + 1e-9 * step
            assert len(set(names)) == len(names)


def test_smoothing_keeps_a_line_a_line_and_does_not_lag():
    line = [(float(x), 3.0 * x + 1) for x in range(50)]
    assert [y for _, y in charts.smooth(line, 4)][10:40] == pytest.approx([y for _, y in line[10:40]])


def test_thinning_keeps_order_and_spikes():
    points = [(float(x), math.sin(x)) for x in range(10_000)]
    points[5003] = (5003.0, 99.0)
    kept = charts.thin(points, 200)
    assert len(kept) <= 202
    assert (5003.0, 99.0) in kept
    assert kept == sorted(kept)


def test_one_spike_does_not_flatten_the_rest():
    low, high = charts.value_range([float(x % 10) for x in range(100)] + [1e6])
    assert low <= 0
    assert 9 <= high < 20
    assert charts.value_range([0.0, 0.5], "%") == (0.0, pytest.approx(0.53))
