"""How charts and the report look: colours for light and dark, and the page around them."""

PALETTE = """
:root {
  --bg: #f4f5f8; --card: #fff; --ink: #151a23; --muted: #5e6878; --grid: #e7eaf0; --line: #dfe3ea;
  --c1: #2563eb; --c2: #0f9f80; --c3: #d97706; --c4: #8b45e0; --c5: #e0364f;
  --good: #0a7a4b; --goodbg: #dff6ea; --bad: #b4233a; --badbg: #fde7ea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0c0f14; --card: #151a22; --ink: #e8ecf3; --muted: #94a0b3; --grid: #232a35; --line: #2a323f;
    --c1: #72a5ff; --c2: #34d6b0; --c3: #f9b44b; --c4: #bf96ff; --c5: #ff7a8c;
    --good: #4fe0a0; --goodbg: #10331f; --bad: #ff8a9a; --badbg: #3a171d;
  }
}
"""

CHART_CSS = """
svg text { font: 11px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--muted); }
.back { fill: var(--card); stroke: var(--line); }
.grid { stroke: var(--grid); }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.raw { fill: none; stroke-width: 1; opacity: .3; }
.dot { stroke: var(--card); stroke-width: 1.5; }
.guide { stroke: var(--muted); stroke-dasharray: 3 3; }
.hit > * { opacity: 0; }
.hit > :first-child { fill: transparent; }
.hit:hover > * { opacity: 1; }
svg .read {
  fill: var(--ink); font-weight: 600;
  stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; paint-order: stroke;
}
"""

_LAYOUT_CSS = """
* { box-sizing: border-box; margin: 0; }
body {
  background: var(--bg); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.5 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1140px; margin: 0 auto; padding: 40px 20px 64px; }
section, main > figure { margin-top: 16px; }
section > h2 { margin: 36px 0 12px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -.01em; }
h3 { font-size: 14px; font-weight: 600; }
ul { list-style: none; padding: 0; }
.note { color: var(--muted); font-size: 12.5px; }
.up { color: var(--good); }
.down { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px; min-width: 0; }
.eyebrow { color: var(--c1); font-size: 12px; font-weight: 700; letter-spacing: .08em; text-transform: uppercase; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin: 14px 0 24px; }
.chips li {
  border: 1px solid var(--line); border-radius: 99px; padding: 2px 11px; background: var(--card); color: var(--muted);
  font-size: 12.5px; overflow-wrap: anywhere;
}
.chips .lead { color: var(--c1); font-weight: 650; }

.facts { display: flex; flex-wrap: wrap; gap: 12px; }
.fact { flex: 1 1 118px; padding: 14px; }
.fact:first-child { flex: 2 1 250px; }
.fact h3 { color: var(--muted); font-size: 13px; font-weight: 550; }
.big { font-size: 21px; font-weight: 680; letter-spacing: -.02em; line-height: 1.5; }
.big, .last, .legend b { font-variant-numeric: tabular-nums; }
.fact:first-child .big { font-size: 27px; line-height: 1.3; }
.was { color: var(--muted); font-weight: 500; }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; }
.charts .card { display: flex; flex-direction: column; justify-content: space-between; }
figcaption { display: grid; grid-template-columns: 1fr auto; align-items: baseline; gap: 0 12px; margin-bottom: 8px; }
figcaption > .note, .legend { grid-column: 1 / -1; }
.last { font-weight: 650; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; color: var(--muted); font-size: 12.5px; }
.legend b { color: var(--ink); font-weight: 600; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 6px; }
svg { display: block; width: 100%; height: auto; }
.narrow { display: none; }

table { width: 100%; border-collapse: collapse; }
th, td { padding: 10px 14px 10px 0; text-align: left; vertical-align: top; font-weight: 400; overflow-wrap: anywhere; }
thead th { padding-bottom: 6px; color: var(--muted); font-size: 12.5px; font-weight: 600; }
tbody tr { border-top: 1px solid var(--line); }
pre, code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; unicode-bidi: isolate; }
pre { max-height: 220px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.samples table { table-layout: fixed; margin-top: 10px; }
.samples th:first-child { width: 26%; }
.answer { display: flex; gap: 12px; }
.answer pre { flex: 1; min-width: 0; border-left: 3px solid; padding-left: 10px; }
.answer p { display: flex; flex-direction: column; align-items: end; gap: 6px; }
pre.right { border-color: var(--good); }
pre.wrong { border-color: var(--bad); }
.tag {
  padding: 1px 8px; border-radius: 6px; background: var(--grid); color: var(--muted); font-size: 12px; font-weight: 600;
}
.tag.right { background: var(--goodbg); color: var(--good); }
.tag.wrong { background: var(--badbg); color: var(--bad); }
summary { display: flex; align-items: baseline; gap: 12px; cursor: pointer; }
summary::before { content: "▸"; color: var(--muted); }
[open] > summary::before { content: "▾"; }
.fields { margin-top: 12px; }
.fields th { width: 34%; color: var(--muted); }
.fields th, .fields td { padding: 5px 12px 5px 0; font-size: 13px; }

@media (max-width: 640px) {
  main { padding: 24px 14px 48px; }
  h1 { font-size: 24px; }
  .wide, thead { display: none; }
  .narrow { display: block; }
  .fact, .fact:first-child { flex-basis: 40%; }
  .fact:first-child { flex-basis: 100%; }
  .samples tr, .samples td, .samples th, .samples th:first-child { display: block; width: auto; padding: 4px 0; }
  .samples tr { padding: 12px 0; }
  .samples td::before { content: attr(data-head); display: block; color: var(--muted); font-size: 12px; }
}
@media print { .card { break-inside: avoid; } }
"""

PAGE_CSS = PALETTE + CHART_CSS + _LAYOUT_CSS

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""
