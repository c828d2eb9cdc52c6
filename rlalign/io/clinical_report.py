"""How an asker did on held-out patients, on one self-contained page: `rlalign clinical-report FOLDER_OR_FILE`.

Read is a file of workups (rlalign.io.workups), which any model's user can write. The page is about the first asker in
it; the others, such as baselines, stand beside it. It holds numbers of ten patients or more, and none from which one of
fewer follows (rlalign.evaluation.disclosure). It loads nothing and runs no script.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlalign.clinical.dialogue import NOTICE
from rlalign.clinical.diseases import DISEASES
from rlalign.clinical.loinc import NOTICE as LOINC_NOTICE
from rlalign.clinical.loinc import TESTS
from rlalign.evaluation.clinical import COMMON, ORDERS, PLACES, Findings, Row, by_asker, findings
from rlalign.evaluation.disclosure import MINIMUM
from rlalign.evaluation.estimates import Estimate
from rlalign.io.charts import Series, chart, number
from rlalign.io.clinical_charts import count_chart, interval_chart, reliability_chart
from rlalign.io.files import write_atomic
from rlalign.io.report import text_html
from rlalign.io.style import PAGE, PAGE_CSS
from rlalign.io.workups import NAME, read_workups

Names = Mapping[str, str]

_CSS = """
.notice { border-left: 4px solid var(--c3); margin-bottom: 22px; font-weight: 600; }
.scroll { overflow-x: auto; }
.scroll table { font-variant-numeric: tabular-nums; }
.scroll thead { display: table-header-group; }
.scroll th, .scroll td { padding: 8px 16px 8px 0; white-space: nowrap; }
.scroll small { color: var(--muted); font-size: 12px; white-space: nowrap; display: block; }
.scroll .first th, .scroll .first td { font-weight: 650; }
.scroll .first small { font-weight: 400; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.below { margin-top: 16px; }
.terms dt { font-weight: 600; margin-top: 10px; }
.terms dd { margin: 0; color: var(--muted); }
"""
_HIDDEN = '<span class="note">hidden</span>'
_NONE = '<span class="note">–</span>'
_CURVES = 5  # colours there are


def write_clinical_report(
    path: str | os.PathLike[str], *, beside: str | os.PathLike[str] | None = None, names: Names | None = None
) -> Path:
    """Writes the page beside the file of workups.

    Args:
      path: the file, or the folder of a workups.jsonl.
      beside: another, with workups of other askers for the same patients, such as baselines.
      names: code -> words, of diagnoses and of tests; those of the embedded tables are known.

    Returns:
      The path of the page, the first file's with .html, replaced atomically.

    Raises:
      FileNotFoundError: no such file.
      ValueError: what read_workups and by_asker refuse, by file and line, and never by value.
    """
    files = [Path(one) / NAME if Path(one).is_dir() else Path(one) for one in (path, beside) if one is not None]
    read = [(f"{file}:{line}", workup) for file in files for line, workup in read_workups(file).items()]
    askers = by_asker([workup for _, workup in read], where=lambda place: read[place][0])
    found = [findings(some) for some in askers.values()]
    known = {code: row.name for code, row in DISEASES.items()} | {code: test.short for code, test in TESTS.items()}
    written = files[0].with_suffix(".html")
    body = clinical_body(found, known | dict(names or {}))
    title = text_html(f"{found[0].asker}: clinical report")
    write_atomic(written, PAGE.format(title=title, style=PAGE_CSS + _CSS, body=body))
    return written


def clinical_body(found: Sequence[Findings], names: Names) -> str:
    """The page's body: findings of the asker that it is about, and of those beside it.

    Args:
      found: of askers with the same patients.
      names: code -> words.
    """
    about = found[0]
    parts = [
        _header(about, len(found)),
        _cards(about),
        _diagnosis(found),
        _curves(found),
        _calibration(found),
        _asking(found, names),
        _classes(about, names),
        _groups("By sex", about, about.by_sex),
        _groups("By age", about, about.by_age),
        _terms(about, names),
    ]
    return "\n".join(filter(None, parts))


def _header(about: Findings, askers: int) -> str:
    facts = [f"{about.patients:,} held-out patients", f"{about.classes:,} diagnoses"]
    facts += [f"{askers - 1} others beside it"] * (askers > 1)
    chips = "".join(f"<li>{fact}</li>" for fact in facts)
    return (
        f'<p class="card notice" role="note">{NOTICE}</p>'
        '<header><p class="eyebrow">rlalign clinical report</p>'
        f'<h1>How “{text_html(about.asker)}” asks and diagnoses</h1><ul class="chips">{chips}</ul></header>'
    )


def _cards(about: Findings) -> str:
    asking, calibration = about.asking, about.calibration
    cards = [
        ("Recall@1", number(about.micro[1].value, "%"), f"95% interval {_span(about.micro[1])}"),
        ("Recall@5", number(about.micro[5].value, "%"), _span(about.micro[5])),
        ("Macro recall@1", number(about.macro[1].value, "%") if about.macro else "hidden", "mean over diagnoses"),
    ]
    if asking.quartiles:
        low, median, high = (number(x) for x in asking.quartiles)
        mean = f"{_mean(asking.mean)}, " * (asking.mean is not None)
        cards.append(("Tests asked", median, f"median; {mean}half of the patients {low} to {high}"))
    if calibration:
        cards.append(("Calibration error", number(calibration.error, "%"), "probability against how often right"))
    if asking.abstained:
        cards.append(("No diagnosis", _share(asking.abstained), "of patients"))
    items = "".join(
        f'<div class="card fact"><h3>{name}</h3><p class="big">{value}</p><p class="note">{note}</p></div>'
        for name, value, note in cards
    )
    return f'<section class="facts">{items}</section>'


def _diagnosis(found: Sequence[Findings]) -> str:
    charts = "".join(
        _figure(
            f"Recall@{k}",
            "share of gold diagnoses among the first " + ("one" if k == 1 else str(k)) + ", and 95% intervals",
            interval_chart([(one.asker, one.micro[k]) for one in found], label=f"Recall@{k} by asker", width=430),
        )
        for k in PLACES
    )
    heads = [f"{kind} @{k}" for kind in ("Recall", "Macro recall", "Rare recall") for k in PLACES]
    rows = [
        (
            text_html(one.asker),
            [
                *(_estimate(of.get(k)) for of in (one.micro, one.macro, one.rare) for k in PLACES),
                _NONE if one.calibration is None else number(one.calibration.error, "%"),
                _NONE if one.calibration is None else number(one.calibration.brier),
            ],
        )
        for one in found
    ]
    table = _table("Asker", [*heads, "Calibration error", "Brier"], rows, strong=True)
    return f'<section><h2>Diagnosis</h2><div class="pairs">{charts}</div>{table}</section>'


def _curves(found: Sequence[Findings]) -> str:
    some = [one for one in found if len(one.curve.get(1, ())) > 1][:_CURVES]
    if not some:
        return ""
    figures = []
    for k in PLACES:
        series = [
            Series(
                text_html(one.asker), [(t, e.value) for t, e in enumerate(one.curve[k])], f"c{i + 1}", "dots" * (i == 0)
            )
            for i, one in enumerate(some)
        ]
        label = f"Recall@{k} after so many tests"
        wide = chart(series, label=label, unit="%", width=500, height=270, axis="tests")
        narrow = chart(series, label=label, unit="%", width=310, height=230, axis="tests")
        legend = "".join(
            f'<li><i style="background:var(--{s.color})"></i>{s.label} <b>{number(s.points[-1][1], "%")}</b></li>'
            for s in series
        )
        drawing = f'<ul class="legend">{legend}</ul><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
        figures.append(_figure(f"Recall@{k} by tests asked", "had everyone asked that many", drawing))
    return f'<section><h2>What tests bring</h2><div class="pairs">{"".join(figures)}</div></section>'


def _calibration(found: Sequence[Findings]) -> str:
    figures = "".join(
        _figure(
            text_html(one.asker),
            f"calibration error {number(one.calibration.error, '%')}, Brier {number(one.calibration.brier)}",
            reliability_chart(one.calibration, label=f"Reliability of {one.asker}"),
        )
        for one in found
        if one.calibration is not None
    )
    return f'<section><h2>Calibration</h2><div class="charts">{figures}</div></section>' if figures else ""


def _asking(found: Sequence[Findings], names: Names) -> str:
    about, rows = found[0].asking, []
    for one in found:
        of = one.asking
        cells = [
            _NONE if of.quartiles is None else f"{number(of.quartiles[1])}{_small(_mean(of.mean))}",
            _share(of.abstained),
            _NONE if of.rejects is None else number(of.rejects),
            *(_NONE if x is None else _estimate(x) for x in (of.redundant, of.abnormal, of.orders)),
        ]
        rows.append((text_html(one.asker), cells))
    if about.usual is not None:
        rows.append(("most common orders", [*[_NONE] * 5, _estimate(about.usual)]))
    heads = ["Tests, median", "No diagnosis", "Rejects a test", "Redundant", "Abnormal results", f"Orders @{ORDERS}"]
    figures = []
    if about.counts:
        drawing = count_chart(about.counts, label="Patients by tests asked", width=430)
        figures.append(_figure("Tests asked", "patients, by how many tests they were asked", drawing))
    if about.common:
        words = [(_test_name(test, names), _share(share)) for test, share in about.common]
        cells = "".join(f'<tr><th scope="row">{name}</th><td>{share}</td></tr>' for name, share in words)
        note = f"share of patients, at most {COMMON} tests"
        figures.append(_figure("Most asked", note, f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'))
    drawn = f'<div class="pairs">{"".join(figures)}</div>' if figures else ""
    return f"<section><h2>Asking</h2>{drawn}{_table('Asker', heads, rows, strong=True)}</section>"


def _classes(about: Findings, names: Names) -> str:
    if not about.by_class:
        return ""
    rows = []
    for row in about.by_class:
        name = f"{row.classes:,} diagnoses of fewer patients, together"
        if row.name:
            said = _small(text_html(names[row.name])) if row.name in names else ""
            name = f"{text_html(row.name)}{said}"
        rows.append((name, _row(row)))
    heads = ["Patients", *(f"Recall@{k}" for k in PLACES)]
    note = "the rarest third; those of fewer than ten patients, and what would give them away, are put together"
    return f'<section><h2>Rare diagnoses</h2><p class="note">{note}</p>{_table("ICD-10", heads, rows)}</section>'


def _groups(title: str, about: Findings, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    drawing = interval_chart(
        [(row.name, row.recall.get(1)) for row in rows], label=f"Recall@1 {title.lower()}", width=430, strong=len(rows)
    )
    heads = ["Patients", *(f"Recall@{k}" for k in PLACES)] + ["Tests, median"] * (about.asking.quartiles is not None)
    cells = [(text_html(row.name), [*_row(row), *_tests(row, about)]) for row in rows]
    figure = _figure("Recall@1", "and 95% intervals", drawing)
    table = _table(title.removeprefix("By ").capitalize(), heads, cells)
    return f'<section><h2>{title}</h2><div class="pairs">{figure}{table.replace(" below", "")}</div></section>'


def _row(row: Row) -> list[str]:
    return [
        _HIDDEN if row.patients is None else f"{row.patients:,}",
        *(_estimate(row.recall.get(k)) for k in PLACES),
    ]


def _tests(row: Row, about: Findings) -> list[str]:
    if about.asking.quartiles is None:
        return []
    return [_HIDDEN if row.tests is None else number(row.tests)]


def _terms(about: Findings, names: Names) -> str:
    terms = {
        "Recall@k": "gold diagnoses among the first k of the list, of all gold diagnoses. Macro: the mean of that of "
        "each diagnosis. Rare: over the rarest third of the diagnoses. Who gets no diagnosis counts as not found.",
        "95% intervals": "over patients: Agresti and Coull's, for shares of several things a patient its ratio form; "
        "Wilson's for one diagnosis and one bin; to first order for macro recall.",
        "Calibration error": "|how often right − probability| of the likeliest diagnosis, ten bins of equal width by "
        f"their share of patients; neighbouring bins are joined until each has {MINIMUM} patients.",
        "Brier": "the mean of the squared distance between probabilities and truth, summed over diagnoses; one that is "
        "not listed counts as of probability 0.",
        "Rejects": "candidates turned down by reject sampling, a test asked. Redundant: tests that brought only what "
        "was known. Abnormal results: of the results that tests brought.",
        f"Orders @{ORDERS}": f"of the orders on record, those among the first {ORDERS} asked for; a test inside a "
        "panel counts as the panel's. Beside it: were everybody asked what is ordered most for the others.",
        "Hidden": f"numbers of fewer than {MINIMUM} patients (<{MINIMUM}), and those that would give one away by "
        "subtraction. Means of tests are rounded for the same reason, and neighbouring numbers joined.",
    }
    written = "".join(f"<dt>{name}</dt><dd>{text_html(text)}</dd>" for name, text in terms.items())
    loinc = any(test.split(":")[-1] in TESTS for test, _ in about.asking.common)
    notice = f'<p class="note below">{text_html(LOINC_NOTICE)}</p>' if loinc else ""
    return (
        '<section><details class="card"><summary><h2>How to read this</h2></summary>'
        f'<dl class="terms">{written}</dl></details>{notice}</section>'
    )


def _figure(title: str, note: str, drawing: str) -> str:
    return f'<figure class="card"><figcaption><h3>{title}</h3><p class="note">{note}</p></figcaption>{drawing}</figure>'


def _table(corner: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, strong=False) -> str:
    """A table in a card; `strong`: the first row is the one that the page is about."""
    columns = "".join(f'<th scope="col">{one}</th>' for one in [corner, *heads])
    head = f"<thead><tr>{columns}</tr></thead>"
    body = "".join(
        f'<tr{" class=first" * (strong and place == 0)}><th scope="row">{name}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for place, (name, cells) in enumerate(rows)
    )
    return f'<div class="card scroll below" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def _test_name(test: str, names: Names) -> str:
    panel, _, inside = test.rpartition(":")
    words = names.get(inside) or names.get(test)
    if words is None:
        return text_html(test)
    return f"{text_html(words)}{_small(text_html(f'{panel}, {inside}' if panel else inside))}"


def _estimate(found: Estimate | None) -> str:
    return _HIDDEN if found is None else f"{number(found.value, '%')}{_small(_span(found))}"


def _span(found: Estimate) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}%"


def _share(share: str | float) -> str:
    return text_html(share) if isinstance(share, str) else number(share, "%")


def _mean(mean: float | None) -> str:
    return "" if mean is None else f"mean {mean:.1f}"


def _small(text: str) -> str:
    return f"<small>{text}</small>" if text else ""
