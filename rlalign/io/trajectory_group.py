"""A group on the page of rlalign.io.trajectories: the copies of a task, their turns, the states that turns began in."""

import collections
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from rlalign.envs.protocol import End
from rlalign.io.charts import number
from rlalign.io.report import text_html
from rlalign.io.trajectory_style import ENDS, LEGEND

MAX_TEXT = 4000  # characters shown of one text
MAX_TURNS = 200  # shown of one episode
MAX_ACTIONS = 200  # admissible actions shown of one turn
_LINKS = 800  # bytes that a turn takes in the overview and the list of states

Record = Mapping[str, Any]


class Key(NamedTuple):
    """A group: the copies of one task at one step; those of training sort first."""

    held_out: bool
    step: int
    group: int

    @property
    def split(self) -> str:
        return "held-out" if self.held_out else "train"

    @property
    def id(self) -> str:
        return f"{self.split}-{self.step}-{self.group}"


class _Taken(NamedTuple):
    """A turn and where it is; `shown` in its copy; not `counts` in a lost episode, which says nothing of the policy."""

    copy: int
    index: int
    turn: Record
    shown: bool
    counts: bool


class _Scene(NamedTuple):
    """What the parts of a group share: its id, anchor -> the turns that began there, and what fills half a bar."""

    id: str
    states: Mapping[int, Sequence[_Taken]]
    scale: float


def size(text: str) -> int:
    """Bytes of a text in the file."""
    return len(text.encode("utf-8", "replace"))


def section(key: Key, copies: Mapping[int, Record], room: int) -> tuple[str, bool]:
    """A group.

    Args:
      key: names it.
      copies: copy -> episode.
      room: bytes; the copies that fit are shown, at least one.

    Returns:
      The section, and whether all copies are in it.
    """
    scene = _scene(key, copies)
    shown: dict[int, str] = {}
    for copy, episode in sorted(copies.items()):
        text = _copy(scene, copy, episode)
        room -= size(text) + _LINKS * len(_indices(episode["turns"]))
        if shown and room < 0:
            break
        shown[copy] = text
    episodes = list(copies.values())
    counted = [one for one in episodes if not End[one["end"]].lost]
    returns = [one["return"] for one in counted if _is_finite(one["return"])]
    shared = sum(len(taken) > 1 for taken in scene.states.values())
    facts = [
        "seed " + ", ".join(map(str, sorted({one["seed"] for one in episodes}))),
        f"{sum(one['end'] == 'WON' for one in episodes)} of {count(len(episodes), 'copy', 'copies')} won",
        f"mean return {_number(sum(returns) / len(returns))}" if returns else "",
        f"{len(episodes) - len(counted)} lost" if len(counted) < len(episodes) else "",
        count(sum(len(one["turns"]) for one in episodes), "step"),
    ]
    chips = "".join(f"<li>{fact}</li>" for fact in facts if fact)
    if scene.states:
        chips += f'<li><a href="#{key.id}-states">{count(len(scene.states), "state")}, {shared} shared</a></li>'
    tasks = " / ".join(dict.fromkeys(one["task"] for one in episodes))
    left = [str(copy) for copy in sorted(copies) if copy not in shown]
    note = f'<p class="note">Left out, so that the page stays small: copies {", ".join(left)}.</p>' if left else ""
    return (
        f'<section class="group" id="{key.id}"><p class="note">step {key.step:,} · {key.split} · group {key.group}</p>'
        f'<h2 dir="auto">{_clipped(tasks, 400)}</h2><ul class="chips">{chips}</ul>{note}'
        f"{_overview(scene, {copy: copies[copy] for copy in shown})}"
        f'<div class="scene"><div class="copies">{"".join(shown.values())}</div>'
        f"{_states(scene, shown)}</div></section>",
        not left,
    )


def _scene(key: Key, copies: Mapping[int, Record]) -> _Scene:
    states = collections.defaultdict(list)
    largest = 0.0
    for copy, episode in sorted(copies.items()):
        shown, counts = set(_indices(episode["turns"])), not End[episode["end"]].lost
        for index, turn in enumerate(episode["turns"]):
            if turn.get("anchor") is not None:
                states[turn["anchor"]].append(_Taken(copy, index, turn, index in shown, counts))
            values = [turn.get(part) for part in ("advantage", "episode", "step")]
            largest = max([largest, *[abs(value) for value in values if _is_finite(value)]])
    return _Scene(key.id, states, largest)


def _overview(scene: _Scene, copies: Mapping[int, Record]) -> str:
    """All copies above each other, a cell a turn: its advantage up or down, and what happened."""
    rows = []
    for copy, episode in copies.items():
        cells = "".join(_cell(scene, copy, index, episode["turns"][index]) for index in _indices(episode["turns"]))
        tone, says, means = ENDS[End[episode["end"]]]
        rows.append(
            f'<div class="row"><a href="#{scene.id}-c{copy}">copy {copy}</a><span class="cells">{cells}</span>'
            f'<span class="tag {tone}" title="{means}">{says}</span></div>'
        )
    has = scene.scale > 0
    bars = f"advantage above or below the line, ±{_number(scene.scale)} at the edge; " if has else ""
    note = f"A cell is a turn: {bars}× an invalid action; ● a reward. Same state, same highlight: point or click."
    return f'<div class="card map"><p class="note">{note}</p><div class="rows">{"".join(rows)}</div></div>'


def _cell(scene: _Scene, copy: int, index: int, turn: Record) -> str:
    value, reward = turn.get("advantage"), turn["reward"]
    words = [f"copy {copy}, turn {index + 1}: {turn['action'][:80] or '(no action)'}"]
    words += [] if value is None else [f"advantage {_signed(value)}"]
    words += [] if turn["valid"] else ["invalid"]
    words += [f"reward {_number(reward)}"] if reward else []
    words += [_state_name(scene, turn)] if turn.get("anchor") is not None else []
    name = text_html("; ".join(words))
    bar = ""
    if _is_finite(value) and value:
        height = 50 * (abs(value) / scene.scale)
        bar = f'<i class="{"above" if value > 0 else "below"}" style="height:{height:.0f}%"></i>'
    mark = ("" if turn["valid"] else "<s>×</s>") + ("<u>●</u>" if reward else "")
    link = f"#{scene.id}-c{copy}-t{index + 1}"
    return f'<a href="{link}"{_anchor(turn)} title="{name}" aria-label="{name}">{bar}{mark}</a>'


def _copy(scene: _Scene, copy: int, episode: Record) -> str:
    tone, says, means = ENDS[End[episode["end"]]]
    turns = episode["turns"]
    facts = [f"score {_number(episode['score'])}", f"return {_number(episode['return'])}", count(len(turns), "step")]
    items, before = [], -1
    for index in _indices(turns):
        if index > before + 1:
            items.append(f'<li class="note">{count(index - before - 1, "turn")} left out</li>')
        items.append(_turn(scene, copy, index, turns[index]))
        before = index
    if episode["last"] is not None:
        items.append(f'<li class="last-seen"><span class="n">end</span>{_seen(episode["last"])}</li>')
    reason = f'<p class="note" dir="auto">{_clipped(episode["reason"])}</p>' if episode["reason"] else ""
    return (
        f'<details class="card copy" id="{scene.id}-c{copy}" open><summary><h3>Copy {copy}</h3>'
        f'<span class="tag {tone}" title="{means}">{says}</span><span class="note">{" · ".join(facts)}</span></summary>'
        f"{reason}<ol>{''.join(items)}</ol></details>"
    )


def _turn(scene: _Scene, copy: int, index: int, turn: Record) -> str:
    tags = "" if turn["valid"] else '<span class="tag wrong">✗ invalid</span>'
    if turn["reward"]:
        tags += (
            f'<span class="tag {"right" if turn["reward"] > 0 else "wrong"}">reward {_number(turn["reward"])}</span>'
        )
    tokens = f" · {turn['tokens']:,} tokens" if turn.get("tokens") is not None else ""
    answer = ""
    if turn["answer"].strip() != turn["action"]:
        answer = _fold(f"answer{tokens}", f'<pre dir="auto">{_clipped(turn["answer"])}</pre>')
    state = ""
    if turn.get("anchor") is not None:
        state = f'<a class="state" href="#{scene.id}-s{turn["anchor"]}">{_state_name(scene, turn)}</a>'
    at = f"{scene.id}-c{copy}-t{index + 1}"
    return (
        f'<li class="turn" id="{at}"{_anchor(turn)}><a class="n" href="#{at}">{index + 1}</a>'
        f'{_seen(turn["observation"])}<p class="act">{_action(turn["action"])}{tags}</p>{_advantage(scene, turn)}'
        f'<div class="more">{answer}{_admissible(turn)}{state}</div></li>'
    )


def _admissible(turn: Record) -> str:
    actions = turn["admissible"]
    if not actions:
        return ""
    shown = actions[:MAX_ACTIONS]
    if turn["action"] in actions and turn["action"] not in shown:
        shown.append(turn["action"])
    taken, other = '<li class="taken" aria-current="true">%s ← taken</li>', "<li>%s</li>"
    items = [(taken if one == turn["action"] else other) % _action(one) for one in shown]
    if turn["action"] not in actions:
        items.append('<li class="note">the action taken is none of these</li>')
    if len(actions) > len(shown):
        items.append(f'<li class="note">and {len(actions) - len(shown):,} more</li>')
    return _fold(f"{len(actions):,} admissible", f'<ul class="admissible">{"".join(items)}</ul>')


def _advantage(scene: _Scene, values: Record) -> str:
    """A bar for each part, to the right of the line where it is above 0, a tick for the whole, and the numbers."""
    total = values.get("advantage")
    if total is None:
        return ""
    parts = [(part, values[part]) for part in ("episode", "step") if values.get(part) is not None]
    place = lambda value: 60 + 58 * (value / scene.scale) if _is_finite(value) and scene.scale else 60.0
    bars = ""
    for (name, value), top in zip(parts, (1.5, 8.5), strict=False):
        left, right = sorted((60.0, place(value)))
        bars += f'<rect class="{name[0]}" x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="6"/>'
    if not parts:
        left, right = sorted((60.0, place(total)))
        bars = f'<rect class="whole" x="{left:.1f}" y="4" width="{right - left:.1f}" height="8"/>'
    exact = f"advantage {_signed(total, '+.6g')}" + "".join(
        f", {name} {_signed(value, '+.6g')}" for name, value in parts
    )
    numbers = "".join(f'<i class="{name[0]}"></i>{name} {_signed(value)}' for name, value in parts)
    return (
        f'<p class="adv" title="{exact}"><svg viewBox="0 0 120 16" aria-hidden="true"><path d="M60,0V16"/>{bars}'
        f'<path class="tick" d="M{place(total):.1f},0V16"/></svg><b>{_signed(total)}</b><small>{numbers}</small></p>'
    )


def _states(scene: _Scene, shown: Container[int]) -> str:
    """The anchor groups, the largest first; those of one turn folded away."""
    if not scene.states:
        return ""
    order = sorted(scene.states.items(), key=lambda item: (-len(item[1]), item[0]))
    shared = "".join(_state(scene, anchor, taken, shown) for anchor, taken in order if len(taken) > 1)
    single = [_state(scene, anchor, taken, shown) for anchor, taken in order if len(taken) == 1]
    once = _fold(f"{count(len(single), 'state')} with one turn", f"<ul>{''.join(single)}</ul>") if single else ""
    return (
        f'<aside class="card states" id="{scene.id}-states" aria-label="States"><h3>States</h3>'
        '<p class="note">turns that began alike (anchor groups): what was done there, its mean advantage, how often</p>'
        f"{LEGEND if scene.scale else ''}<ul>{shared}</ul>{once}</aside>"
    )


def _state(scene: _Scene, anchor: int, taken: Sequence[_Taken], shown: Container[int]) -> str:
    by_action = collections.defaultdict(list)
    for one in taken:
        by_action[one.turn["action"]].append(one)
    rows = [(action, _means(ones), ones) for action, ones in by_action.items()]
    worth = lambda mean: mean if _is_finite(mean) else -math.inf
    rows.sort(key=lambda row: (-worth(row[1]["advantage"]), -len(row[2]), row[0]))
    items = ""
    for action, means, ones in rows:
        links = " ".join(
            f'<a href="#{scene.id}-c{one.copy}-t{one.index + 1}">{one.copy}.{one.index + 1}</a>'
            for one in ones
            if one.shown and one.copy in shown
        )
        lost = sum(not one.counts for one in ones)
        times = f"({len(ones)}, {lost} lost)" if lost else f"({len(ones)})"
        invalid = "" if all(one.turn["valid"] for one in ones) else '<span class="tag wrong">✗ invalid</span>'
        items += (
            f'<li><p class="act">{_action(action)} <span class="times">{times}</span>{invalid}</p>'
            f'{_advantage(scene, means)}<p class="note">copy.turn {links}</p></li>'
        )
    where = f"{count(len(taken), 'turn')} in {count(len({one.copy for one in taken}), 'copy', 'copies')}"
    return (
        f'<li class="st" id="{scene.id}-s{anchor}" data-anchor="{anchor}"><h4>State {anchor} <span class="note">{where}'
        f"</span></h4>{_seen(taken[0].turn['observation'], 240)}<ul>{items}</ul></li>"
    )


def _means(taken: Iterable[_Taken]) -> dict[str, float | None]:
    """The mean of the advantage and of each part, over the turns that count and have one."""
    found = {}
    for part in ("advantage", "episode", "step"):
        values = [one.turn[part] for one in taken if one.counts and one.turn.get(part) is not None]
        found[part] = sum(values) / len(values) if values else None
    return found


def _indices(turns: Sequence[Any]) -> list[int]:
    """The turns that are shown: all, or the first and the last."""
    half = MAX_TURNS // 2
    return [i for i in range(len(turns)) if len(turns) <= MAX_TURNS or i < half or i >= len(turns) - half]


def _signed(value: float, form: str = "+.3f") -> str:
    """A number with its sign: +0.310."""
    return f"{value:{form}}".replace("-", "−")


def _number(value: float | None) -> str:
    return "–" if value is None else number(value) if math.isfinite(value) else str(value)


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def count(many: int, noun: str, plural: str = "") -> str:
    """2 turns, 1 copy."""
    return f"{many:,} {noun if many == 1 else plural or noun + 's'}"


def _anchor(turn: Record) -> str:
    """What the script highlights by."""
    return "" if turn.get("anchor") is None else f' data-anchor="{turn["anchor"]}"'


def _state_name(scene: _Scene, turn: Record) -> str:
    return f"state {turn['anchor']}, {count(len(scene.states[turn['anchor']]), 'turn')}"


def _action(action: str) -> str:
    return f'<code dir="auto">{_clipped(action, 400)}</code>' if action.strip() else '<em class="note">(no action)</em>'


def _seen(text: str, limit: int = MAX_TEXT) -> str:
    return f'<pre class="seen" dir="auto">{_clipped(text, limit)}</pre>'


def _fold(name: str, inside: str) -> str:
    return f"<details><summary>{name}</summary>{inside}</details>"


def _clipped(text: str, limit: int = MAX_TEXT) -> str:
    """Escaped text with a note of what was cut."""
    left = len(text) - limit
    if left <= 0:
        return text_html(text)
    return f'{text_html(text[:limit])}<span class="note">… {count(left, "character")} more</span>'
