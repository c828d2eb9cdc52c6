"""How the page of rlalign.io.trajectories looks beyond rlalign.io.style, and the script that chooses and highlights."""

from rlalign.envs.protocol import End

ENDS = {  # tone of its tag, what it says, what it means
    End.WON: ("right", "✓ won", "the task is done"),
    End.FAILED: ("wrong", "✗ failed", "terminated, and the task is not done"),
    End.TRUNCATED: ("", "truncated", "the environment's own limit of steps"),
    End.STEP_LIMIT: ("", "step limit", "the runner's limit of steps"),
    End.TOO_LONG: ("", "too long", "the next prompt did not fit"),
    End.RAISED: ("wrong", "✗ raised", "lost: the environment raised an exception"),
    End.HUNG: ("wrong", "✗ hung", "lost: the environment took longer than its limit"),
    End.DIED: ("wrong", "✗ died", "lost: the environment's process ended"),
}
LEGEND = (
    '<ul class="legend"><li><i class="e"></i>episode part: this copy against the others</li>'
    '<li><i class="s"></i>step part: this action against those taken in the same state</li>'
    '<li><i class="total"></i>advantage</li></ul>'
)

CSS = """
:root { --hit: #8b45e0; --hitbg: #f3ebfd; --near: #f7f4fc; }
@media (prefers-color-scheme: dark) { :root { --hit: #bf96ff; --hitbg: #2a1f40; --near: #1e1b2a; } }
main { max-width: 1560px; }
a { color: inherit; text-decoration-color: var(--muted); text-underline-offset: 2px; }
:focus-visible { outline: 2px solid var(--c1); outline-offset: 1px; }
.e { background: var(--c1); fill: var(--c1); }
.s { background: var(--c3); fill: var(--c3); }
.total { background: var(--ink); }
.legend .total { width: 2px; border-radius: 0; }

.wide-table { overflow-x: auto; margin-top: 6px; }
.pick table { width: auto; font-variant-numeric: tabular-nums; }
.pick th, .pick td { padding: 4px 6px 4px 0; vertical-align: middle; white-space: nowrap; font-size: 13px; }
.pick td { text-align: center; }
.pick tr { border: 0; }
.pick a {
  display: block; min-width: 58px; padding: 3px 10px; border: 1px solid var(--line); border-radius: 6px;
  text-align: center; text-decoration: none; color: var(--ink);
  background: linear-gradient(90deg, var(--goodbg) calc(100% * var(--share)), transparent 0);
}
.pick a:hover { border-color: var(--muted); }
.pick a[aria-current=true] { border-color: var(--c1); box-shadow: inset 0 0 0 1px var(--c1); font-weight: 650; }

.js .group:not(.on) { display: none; }
.group { margin-top: 32px; scroll-margin-top: 8px; }
.group > h2 { margin: 2px 0 0; font-size: 22px; overflow-wrap: anywhere; }
.group > .chips { margin: 10px 0 14px; }
.map .rows { overflow-x: auto; margin-top: 10px; padding: 2px; }
.row { display: flex; align-items: center; gap: 10px; width: max-content; margin-bottom: 3px; font-size: 12.5px; }
.row > a { position: sticky; left: 0; z-index: 1; width: 62px; background: var(--card); }
.cells { display: flex; gap: 2px; min-width: 120px; }
.cells a {
  position: relative; width: 24px; height: 30px; border-radius: 3px; text-decoration: none;
  background: linear-gradient(var(--line), var(--line)) 0 50% / 100% 1px no-repeat var(--bg);
}
.cells i { position: absolute; left: 4px; right: 4px; background: var(--muted); }
.cells .above { bottom: 50%; border-radius: 2px 2px 0 0; }
.cells .below { top: 50%; border-radius: 0 0 2px 2px; }
.cells s, .cells u { position: absolute; right: 2px; text-decoration: none; font: 700 13px/1 sans-serif; }
.cells s { bottom: 0; color: var(--bad); }
.cells u { top: 1px; color: var(--good); font-size: 10px; }

.scene { display: grid; grid-template-columns: minmax(0, 1fr) 340px; gap: 16px; align-items: start; margin-top: 16px; }
.copies { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 16px; align-items: start; }
.scene > .copies:last-child { grid-column: 1 / -1; }
.copy { padding: 12px 0 4px; overflow: clip; scroll-margin-top: 8px; }
.copy > summary { padding: 0 14px 10px; flex-wrap: wrap; gap: 4px 10px; }
.copy > .note { padding: 0 14px 10px; overflow-wrap: anywhere; }
ol { list-style: none; padding: 0; }
.copy > ol > li { position: relative; padding: 9px 14px 9px 44px; border-top: 1px solid var(--line); }
.n { position: absolute; left: 14px; top: 10px; color: var(--muted); font-size: 12.5px; text-decoration: none; }
.turn { scroll-margin: 30vh 0; box-shadow: inset 0 0 0 var(--hit); cursor: pointer; }
pre.seen { font: inherit; font-size: 13.5px; line-height: 1.45; color: var(--muted); }
.act { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 8px; margin-top: 3px; overflow-wrap: anywhere; }
.act code { min-width: 0; font-weight: 650; }
.turn > .act::before { content: "→"; color: var(--muted); }
.adv { display: flex; flex-wrap: wrap; align-items: center; gap: 0 9px; margin-top: 3px; font-size: 12.5px; }
.adv b, .adv small { font-variant-numeric: tabular-nums; }
.adv small { color: var(--muted); font-size: 11.5px; white-space: nowrap; }
.adv b { min-width: 46px; }
.adv small i { display: inline-block; width: 8px; height: 8px; border-radius: 2px; margin: 0 4px 0 0; }
.adv small i:not(:first-child) { margin-left: 9px; }
.adv svg { width: 96px; height: 14px; flex: none; background: var(--bg); border-radius: 3px; }
.adv path { stroke: var(--muted); fill: none; }
.adv .tick { stroke: var(--ink); stroke-width: 2; }
.adv .whole { fill: var(--muted); }
.more { display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 4px; font-size: 12.5px; color: var(--muted); }
.more details[open] { flex-basis: 100%; }
.more summary, .states summary { gap: 5px; }
.more summary:hover, .state:hover { color: var(--ink); }
.more pre, .admissible {
  margin: 4px 0 6px; padding: 8px 10px; border-radius: 6px; background: var(--bg); color: var(--ink);
}
.admissible { max-height: 220px; overflow: auto; overflow-wrap: anywhere; }
.taken code { font-weight: 700; }
.state { margin-left: auto; }

.states { position: sticky; top: 12px; max-height: calc(100vh - 24px); overflow: auto; padding: 14px 0 6px; }
.states > :is(h3, .note, .legend) { padding: 0 14px; }
.states > .legend { display: block; margin: 6px 0 10px; }
.states > .legend i { flex: none; }
.states > details { border-top: 1px solid var(--line); font-size: 13px; }
.states > details > summary { padding: 9px 14px; }
.st { padding: 10px 14px; border-top: 1px solid var(--line); cursor: pointer; }
.st h4 { font-size: 13.5px; }
.st > ul { margin-top: 4px; }
.st > ul > li { margin-top: 7px; padding-left: 8px; border-left: 2px solid var(--line); }
.times { color: var(--muted); font-size: 12.5px; }

.near:is(.turn, .st) { background: var(--near); }
.cells .near { outline: 2px solid var(--muted); }
.on:is(.turn, .st), .turn:target, .st:target { background: var(--hitbg); box-shadow: inset 4px 0 var(--hit); }
.turn.on .state::before, .st.on h4::before { content: "◆ "; color: var(--hit); }
.cells .on { outline: 2px solid var(--hit); background-color: var(--hitbg); }
.on > i { background: var(--hit); }

@media (max-width: 1000px) {
  .scene { grid-template-columns: minmax(0, 1fr); }
  .states { position: static; max-height: none; }
  .js .states .on {
    position: fixed; inset: auto 0 0; z-index: 2; max-height: 38vh; overflow: auto;
    border-top: 2px solid var(--hit);
  }
  .js .states .on h4::after { content: "✕"; float: right; padding: 0 4px; color: var(--muted); }
}
@media (max-width: 640px) {
  .copies { grid-template-columns: minmax(0, 1fr); }
  .copy > ol > li { padding-left: 36px; }
}
@media print { .states { position: static; max-height: none; } }
"""

# A place is chosen by the address: #GROUP shows it, #GROUP-sSTATE also highlights the state's turns, and so do
# #GROUP-cCOPY-tTURN and a click.
SCRIPT = """
"use strict";
(() => {
  const all = (what, inside = document) => [...inside.querySelectorAll(what)];
  const groups = all(".group"), links = all(".pick a"), { first } = document.querySelector(".pick").dataset;
  const lit = { on: [], near: [] };
  const light = (name, place) => {
    const group = place && place.closest(".group"), state = place && place.dataset.anchor;
    lit[name].forEach((one) => one.classList.remove(name));
    lit[name] = group ? all(`[data-anchor="${state}"]`, group) : [];
    lit[name].forEach((one) => one.classList.add(name));
  };
  const place = (node) => (node instanceof Element ? node.closest("[data-anchor]") : null);
  const show = (scroll) => {
    const at = document.getElementById(location.hash.slice(1));
    const group = (at && at.closest(".group")) || document.getElementById(first);
    groups.forEach((one) => one.classList.toggle("on", one === group));
    links.forEach((one) => one.setAttribute("aria-current", one.hash === "#" + group.id));
    light("on", place(at));
    const entry = group.querySelector(".states .on"), list = group.querySelector(".states");
    for (const one of [at, entry]) {
      const fold = one && one.closest("details");
      if (fold) fold.open = true;
    }
    if (entry) list.scrollTop = entry.offsetTop - 60;
    if (scroll && at) (at === entry ? group : at).scrollIntoView();
  };
  const choose = (id) => {
    history.replaceState(null, "", "#" + id);
    show(false);
  };
  document.addEventListener("click", (event) => {
    const at = place(event.target), link = event.target.closest("a, .more details, summary");
    if (!at || at.matches(".cells a") || (link && !link.matches(".state")) || String(getSelection())) return;
    event.preventDefault();
    const group = at.closest(".group").id;
    choose(at.classList.contains("on") ? group : `${group}-s${at.dataset.anchor}`);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && lit.on.length) choose(lit.on[0].closest(".group").id);
  });
  for (const name of ["mouseover", "focusin"]) {
    document.addEventListener(name, (event) => {
      const at = place(event.target);
      if (at !== lit.at) light("near", (lit.at = at));
    });
  }
  addEventListener("hashchange", () => show(true));
  addEventListener("load", () => show(true));  // after the browser's own scrolling
  document.body.classList.add("js");
  show(false);
})();
"""
