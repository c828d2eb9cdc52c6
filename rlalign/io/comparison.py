"""One self-contained page that sets runs beside each other: curves of all seeds, and the last values as intervals.

write_comparison("runs/sweep", "Reward quality", {"good": {"gprs": ["runs/a", "runs/b"], "grpo": [...]}, ...})
"""

import html
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlalign.evaluation import Estimate, interval
from rlalign.io.charts import column, curve_svg, number
from rlalign.io.files import write_atomic
from rlalign.io.metrics import read_metrics
from rlalign.io.style import PAGE, PAGE_CSS

Runs = Mapping[str, Sequence[str | os.PathLike[str]]]  # name -> folders, one a seed


def at_equal_cost(runs: Runs, metric: str, cost: str, *, points: int = 17) -> dict[str, list[list[dict[str, float]]]]:
    """Curves of a metric against what had been spent by then, at costs that all runs have come to.

    Args:
      runs: name -> folders, one a seed.
      metric: of metrics.jsonl, written before the step of its row; in between it is interpolated.
      cost: of metrics.jsonl, what a step spends, such as "environment_steps"; what was spent is its running sum.
      points: on a curve.

    Returns:
      name -> rows of each seed, {"step": the cost, metric: its value}: equal costs from 0 to the smallest total.

    Raises:
      ValueError: a run that has less than two values of the metric, none before anything was spent, or a cost that is
        no number above 0, by its folder; no runs.
    """
    found = {name: [_spent(folder, metric, cost) for folder in folders] for name, folders in runs.items()}
    if not all(found.values()) or not found or points < 2:
        raise ValueError(
            f"{len(found)} runs with {[len(seeds) for seeds in found.values()]} seeds, {points} points: "
            "give at least one run, a folder of each, and two points"
        )
    grid = np.linspace(0, min(costs[-1] for seeds in found.values() for costs, _ in seeds), points)
    return {
        name: [
            [{"step": float(x), metric: float(y)} for x, y in zip(grid, np.interp(grid, *curve), strict=True)]
            for curve in seeds
        ]
        for name, seeds in found.items()
    }


def _spent(folder: str | os.PathLike[str], metric: str, cost: str) -> tuple[list[float], list[float]]:
    """(what had been spent, the metric then) of a run."""
    path = Path(folder) / "metrics.jsonl"
    rows = read_metrics(path)
    costs = [row.get(cost) or 0 for row in rows[:-1]]  # the last row is what came of the last step
    bad = [row["step"] for row, value in zip(rows, costs, strict=False) if not value > 0]
    if bad:
        raise ValueError(f"{path} has no {cost!r} above 0 in step {bad[0]}: curves at equal cost need it of every step")
    spent = itertools.accumulate(costs, initial=0)
    known = [(before, row[metric]) for before, row in zip(spent, rows, strict=True) if row.get(metric) is not None]
    if len(known) < 2 or known[0][0] > 0:
        raise ValueError(f"{path} has {len(known)} values of {metric!r}: a curve takes two, one before the first step")
    return [x for x, _ in known], [y for _, y in known]


def last_values(folders: Sequence[str | os.PathLike[str]], metric: str) -> list[float]:
    """The metric's last value in each run.

    Raises:
      ValueError: a run that has none, by its folder.
    """
    found = []
    for folder in folders:
        points = column(read_metrics(Path(folder) / "metrics.jsonl"), metric)
        if not points:
            raise ValueError(f"{folder}/metrics.jsonl has no value of {metric!r}: the run has not come so far")
        found.append(points[-1][1])
    return found


def comparison_table(
    groups: Mapping[str, Runs], metric: str | Mapping[str, str] = "eval_accuracy", *, cost: str | None = None
) -> dict[str, dict[str, Estimate]]:
    """group -> name -> the mean over seeds of the metric's last value, with Student's 95% interval; with a `cost` its
    value where all runs of the group had spent as much. A mapping gives each group a metric of its own."""

    def values(runs: Runs, metric: str) -> dict[str, list[float]]:
        if cost is None:
            return {name: last_values(folders, metric) for name, folders in runs.items()}
        equal = at_equal_cost(runs, metric, cost, points=2)
        return {name: [rows[-1][metric] for rows in seeds] for name, seeds in equal.items()}

    return {
        group: {name: interval(found) for name, found in values(runs, _of(metric, group)).items()}
        for group, runs in groups.items()
    }


def _of(each: str | Mapping[str, str], group: str) -> str:
    return each if isinstance(each, str) else each[group]


def write_comparison(
    folder: str | os.PathLike[str],
    title: str,
    groups: Mapping[str, Runs],
    *,
    metric: str | Mapping[str, str] = "eval_accuracy",
    unit: str | Mapping[str, str] = "%",
    note: str = "",
    cost: str | None = None,
) -> Path:
    """Writes index.html: a table of all groups, and for each group the curves of its runs.

    Args:
      folder: where index.html goes.
      title: of the page.
      groups: what is compared with each other: name of the group -> name of the run -> its folders, one a seed.
      metric: of metrics.jsonl; a mapping gives each group its own.
      unit: "%" (values are shares), "s", "×" or ""; or each group's.
      note: a sentence below the title.
      cost: what runs are compared at equal amounts of, where it is not steps; see at_equal_cost.

    Returns:
      The path of index.html, replaced atomically.

    Raises:
      ValueError: no groups, or a run without a value of the metric.
    """
    if not groups:
        raise ValueError("groups is empty: nothing to compare")
    curves = []
    for group, runs in groups.items():
        how = {"metric": _of(metric, group), "unit": _of(unit, group), "cost": cost}
        curves.append(f"<figure>{comparison_svg(runs, group, **how)}</figure>")
    body = [
        f'<header><p class="eyebrow">rlalign comparison</p><h1>{html.escape(title)}</h1>'
        f'<p class="note">{html.escape(note)}</p></header>',
        _table(comparison_table(groups, metric, cost=cost), unit, cost),
        *curves,
    ]
    path = Path(folder) / "index.html"
    write_atomic(path, PAGE.format(title=html.escape(title), style=PAGE_CSS, body="\n".join(body)))
    return path


def comparison_svg(
    runs: Runs, title: str, *, metric: str = "eval_accuracy", unit: str = "%", cost: str | None = None
) -> str:
    """The curves of one group as a standalone SVG file; see write_comparison."""
    if cost is not None:
        return curve_svg(at_equal_cost(runs, metric, cost), metric, title=title, unit=unit, axis=cost.replace("_", " "))
    rows = {name: [read_metrics(Path(one) / "metrics.jsonl") for one in each] for name, each in runs.items()}
    return curve_svg(rows, metric, title=title, unit=unit)


def shown(estimate: Estimate, unit: str) -> str:
    """A mean and half of its interval: 61.2% ± 3.4."""
    half = (estimate.high - estimate.low) / 2
    if not half >= 0:  # one seed
        return number(estimate.value, unit)
    return f"{number(estimate.value, unit)} ± {number(half, unit).removesuffix('%')}"


def _table(table: Mapping[str, Mapping[str, Estimate]], unit: str | Mapping[str, str], cost: str | None) -> str:
    names = list(dict.fromkeys(name for runs in table.values() for name in runs))
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{html.escape(group)}</th>'
        + "".join(f"<td>{shown(runs[name], _of(unit, group)) if name in runs else ''}</td>" for name in names)
        + "</tr>"
        for group, runs in table.items()
    )
    where = "last value" if cost is None else f"value at equal {cost.replace('_', ' ')}"
    return (
        f'<section><div class="card"><p class="note">{where}: mean over seeds ± half of its 95% interval</p>'
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )
