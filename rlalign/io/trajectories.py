"""What agents did, on one self-contained page: `rlalign trajectories RUN_FOLDER` writes RUN_FOLDER/trajectories.html.

Read from the folder: episodes.jsonl, one episode a line, what rlalign.envs.episodes.Episode holds and the advantages
of its steps. The page shows the copies of a task beside each other, turn by turn, and every state that several turns
began in (GiGPO's anchor groups) with what each action taken there was worth. It loads nothing; the one script that it
lets run, by its hash, chooses a group and highlights a state: without it all is shown, and turns and states link each
other.
"""

import base64
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlalign.envs.protocol import End
from rlalign.io.files import write_atomic
from rlalign.io.records import BadRecord, kind, lines_of, parse_line
from rlalign.io.report import text_html
from rlalign.io.style import PAGE, PAGE_CSS
from rlalign.io.trajectory_group import Key, Record, count, section, size
from rlalign.io.trajectory_style import CSS, SCRIPT

_LARGEST = 2**63  # of integers: what a float holds too


@dataclasses.dataclass
class _Found:
    """The episodes of a file, those that may be shown.

    Attributes:
      groups: key -> copy -> episode; where a resumed run wrote one again, the later.
      seen: every key in the file.
      lines: episodes read.
      torn: whether the last line was cut off and left out.
    """

    groups: dict[Key, dict[int, Record]] = dataclasses.field(default_factory=dict)
    seen: set[Key] = dataclasses.field(default_factory=set)
    lines: int = 0
    torn: bool = False


def write_trajectories(folder: str | os.PathLike[str], *, edge_steps: int = 5, max_bytes: int = 16 << 20) -> Path:
    """Writes the page of a run's episodes, also of a run that is still going.

    Args:
      folder: holds episodes.jsonl.
      edge_steps: how many of the first and of the last steps are shown, of training and held-out tasks each.
      max_bytes: of the page, about. The first group of every step gets a place, then the second; of the steps the last
        first, then the first, and so inwards. What does not fit is left out, which the page says.

    Returns:
      The path of trajectories.html, replaced atomically.

    Raises:
      FileNotFoundError: no episodes.jsonl.
      ValueError: no episode in it, a damaged or foreign line, by file and line, or edge_steps below 1. A torn last
        line, as a killed writer leaves it, is left out, which the page says.
    """
    path = Path(folder) / "episodes.jsonl"
    found = _read(path, edge_steps)
    if not found.groups:
        raise ValueError(f"{path} has no episode to show; has the run finished a step?")
    sections: dict[Key, str] = {}
    room = max_bytes
    for key in _inwards(found.groups):
        text, whole = section(key, found.groups[key], room)
        if sections and not whole:
            break
        sections[key] = text
        room -= size(text)
    title = Path(folder).resolve().name
    shown = {key: found.groups[key] for key in sorted(sections)}
    body = [
        _header(title, found.lines, _notes(found, shown)),
        _chooser(shown),
        *[sections[key] for key in shown],
        f"<script>{SCRIPT}</script>",
    ]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    only_ours = PAGE.replace("default-src 'none';", f"default-src 'none'; script-src 'sha256-{digest}';")
    written = path.with_name("trajectories.html")
    style = PAGE_CSS + CSS
    write_atomic(written, only_ours.format(title=text_html(title), style=style, body="\n".join(body)))
    return written


def _inwards(keys: Sequence[Key] | Mapping[Key, Any]) -> list[Key]:
    """Groups in the order in which they get a place; of equal number: the last step's, the first's, inwards."""
    rank: dict[tuple[bool, int], int] = {}
    for held_out in (False, True):
        steps = sorted({key.step for key in keys if key.held_out == held_out})
        ends = zip(reversed(steps), steps, strict=True)
        order = dict.fromkeys(itertools.chain.from_iterable(ends))
        rank |= {(held_out, step): place for place, step in enumerate(order)}
    return sorted(keys, key=lambda key: (key.group, rank[key.held_out, key.step], key))


def _notes(found: _Found, shown: Mapping[Key, Any]) -> list[str]:
    """What is not on the page."""
    notes = []
    for held_out, name in ((False, "training"), (True, "held-out")):
        every = [key for key in found.seen if key.held_out == held_out]
        if left := [key.step for key in every if key not in shown]:
            span = f"step {min(left)}" if min(left) == max(left) else f"steps {min(left):,} to {max(left):,}"
            notes.append(
                f"Left out, so that the page stays small: {len(left):,} of {len(every):,} {name} groups ({span})."
            )
    if found.torn:
        notes.append("The last line of episodes.jsonl is cut off, as a killed run leaves it, and was left out.")
    return notes


def _header(title: str, episodes: int, notes: Iterable[str]) -> str:
    """The page's head; notes say what is not on it."""
    said = "".join(f'<p class="note">{text_html(note)}</p>' for note in notes)
    return (
        f'<header><p class="eyebrow">rlalign trajectories</p><h1>{text_html(title)}</h1>'
        f'<ul class="chips"><li>{count(episodes, "episode")}</li></ul>{said}</header>'
    )


def _chooser(groups: Mapping[Key, Mapping[int, Record]]) -> str:
    """A table of steps and groups: how many copies won, each a link to its group."""
    columns = sorted({key.group for key in groups})
    rows = []
    for held_out, step in dict.fromkeys((key.held_out, key.step) for key in groups):
        cells = []
        for column in columns:
            key = Key(held_out, step, column)
            if key not in groups:
                cells.append('<td class="note">–</td>')
                continue
            won, copies = sum(one["end"] == "WON" for one in groups[key].values()), len(groups[key])
            name = f"step {step}, {key.split}, group {column}: {won} of {copies} won"
            cells.append(
                f'<td><a href="#{key.id}" title="{name}" aria-label="{name}" style="--share:{won / copies:.3f}">'
                f"{won}/{copies}</a></td>"
            )
        split = "held-out" if held_out else "train"
        rows.append(f'<tr><th scope="row">step {step:,} <span class="note">{split}</span></th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">group {column}</th>' for column in columns)
    held_out = min(groups).held_out
    last = max(key.step for key in groups if key.held_out == held_out)
    first = min(key for key in groups if key[:2] == (held_out, last))
    return (
        f'<nav class="card pick" data-first="{first.id}" aria-label="Steps and groups">'
        '<p class="note">copies that won, of each task</p>'
        f'<div class="wide-table"><table><tr><td></td>{head}</tr>{"".join(rows)}</table></div></nav>'
    )


def _read(path: Path, edge: int) -> _Found:
    """The episodes of the first and last `edge` steps of each split; all others are read, checked and forgotten."""
    if edge < 1:
        raise ValueError(f"edge_steps is {edge}, must be positive")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (looked from {os.getcwd()}); give the folder of an agent's run")
    found, damaged = _Found(), None
    kept: dict[bool, set[int]] = {False: set(), True: set()}
    for line, raw in lines_of(path):
        if damaged is not None:
            raise damaged
        try:
            episode = _checked(parse_line(raw))
        except BadRecord as bad:
            damaged = ValueError(f"{path}:{line}: {bad.detail}; mend or remove the line, if this is an agent's run")
            if bad.kind not in ("broken JSON", "not UTF-8"):  # no part of a line is a line
                raise damaged from None
            continue
        key = Key(episode["split"] == "held-out", episode["step"], episode["group"])
        found.lines += 1
        steps = kept[key.held_out]
        if key not in found.seen:
            found.seen.add(key)
            steps.add(key.step)
        if len(steps) > 2 * edge:
            steps.remove(middle := sorted(steps)[edge])
            found.groups = {k: v for k, v in found.groups.items() if (k.held_out, k.step) != (key.held_out, middle)}
        if key.step in steps:
            found.groups.setdefault(key, {})[episode["copy"]] = episode
    found.torn = damaged is not None
    return found


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_ID, _NUMBER, _TEXT = (_is_id, "an integer >= 0"), (_is_number, "a number or null"), (_is_text, "a text")
_EPISODE = {  # field -> what it must be
    **dict.fromkeys(("step", "group", "copy", "seed"), _ID),
    "split": (lambda value: value in ("train", "held-out"), "'train' or 'held-out'"),
    "end": (lambda value: _is_text(value) and value in End.__members__, f"one of {', '.join(End.__members__)}"),
    **dict.fromkeys(("score", "return"), _NUMBER),
    **dict.fromkeys(("reason", "task"), _TEXT),
    "last": (lambda value: value is None or _is_text(value), "a text or null"),
    "turns": (lambda value: isinstance(value, list), "an array"),
}
_TURN = {
    **dict.fromkeys(("observation", "answer", "action"), _TEXT),
    "admissible": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "an array of texts"),
    "valid": (lambda value: isinstance(value, bool), "true or false"),
    "reward": _NUMBER,
}
_OPTIONAL = {  # of a turn: not every algorithm has them
    "anchor": (lambda value: value is None or (type(value) is int and abs(value) < _LARGEST), "an integer or null"),
    **dict.fromkeys(("advantage", "episode", "step", "tokens"), _NUMBER),
}


def _checked(episode: dict[str, Any]) -> dict[str, Any]:
    """The record itself, if it is an episode; fields that are not known are left alone."""
    _check(episode, _EPISODE, "")
    for index, turn in enumerate(episode["turns"], start=1):
        if not isinstance(turn, dict):
            raise BadRecord("bad field", f"turn {index} is {kind(turn)}, must be an object", "")
        _check(turn, _TURN, f"turn {index}: ")
        _check(turn, {name: rule for name, rule in _OPTIONAL.items() if name in turn}, f"turn {index}: ")
    return episode


def _check(record: Record, rules: Mapping[str, tuple[Any, str]], place: str) -> None:
    for name, (good, wanted) in rules.items():
        if name not in record:
            raise BadRecord("missing field", f"{place}no field {name!r}", "")
        if not good(record[name]):
            shown = kind(record[name]) if isinstance(record[name], dict | list) else f"{record[name]!r:.60}"
            raise BadRecord("bad field", f"{place}{name} is {shown}, must be {wanted}", "")
