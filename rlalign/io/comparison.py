"""One self-contained page that sets runs beside each other: curves of all seeds, and the last values as intervals.

write_comparison("runs/sweep", "Reward quality", {"good": {"gprs": ["runs/a", "runs/b"], "grpo": [...]}, ...})
"""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlalign.evaluation import Estimate, interval
from rlalign.io.charts import column, curve_svg, number
from rlalign.io.files import write_atomic
from rlalign.io.metrics import read_metrics
from rlalign.io.style import PAGE, PAGE_CSS

Runs = Mapping[str, Sequence[str | os.PathLike[str]]]  # name -> folders, one a seed


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


def comparison_table(groups: Mapping[str, Runs], metric: str = "eval_accuracy") -> dict[str, dict[str, Estimate]]:
    """group -> name -> the mean over seeds of the metric's last value, with Student's 95% interval."""
    return {
        group: {name: interval(last_values(folders, metric)) for name, folders in runs.items()}
        for group, runs in groups.items()
    }


def write_comparison(
    folder: str | os.PathLike[str],
    title: str,
    groups: Mapping[str, Runs],
    *,
    metric: str = "eval_accuracy",
    unit: str = "%",
    note: str = "",
) -> Path:
    """Writes index.html: a table of all groups, and for each group the curves of its runs.

    Args:
      folder: where index.html goes.
      title: of the page.
      groups: what is compared with each other: name of the group -> name of the run -> its folders, one a seed.
      metric: of metrics.jsonl.
      unit: "%" (values are shares), "s", "×" or "".
      note: a sentence below the title.

    Returns:
      The path of index.html, replaced atomically.

    Raises:
      ValueError: no groups, or a run without a value of the metric.
    """
    if not groups:
        raise ValueError("groups is empty: nothing to compare")
    curves = []
    for group, runs in groups.items():
        rows = {name: [read_metrics(Path(one) / "metrics.jsonl") for one in each] for name, each in runs.items()}
        drawing = curve_svg(rows, metric, title=group, unit=unit)
        curves.append(f"<figure>{drawing}</figure>")
    body = [
        f'<header><p class="eyebrow">rlalign comparison</p><h1>{html.escape(title)}</h1>'
        f'<p class="note">{html.escape(note)}</p></header>',
        _table(comparison_table(groups, metric), unit),
        *curves,
    ]
    path = Path(folder) / "index.html"
    write_atomic(path, PAGE.format(title=html.escape(title), style=PAGE_CSS, body="\n".join(body)))
    return path


def shown(estimate: Estimate, unit: str) -> str:
    """A mean and half of its interval: 61.2% ± 3.4."""
    half = (estimate.high - estimate.low) / 2
    if not half >= 0:  # one seed
        return number(estimate.value, unit)
    return f"{number(estimate.value, unit)} ± {number(half, unit).removesuffix('%')}"


def _table(table: Mapping[str, Mapping[str, Estimate]], unit: str) -> str:
    names = list(dict.fromkeys(name for runs in table.values() for name in runs))
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{html.escape(group)}</th>'
        + "".join(f"<td>{shown(runs[name], unit) if name in runs else ''}</td>" for name in names)
        + "</tr>"
        for group, runs in table.items()
    )
    return (
        '<section><div class="card"><p class="note">last value: mean over seeds ± half of its 95% interval</p>'
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )
