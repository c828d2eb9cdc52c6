"""One self-contained page about a run: `python -m rlalign.io.report RUN_FOLDER` writes RUN_FOLDER/report.html.

Read from the folder: metrics.jsonl (rlalign.io.metrics); config.json, the resolved configuration, whose "title",
"algorithm", "preset", "model", "device", "seed" and "versions" head the page; samples.jsonl, one {"step", "prompt",
"completion", "reward", "stop", "split"} a line. The last two are optional. The page loads nothing from anywhere, runs
no script, and forbids both to itself: prompts and completions are text that nobody vetted.
"""

import argparse
import html
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlalign.io.charts import Point, Series, chart, column, number, stacked_chart
from rlalign.io.files import write_atomic
from rlalign.io.metrics import read_metrics
from rlalign.io.style import PAGE, PAGE_CSS

Rows = Sequence[Mapping[str, Any]]

# section -> (title, unit, note, metric); a chart is drawn only if its metric was logged.
_CHARTS = {
    "Learning": (
        ("Reward", "", "mean of a step", "reward"),
        ("Loss", "", "", "loss"),
        ("Pairs told apart", "%", "the better one above the other", "pair_accuracy"),
        ("Margin", "", "of the better over the other", "margin"),
        ("Real answers", "", "f = scale L + shift", "logit_real"),
        ("Generated answers", "", "f = scale L + shift", "logit_generated"),
        ("Held-out answers, by the judge", "", "its mean reward", "eval_judge"),
        ("Held-out pairs", "%", "told apart", "eval_pair_accuracy"),
        ("Held-out perplexity", "", "", "eval_perplexity"),
        ("Entropy", "", "nats a token", "entropy"),
        ("KL to the reference", "", "nats", "kl"),
        ("Off-policy distance", "", "largest |ratio − 1|", "ratio_error"),
        ("Clipped ratios", "%", "share of tokens", "clip_share"),
        ("Gradient norm", "", "before clipping", "grad_norm"),
        ("Groups without signal", "", "every advantage is 0", "groups_without_signal"),
        ("Learning rate", "", "", "learning_rate"),
    ),
    "Episodes": (
        ("Steps of an episode", "", "mean", "episode_steps"),
        ("Score", "", "in [0, 1], the environment's own", "score"),
        ("Invalid actions", "%", "share of steps", "invalid_actions"),
        ("Steps in anchor groups", "%", "of two or more", "anchor_share"),
        ("Anchor groups", "", "mean size", "anchor_size"),
        ("Step part beside episode part", "×", "mean |A_S| / mean |A_E|", "step_to_episode"),
        ("Episodes lost", "", "to their environments", "episodes_lost"),
    ),
    "Responses": (
        ("Response length", "", "tokens, mean", "response_length"),
        ("Truncated responses", "%", "no end before the limit", "truncated_share"),
    ),
    "Speed": (
        ("Step time by phase", "s", "", "seconds"),
        ("Tokens per second", "", "", "tokens_per_second"),
        ("Shared-prefix gain", "×", "tokens if repeated / tokens stored", "prefix_gain"),
    ),
}
_PHASES = ("seconds_rollout", "seconds_reward", "seconds_group", "seconds_pack", "seconds_update")
_SAMPLES_SHOWN = 12
_RIGHT = 0.5  # a reward from here on counts as right, unless the sample has "correct"


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Writes the page of a run, also of one that is still going.

    Args:
      run_folder: holds at least metrics.jsonl with one line.

    Returns:
      The path of report.html, replaced atomically.

    Raises:
      ValueError: nothing to report, or a damaged line, named by file and line.
    """
    folder = Path(run_folder)
    rows = [_with_gain(row) for row in read_metrics(folder / "metrics.jsonl")]
    if not rows:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no step to report")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    title = str(config.get("title") or config.get("name") or folder.resolve().name)
    body = [
        _header(title, config, rows),
        _cards(rows),
        _accuracy(rows),
        *[_section(name, specs, rows) for name, specs in _CHARTS.items()],
        _samples(read_metrics(folder / "samples.jsonl")),
        _configuration(config),
    ]
    report = folder / "report.html"
    write_atomic(report, PAGE.format(title=text_html(title), style=PAGE_CSS, body="\n".join(filter(None, body))))
    return report


def _with_gain(row: Mapping[str, Any]) -> dict[str, Any]:
    stored, repeated = row.get("tokens_stored"), row.get("tokens_repeated")
    return {**row, "prefix_gain": repeated / stored} if stored and repeated else dict(row)


def text_html(value: Any) -> str:
    """Escaped text in which control characters are visible instead of acting."""
    visible = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    hidden = dict.fromkeys([0x7F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
    return html.escape(str(value).translate({**visible, **hidden}))


def _header(title: str, config: Mapping[str, Any], rows: Rows) -> str:
    algorithm = config.get("algorithm", "")
    lead = algorithm.get("name", "") if isinstance(algorithm, dict) else algorithm
    named = [f"{key} {config[key]}" for key in ("preset", "model", "device", "seed") if _is_simple(config.get(key))]
    versions = config.get("versions")
    made = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    facts = [*named, *made, f"{len(rows):,} steps", _duration(sum(y for _, y in column(rows, "seconds")))]
    chips = "".join(f"<li>{text_html(fact)}</li>" for fact in facts if fact)
    if lead:
        chips = f'<li class="lead">{text_html(lead)}</li>{chips}'
    return (
        f'<header><p class="eyebrow">rlalign run</p><h1>{text_html(title)}</h1><ul class="chips">{chips}</ul></header>'
    )


def _is_simple(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and 0 < len(value) <= 80)


def _cards(rows: Rows) -> str:
    cards = [_progress_card(rows)]
    held_out = column(rows, "eval_accuracy")
    if held_out:
        step, value = max(held_out, key=lambda p: p[1])
        cards.append(("Best step", f"{step:,.0f}", f"held-out {number(value, '%')}"))
    seconds = column(rows, "seconds")
    # The first step compiles: speeds are medians.
    speed = [y / s for (_, y), (_, s) in zip(column(rows, "samples"), seconds, strict=False) if s]
    if speed:
        cards.append(("Samples/s", number(statistics.median(speed)), "median step"))
    if tokens := column(rows, "tokens_per_second"):
        cards.append(("Tokens/s", number(_median(tokens)), "median step"))
    if gain := column(rows, "prefix_gain"):
        cards.append(("Prefix gain", number(_median(gain), "×"), "repeated / stored tokens"))
    if seconds:
        cards.append(
            ("Step time", number(_median(seconds), "s"), f"median; all: {_duration(sum(y for _, y in seconds))}")
        )
    cards.append(_health_card(rows))
    items = "".join(
        f'<div class="card fact"><h3>{name}</h3><p class="big">{value}</p><p class="note">{note}</p></div>'
        for name, value, note in filter(None, cards)
    )
    return f'<section class="facts">{items}</section>'


def _progress_card(rows: Rows) -> tuple[str, str, str] | None:
    for key, name in (("eval_accuracy", "Held-out accuracy"), ("accuracy", "Training accuracy"), ("reward", "Reward")):
        points = column(rows, key)
        if not points:
            continue
        unit = "" if key == "reward" else "%"
        edge = 1 if key == "eval_accuracy" else max(1, len(points) // 20)
        first, last = (statistics.fmean(y for _, y in part) for part in (points[:edge], points[-edge:]))
        change = f"{100 * (last - first):+.1f} points" if unit else f"{last - first:+.3f}"
        tone = "up" if last >= first else "down"
        value = f'<span class="was">{number(first, unit)} →</span> {number(last, unit)}'
        where = f"steps {points[0][0]:,.0f} to {points[-1][0]:,.0f}"
        return name, value, f'<b class="{tone}">{change}</b>, {where}'
    return None


def _health_card(rows: Rows) -> tuple[str, str, str] | None:
    names = {"skipped": "skipped", "invalid_rewards": "bad rewards", "compiles": "compiles"}
    totals = {key: sum(y for _, y in points) for key in names if (points := column(rows, key))}
    if not totals:
        return None
    bad = totals.get("skipped", 0) + totals.get("invalid_rewards", 0)
    value = f'<span class="down">{bad:,.0f}</span>' if bad else '<span class="up">✓</span>'
    return "Faults", value, "<br>".join(f"{total:,.0f} {names[key]}" for key, total in totals.items())


def _accuracy(rows: Rows) -> str:
    series = []
    if points := column(rows, "accuracy"):
        series.append(Series("training", points, "c1", "smooth"))
    if points := column(rows, "eval_accuracy"):
        series.append(Series("held-out", points, "c2", "dots"))
    if not series:
        return ""
    # Text must not shrink with the chart: a phone gets a drawing of its own.
    wide = chart(series, label="Accuracy", unit="%", width=1060, height=300, zero=True)
    narrow = chart(series, label="Accuracy", unit="%", width=336, height=230, zero=True)
    drawing = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    smooth = any(one.label == "training" for one in series)
    note = "training: each step and its running mean" if smooth else "of held-out answers"
    return _figure("Accuracy", note, drawing, series, "%")


def _section(name: str, specs: Sequence[tuple[str, str, str, str]], rows: Rows) -> str:
    figures = []
    for title, unit, note, key in specs:
        phases = [
            Series(phase.removeprefix("seconds_"), points, f"c{i + 1}")
            for i, phase in enumerate(_PHASES)
            if key == "seconds" and (points := column(rows, phase))
        ]
        if phases:
            drawing = stacked_chart(phases, label=title, unit=unit, width=330)
            figures.append(_figure(title, "neighbouring steps: median", drawing, phases, unit))
        elif points := column(rows, key):
            series = [Series(title.lower(), points, "c1", "line" if key == "learning_rate" else "smooth")]
            zero = unit in ("%", "s") or key in ("tokens_per_second", "learning_rate", "groups_without_signal")
            drawing = chart(series, label=title, unit=unit, width=330, zero=zero)
            figures.append(_figure(title, note, drawing, series, unit))
    return f'<section><h2>{name}</h2><div class="charts">{"".join(figures)}</div></section>' if figures else ""


def _figure(title: str, note: str, drawing: str, series: Sequence[Series], unit: str) -> str:
    several = len(series) > 1
    values = [number(s.points[-1][1], unit) for s in series]
    legend = "".join(
        f'<li><i style="background:var(--{s.color})"></i>{s.label} <b>{value}</b></li>'
        for s, value in zip(series, values, strict=True)
    )
    last = "" if several else f'<span class="last">{values[0]}</span>'
    return (
        f'<figure class="card"><figcaption><h3>{title}</h3>{last}<p class="note">{note}</p>'
        f"{f'<ul class=legend>{legend}</ul>' if several else ''}</figcaption>{drawing}</figure>"
    )


def _samples(samples: Rows) -> str:
    """The same prompts at the first and the last step that has samples, in the order of the file: none is picked."""
    split = next((name for name in ("eval", "generated") if any(s.get("split") == name for s in samples)), "train")
    chosen = [s for s in samples if s.get("split", "train") == split]
    if not chosen:
        return ""
    first, last = min(s["step"] for s in chosen), max(s["step"] for s in chosen)
    tables = [{str(s.get("prompt", "")): s for s in reversed(chosen) if s["step"] == step} for step in (first, last)]
    prompts = list(dict.fromkeys(str(s.get("prompt", "")) for s in chosen if s["step"] in (first, last)))
    prompts.sort(key=lambda prompt: sum(prompt not in table for table in tables))  # those in both come first
    heads = [f"Before, step {first:,}", f"After, step {last:,}"][: 2 if last > first else 1]
    body = "".join(
        f'<tr><th scope="row"><pre dir="auto">{text_html(prompt)}</pre></th>'
        + "".join(_sample(table.get(prompt), head) for table, head in zip(tables, heads, strict=False))
        + "</tr>"
        for prompt in prompts[:_SAMPLES_SHOWN]
    )
    shown = min(len(prompts), _SAMPLES_SHOWN)
    kind = {"eval": "Held-out prompts", "generated": "Generated answers to prompts of demonstrations"}
    note = f"{kind.get(split, 'Training prompts')}, the first {shown} of {len(prompts)} in the file."
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<section><h2>Samples</h2><div class="card samples"><p class="note">{note}</p>'
        f'<table><thead><tr><th scope="col">Prompt</th>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _sample(sample: Mapping[str, Any] | None, head: str) -> str:
    if sample is None:
        return f'<td data-head="{head}" class="note">not sampled</td>'
    reward = sample.get("reward")
    right = sample.get("correct", isinstance(reward, int | float) and reward >= _RIGHT)
    shown = number(reward) if isinstance(reward, int | float) else "no reward"
    cut = '<span class="tag">truncated</span>' if sample.get("stop") == "max_tokens" else ""
    tone, mark = ("right", "✓") if right else ("wrong", "✗")
    if "reward" not in sample and "correct" not in sample:  # nobody judged it
        tone = mark = ""
    verdict = f'<span class="tag {tone}">{mark} {shown}</span>' if mark else ""
    completion = text_html(sample.get("completion", ""))
    return (
        f'<td data-head="{head}"><div class="answer"><pre dir="auto" class="{tone}">{completion}</pre>'
        f"<p>{verdict}{cut}</p></div></td>"
    )


def _configuration(config: Mapping[str, Any]) -> str:
    fields = [
        f"<tr><th>{text_html(name)}</th><td><code>{text_html(value)}</code></td></tr>"
        for name, value in _flatten(config)
    ]
    if not fields:
        return ""
    return (
        f'<section><details class="card"><summary><h2>Configuration</h2><span class="note">{len(fields)} fields</span>'
        f'</summary><table class="fields">{"".join(fields)}</table></details></section>'
    )


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _median(points: Sequence[Point]) -> float:
    return statistics.median(y for _, y in points)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return number(seconds, "s") if seconds else ""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m rlalign.io.report", description="Write the page of a run.")
    parser.add_argument("run", type=Path, help="folder with metrics.jsonl")
    print(write_report(parser.parse_args().run))
