"""Small SVG charts made of text: no plotting library, no script, colours from CSS variables.

A chart is drawn at the size it is shown at, answers hovering and tapping with a guide line and the values at that step,
and carries the same values as `<title>` texts for screen readers.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlalign.io.style import CHART_CSS, PALETTE

Point = tuple[float, float]
_Table = tuple[str, str, dict[float, float]]  # label, colour, step -> value


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
      label: named in the legend and when hovered.
      points: (step, value), ascending steps, finite values only.
      color: name of a CSS variable.
      style: "line"; "smooth" (raw values faint, their running mean bold); "dots" (a line with a mark on each point).
    """

    label: str
    points: Sequence[Point]
    color: str = "c1"
    style: str = "line"


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where data lands in pixels."""

    x: Point
    y: Point
    left: float
    right: float
    top: float
    bottom: float

    def at(self, point: Point) -> Point:
        """Pixels of a point; values outside the frame land on its edge."""
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = min(max((point[1] - self.y[0]) / (self.y[1] - self.y[0]), 0.0), 1.0)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of every row whose `key` is a finite number."""
    found = [(row["step"], row.get(key)) for row in rows]
    return [(float(s), float(v)) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]


def smooth(points: Sequence[Point], span: int) -> list[Point]:
    """The running mean over `span` points to either side, taken twice (triangular weights); it does not lag."""
    values = [y for _, y in points]
    for _ in range(2):
        sums = [0.0, *itertools.accumulate(values)]
        bounds = [(max(i - span, 0), min(i + span + 1, len(values))) for i in range(len(values))]
        values = [(sums[right] - sums[left]) / (right - left) for left, right in bounds]
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about `limit` points: of each stretch its lowest and highest, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def number(value: float, unit: str = "", *, step: float | None = None) -> str:
    """A value as people write it: 87.9%, 12.3k, 0.031, 2e-6, 1.4 s; `step`: the distance of ticks, for their digits."""
    return _digits(value, unit, step).replace("-", "−")


def _digits(value: float, unit: str, step: float | None) -> str:
    if unit == "%":
        return f"{100 * value:.{1 if step is None else _decimals(100 * step)}f}%"
    if unit == "s" and (abs(value) if step is None else step) < 0.1:
        return _digits(1e3 * value, "ms", step and 1e3 * step)
    unit = f"\u2009{unit}" if unit.endswith("s") else unit
    size = abs(value)
    if size == 0 or (size < 1e4 and step is None and value == int(value)):
        return f"{value:,.0f}{unit}"
    if size < 1e-3 or (step is not None and step < 1e-3):
        mantissa, exponent = f"{value:.{1 if step is None else 2}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}{unit}"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= max(limit, 1e4):
            return f"{value / limit:.3g}{letter}{unit}"
    if step is not None:
        return f"{value:,.{_decimals(step)}f}{unit}"
    return f"{value:,.{3 if size < 1 else 2 if size < 10 else 1 if size < 1000 else 0}f}{unit}"


def _decimals(step: float) -> int:
    """How many decimals tell ticks of this distance apart."""
    return next((digits for digits in range(9) if abs(round(step, digits) - step) < 1e-9 * step), 9)


def ticks(low: float, high: float, count: int) -> tuple[list[float], float]:
    """At most `count` + 1 round numbers inside [low, high], and their distance."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)], step


def value_range(values: Sequence[float], unit: str = "", *, zero: bool = False) -> Point:
    """The range to draw: with a margin, and without the rare spike that would flatten all else."""
    ordered = sorted(values)
    low, high, usual = ordered[0], ordered[-1], ordered[int(0.98 * (len(ordered) - 1))]
    low = min(low, 0.0) if zero else low
    if high - low > 4 * (usual - low) > 0:
        high = low + 1.3 * (usual - low)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = low if zero and low == 0 else low - pad
    if unit == "%":
        return max(bottom, 0.0) if low >= 0 else bottom, min(high + pad, 1.0) if high <= 1 else high + pad
    return bottom, high + pad


def chart(
    series: Sequence[Series],
    *,
    label: str,
    unit: str = "",
    width: int = 360,
    height: int = 190,
    zero: bool = False,
    axis: str = "step",
) -> str:
    """One `<svg>` of some curves over steps; each series has at least one point.

    Args:
      label: what the chart shows, for screen readers.
      unit: "%" (values are shares), "s", "×" or "".
      zero: whether the axis starts at 0.
      axis: what is counted below it.
    """
    shown = {
        s.label: smooth(s.points, max(1, len(s.points) // 40)) if s.style == "smooth" else list(s.points)
        for s in series
    }
    frame, axes = _axes([s.points for s in series], unit, width, height, zero=zero, axis=axis)
    body = [axes]
    for s in series:
        if s.style == "smooth":
            body.append(_path(frame, thin(s.points, width), "raw", s.color))
        body.append(_path(frame, thin(shown[s.label], width), "curve", s.color))
        if s.style == "dots" or len(s.points) == 1:
            body += [_dot(frame.at(p), s.color, 3) for p in thin(s.points, 60)]
    values = [(s.label, s.color, dict(s.points)) for s in series]
    return svg(label, width, height, [*body, *_hits(frame, values, unit, width // 5, axis=axis)])


def stacked_chart(series: Sequence[Series], *, label: str, unit: str = "", width: int = 360, height: int = 190) -> str:
    """One `<svg>` of areas on top of each other; a step absent from a series counts 0 there."""
    steps = sorted({x for s in series for x, _ in s.points})
    tables = [dict(s.points) for s in series]
    tops, total = [], dict.fromkeys(steps, 0.0)
    for table in tables:
        total = {x: total[x] + table.get(x, 0.0) for x in steps}
        tops.append(_medians(sorted(total.items()), 90))
    frame, axes = _axes([list(total.items())], unit, width, height, zero=True)
    floor = [(x, 0.0) for x, _ in tops[0]]
    body = [axes]
    for s, top, below in zip(series, tops, [floor, *tops], strict=False):
        corners = [frame.at(p) for p in [*top, *reversed(below)]]
        outline = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in corners) + "Z"
        body.append(f'<path d="{outline}" style="fill:var(--{s.color})" opacity=".78"/>')
    values = [(s.label, s.color, table) for s, table in zip(series, tables, strict=True)]
    return svg(label, width, height, [*body, *_hits(frame, values, unit, width // 5, dots=False)])


def curve_svg(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    key: str,
    *,
    title: str = "",
    unit: str = "",
    axis: str = "step",
    width: int = 760,
    height: int = 380,
) -> str:
    """A standalone SVG file of one learning curve: runs overlaid, the mean of the seeds bold, each seed thin.

    Args:
      runs: name -> one list of metric rows a seed, as `read_metrics` gives them.
      key: the metric; a mean is drawn at the steps that every seed of the run has, smoothed if there are over 100.
      title: above the chart; the key if empty.
      unit: "%" (values are shares), "s", "×" or "".
      axis: what the rows' "step" counts.

    Returns:
      The file's text. It has its own colours for light and dark and needs nothing from outside.

    Raises:
      ValueError: a run without any value of `key`, or whose seeds have no step in common.
    """
    curves = {name: [points for rows in seeds if (points := column(rows, key))] for name, seeds in runs.items()}
    if empty := [name for name, seeds in curves.items() if not seeds] or (not curves and ["(no runs)"]):
        raise ValueError(f"no value of {key!r} in {', '.join(empty)}")
    everything = [points for seeds in curves.values() for points in seeds]
    room = 20 + 8 * max(len(f"{name} 100.0%") for name in curves)
    frame, axes = _axes(everything, unit, width - room, height - 12, top=64, left=14, axis=axis)
    body, labels = [_heading(title or key, [len(seeds) for seeds in curves.values()], width, height), axes], []
    for index, (name, seeds) in enumerate(curves.items()):
        color, mean = f"c{index % 5 + 1}", _mean(seeds)
        if not mean:
            raise ValueError(f"the seeds of {name} have no step in common")
        body += [_path(frame, thin(points, 300), "raw", color) for points in seeds if len(seeds) > 1]
        if len(mean) > 100:  # a training metric: each step is noise
            mean = smooth(mean, len(mean) // 40)
        body.append(_path(frame, thin(mean, 300), "curve", color))
        body += [_dot(frame.at(p), color, 3.2) for p in mean if len(mean) <= 40]
        labels.append((frame.at(mean[-1])[1], f"{name} {number(mean[-1][1], unit)}", color))
    body += [
        f'<text x="{frame.right + 12:.0f}" y="{y + 4:.1f}" style="fill:var(--{color});font-weight:600;font-size:13px">'
        f"{html.escape(text)}</text>"
        for y, text, color in _apart(labels, 17)
    ]
    return svg(title or key, width, height, [f"<style>{PALETTE}{CHART_CSS}</style>", *body], standalone=True)


def _heading(title: str, seeds: Sequence[int], width: int, height: int) -> str:
    """The card of a standalone chart with its title, and how many seeds are behind it."""
    many = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    note = f"mean of {many} seeds; thin lines: each seed" if max(seeds) > 1 else ""
    return (
        f'<rect class="back" width="{width}" height="{height}" rx="12"/>'
        f'<text x="22" y="30" style="fill:var(--ink);font-weight:650;font-size:16px">{html.escape(title)}</text>'
        f'<text x="22" y="49" style="font-size:12px">{note}</text>'
    )


def _axes(
    curves: Sequence[Sequence[Point]], unit: str, width: int, height: int, *, zero=False, top=20, left=0, axis="step"
) -> tuple[Frame, str]:
    """The frame that holds all curves, and its grid, ticks and their labels."""
    steps = [x for points in curves for x, _ in points]
    low, high = value_range([y for points in curves for _, y in points], unit, zero=zero)
    marks, distance = ticks(low, high, max(2, (height - top) // 38))
    names = [number(mark, unit, step=distance) for mark in marks]
    first, last = min(steps), max(steps)
    margin = left + 12 + 6.3 * max(map(len, [*names, axis]))
    span = (first, last) if last > first else (first - 1, last + 1)
    frame = Frame(span, (low, high), margin, width - 14, top, height - 24)
    parts = []
    for mark, name in zip(marks, names, strict=True):
        y = frame.at((first, mark))[1]
        parts.append(
            f'<line class="grid" x1="{margin:.1f}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{margin - 7:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{name}</text>'
        )
    parts.append(f'<text x="{margin - 7:.1f}" y="{height - 7}" text-anchor="end">{axis}</text>')
    for mark in {round(mark) for mark in ticks(*span, max(2, (width - int(margin)) // 80))[0]}:
        x = frame.at((mark, low))[0]
        anchor = "end" if x > frame.right - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - 7}" text-anchor="{anchor}">{mark:,}</text>')
    highest = max(y for points in curves for _, y in points)
    if highest > high:
        note = f"▲ up to {number(highest, unit)}"
        parts.append(f'<text x="{frame.right}" y="{top + 9}" text-anchor="end">{note}</text>')
    return frame, "".join(parts)


def _path(frame: Frame, points: Sequence[Point], kind: str, color: str) -> str:
    places = "L".join(f"{x:.1f},{y:.1f}" for x, y in map(frame.at, points))
    return f'<path class="{kind}" d="M{places}" style="stroke:var(--{color})"/>'


def _dot(place: Point, color: str, radius: float) -> str:
    return f'<circle class="dot" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="{radius}" style="fill:var(--{color})"/>'


def _hits(
    frame: Frame, curves: Sequence[_Table], unit: str, limit: int, *, dots: bool = True, axis: str = "step"
) -> list[str]:
    """Invisible slices over the chart; hovering one shows a guide and the values of all curves there."""
    steps = sorted({x for _, _, table in curves for x in table})
    size = math.ceil(len(steps) / limit)
    slices = [steps[i : i + size] for i in range(0, len(steps), size)]
    centres = [frame.at((part[-1], 0))[0] for part in slices]
    edges = [frame.left, *[(a + b) / 2 for a, b in itertools.pairwise(centres)], frame.right]
    drawn = []
    for part, x, (left, right) in zip(slices, centres, itertools.pairwise(edges), strict=True):
        found = [(name, color, [table[s] for s in part if s in table]) for name, color, table in curves]
        here = [(name, color, values[-1]) for name, color, values in found if values]
        words = [f"{axis} {part[-1]:,.0f}", *[f"{html.escape(name)} {number(value, unit)}" for name, _, value in here]]
        marks = [_dot(frame.at((part[-1], value)), color, 3.5) for _, color, value in here if dots]
        drawn.append(
            f'<g class="hit"><rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{frame.bottom:.0f}"/>'
            f'<line class="guide" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>{"".join(marks)}'
            f"{_readout(words, frame)}"
            f"<title>{chr(10).join(words)}</title></g>"
        )
    return drawn


def _readout(words: Sequence[str], frame: Frame) -> str:
    """The values of a slice, in two lines where one would leave the chart."""
    half = len(words) if 6.6 * len(" · ".join(words)) < frame.right else (len(words) + 1) // 2
    lines = [" · ".join(part) for part in (words[:half], words[half:]) if part]
    return "".join(f'<text class="read" x="4" y="{12 + 14 * i}">{line}</text>' for i, line in enumerate(lines))


def _medians(points: Sequence[Point], limit: int) -> list[Point]:
    """Medians of neighbours, about `limit` points: what an area shows where single steps flicker."""
    size = math.ceil(len(points) / limit)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sorted(y for _, y in part)[len(part) // 2]) for part in parts]


def _mean(seeds: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean at the steps that every seed has."""
    tables = [dict(points) for points in seeds]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    return [(x, sum(table[x] for table in tables) / len(tables)) for x in common]


def _apart(labels: Sequence[tuple[float, str, str]], distance: float) -> list[tuple[float, str, str]]:
    """Moves labels down until none covers another."""
    placed: list[tuple[float, str, str]] = []
    for y, text, color in sorted(labels):
        placed.append((max(y, placed[-1][0] + distance) if placed else y, text, color))
    return placed


def svg(label: str, width: int, height: int, body: Sequence[str], *, standalone: bool = False) -> str:
    name = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    return (
        f'<svg{name} viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(body)}</svg>\n'
    )
