"""Charts of the clinical report, in the manner of rlalign.io.charts: intervals, reliability, and counts of patients."""

import html
from collections.abc import Sequence

from rlalign.evaluation.clinical import Calibration
from rlalign.evaluation.estimates import Estimate
from rlalign.io.charts import Frame, number, svg, ticks, value_range


def interval_chart(rows: Sequence[tuple[str, Estimate | None]], *, label: str, width: int, strong: int = 1) -> str:
    """A dot and its interval for each row, of shares between 0 and 1; None is a row whose number is hidden.

    Args:
      rows: (name, estimate).
      label: what the chart shows, for screen readers.
      width: in pixels.
      strong: how many of the first rows have the colour.
    """
    left = 16 + 6.4 * max(len(name) for name, _ in rows)
    frame = Frame((0, 1), (0, 1), left, width - 54, 6, 10 + 24 * len(rows))
    body = _across(frame)
    for place, (name, found) in enumerate(rows):
        y = 22 + 24 * place
        color = "c1" if place < strong else "muted"
        weight = "fill:var(--ink);font-weight:600" if place < strong else "fill:var(--ink)"
        body.append(f'<text x="{left - 10:.0f}" y="{y + 4}" text-anchor="end" style="{weight}">{_text(name)}</text>')
        if found is None:
            body.append(f'<text x="{left + 6:.0f}" y="{y + 4}">hidden</text>')
            continue
        low, at, high = (frame.at((x, 0))[0] for x in (found.low, found.value, found.high))
        words = f"{name}: {number(found.value, '%')}, {number(found.low, '%')} to {number(found.high, '%')}"
        body.append(
            f'<g><rect x="{low:.1f}" y="{y - 3}" width="{max(high - low, 1):.1f}" height="6" rx="3" '
            f'style="fill:var(--{color})" opacity=".3"/>'
            f'<circle class="dot" cx="{at:.1f}" cy="{y}" r="4.5" style="fill:var(--{color})"/>'
            f'<text x="{width - 4}" y="{y + 4}" text-anchor="end" style="{weight}">{number(found.value, "%")}</text>'
            f"<title>{_text(words)}</title></g>"
        )
    return svg(label, width, 34 + 24 * len(rows), body)


def reliability_chart(found: Calibration, *, label: str, width: int = 330) -> str:
    """How often the likeliest diagnosis is right against its probability; on the line they are the same.

    Dots are bins, their bars Wilson's 95 % intervals, and their sizes the share of patients.
    """
    height = width - 40
    frame = Frame((0, 1), (0, 1), 44, width - 20, 12, height - 36)
    body = _across(frame)
    for mark in (0, 0.25, 0.5, 0.75, 1):
        y = frame.at((0, mark))[1]
        body.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{frame.left - 7}" y="{y + 3.5:.1f}" text-anchor="end">{100 * mark:.0f}%</text>')
    body.append(
        f'<line class="guide" x1="{frame.left}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.top}"/>'
        f'<text x="{frame.right}" y="{height - 5}" text-anchor="end">probability of the likeliest diagnosis</text>'
        f'<text x="{frame.left + 5}" y="{frame.top + 10}">how often right</text>'
    )
    total = sum(one.patients for one in found.bins)
    for one in found.bins:
        x, y = frame.at((one.confidence, one.accuracy.value))
        low, high = (frame.at((0, end))[1] for end in (one.accuracy.low, one.accuracy.high))
        words = (
            f"{number(one.confidence, '%')} sure: right {number(one.accuracy.value, '%')} "
            f"({number(one.accuracy.low, '%')} to {number(one.accuracy.high, '%')}), {one.patients:,} patients"
        )
        body.append(
            f'<g><line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" '
            f'style="stroke:var(--c1);stroke-width:2" opacity=".4"/>'
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{3.5 + 7 * (one.patients / total) ** 0.5:.1f}" '
            f'style="fill:var(--c1)"/><title>{words}</title></g>'
        )
    return svg(label, width, height, body)


def count_chart(counts: Sequence[tuple[int, int, int]], *, label: str, width: int = 330, height: int = 200) -> str:
    """Bars of patients; counts are (fewest, most, patients), one bar for numbers that were put together."""
    most = max(patients for _, _, patients in counts)
    _, top = value_range([most], zero=True)
    marks, step = ticks(0, top, 4)
    names = [number(mark, step=step) for mark in marks]
    frame = Frame((0, len(counts)), (0, top), 16 + 6.3 * max(map(len, names)), width - 8, 12, height - 24)
    body = []
    for mark, name in zip(marks, names, strict=True):
        y = frame.at((0, mark))[1]
        body.append(f'<line class="grid" x1="{frame.left:.1f}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="{frame.left - 7:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{name}</text>')
    wide = min(0.7 * (frame.right - frame.left) / len(counts), 64)
    for place, (fewest, largest, patients) in enumerate(counts):
        x, y = frame.at((place + 0.5, patients))
        name = str(fewest) if fewest == largest else f"{fewest}–{largest}"
        body.append(
            f'<g><rect x="{x - wide / 2:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{frame.bottom - y:.1f}" rx="3" '
            f'style="fill:var(--c1)" opacity=".85"/>'
            f'<text x="{x:.1f}" y="{height - 7}" text-anchor="middle">{name}</text>'
            f"<title>{name} tests: {patients:,} patients</title></g>"
        )
    return svg(label, width, height, body)


def _across(frame: Frame) -> list[str]:
    """Grid and labels of shares along the x axis."""
    out = []
    for mark in (0, 0.25, 0.5, 0.75, 1):
        x = frame.at((mark, 0))[0]
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>')
        out.append(f'<text x="{x:.1f}" y="{frame.bottom + 15}" text-anchor="middle">{100 * mark:.0f}%</text>')
    return out


def _text(value: str) -> str:
    return html.escape(value)
