"""Dialogues from health records, in the manner of DiaLLM (arXiv 2506.20059): our templates, and their parser.

    found = dialogues_of(table.of("7"), seed=0)          # one for each visit with a diagnosis
    text = render(found[0], seed=0)
    assert parse(text) == found[0]

A patient opens, a doctor asks for tests, the laboratory gives results, the doctor says what each means, and gives a
ranked list of diagnoses or abstains. Each turn is a sentence, drawn from TEMPLATES by the seed, and below it the same
as an action, a JSON list. The state that a model sees is age, sex, symptoms (ICD-10 R codes), diagnoses of earlier
visits (three characters) and the results so far: which tests a doctor ordered is not in it, because it gives the
diagnosis away.
"""

import contextlib
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from rlalign.clinical.events import BIRTH, END, LOINC, PERSON, START, VISIT, Event, completed_years
from rlalign.clinical.loinc import NOTICE as LOINC_NOTICE
from rlalign.clinical.loinc import PANELS, TESTS
from rlalign.clinical.reference import WORDS, interpret_event

NOTICE = "Research software; not a medical device; not for diagnosis or treatment."
HORIZON = 8
NOT_DISEASES = "RVWXYZ"  # ICD-10 chapters: symptoms, external causes, factors that influence health


class Opens(NamedTuple):
    """The patient. Age in completed years; sex "female" or "male"; None where unknown."""

    age: int | None
    sex: str | None
    symptoms: tuple[str, ...] = ()
    history: tuple[str, ...] = ()


class Asks(NamedTuple):
    """The doctor asks for a test, by its LOINC code, or for a panel, by its name."""

    name: str


class Result(NamedTuple):
    """The laboratory gives a result; `value` None where it is in words or missing."""

    code: str
    value: float | None
    unit: str = ""


class Means(NamedTuple):
    """The doctor says what a result means: a word of reference.WORDS, and which diagnoses it argues for."""

    code: str
    word: str
    towards: tuple[str, ...] = ()


class Diagnoses(NamedTuple):
    """The doctor ends with diagnoses, the likeliest first."""

    codes: tuple[str, ...]


class Abstains(NamedTuple):
    """The doctor ends without a diagnosis."""


Turn = Opens | Asks | Result | Means | Diagnoses | Abstains
Dialogue = tuple[Turn, ...]

TEMPLATES: dict[type, tuple[str, tuple[str, ...]]] = {  # who speaks, and how
    Opens: (
        "Patient",
        (
            "I am {age} {sex}. I have come with {symptoms}. In the past I have had {history}.",
            "I have {symptoms}. I am {age} {sex}, and my history is {history}.",
        ),
    ),
    Asks: ("Doctor", ("I would like to check {name}.", "Let us do {name} next.", "Please measure {name}.")),
    Result: ("Laboratory", ("The result for {code} is {value}.", "{code}: {value}.")),
    Means: ("Doctor", ("That {code} is {word}{towards}.", "I read {code} as {word}{towards}.")),
    Diagnoses: ("Doctor", ("I think of {codes}.", "The likeliest diagnoses are {codes}.")),
    Abstains: ("Doctor", ("I cannot tell from what I have.", "This is not enough for a diagnosis.")),
}
VERBS: dict[str, type] = {
    "opens": Opens,
    "asks": Asks,
    "result": Result,
    "means": Means,
    "diagnoses": Diagnoses,
    "abstains": Abstains,
}
NAMES = {kind: verb for verb, kind in VERBS.items()}


def action(turn: Turn) -> str:
    """The machine-readable line of a turn.

    >>> action(Means("718-7", "low", ("D50",)))
    '["means", "718-7", "low", ["D50"]]'
    """
    return json.dumps([NAMES[type(turn)], *turn], allow_nan=False)


def sentence(turn: Turn, seed: int, place: int, names: Mapping[str, str] | None = None) -> str:
    """What is said.

    Args:
      turn: of a dialogue.
      seed, place: which template; the same for every version of Python.
      names: ICD code -> text; codes without one, and tests that are not in TESTS, are said as codes.
    """
    speaker, templates = TEMPLATES[type(turn)]
    template = templates[zlib.crc32(f"{seed}/{place}".encode()) % len(templates)]
    said = f"{speaker}: {template.format(**_words(turn, names or {}))}"
    return " ".join(said.split())  # one line, whatever the names hold


def _words(turn: Turn, names: Mapping[str, str]) -> dict[str, str]:
    """The fields of a turn as a sentence has them."""
    found = turn._asdict()
    listed = lambda codes: ", ".join(names.get(code, code) for code in codes) or "nothing that I know of"
    test = lambda code: TESTS[code].short if code in TESTS else code
    match turn:
        case Opens():
            sex = {"female": "woman", "male": "man"}.get(turn.sex or "", "person")
            age = "an adult" if turn.age is None else f"a {turn.age}-year-old"
            return {"age": age, "sex": sex, "symptoms": listed(turn.symptoms), "history": listed(turn.history)}
        case Asks():
            return {"name": f"the {turn.name if turn.name in PANELS else test(turn.name)}"}
        case Result():
            value = "not available" if turn.value is None else f"{turn.value:g} {turn.unit}".strip()
            return {"code": test(turn.code), "value": value}
        case Means():
            towards = f", which argues for {listed(turn.towards)}" if turn.towards else ""
            return {"code": test(turn.code), "word": turn.word, "towards": towards}
        case Diagnoses():
            return {"codes": listed(turn.codes)}
    return {name: str(value) for name, value in found.items()}


def render(dialogue: Sequence[Turn], *, seed: int, names: Mapping[str, str] | None = None) -> str:
    """A dialogue as text: two lines a turn, the sentence and the action.

    Args:
      dialogue: turns.
      seed: which templates.
      names: see `sentence`.
    Raises:
      ValueError: a value that is not finite.
    """
    lines = [(sentence(turn, seed, i, names), action(turn)) for i, turn in enumerate(dialogue)]
    return "".join(f"{said}\n{done}\n" for said, done in lines)


def parse(text: str) -> Dialogue:
    """The dialogue that `render` made: parse(render(x)) == x, whatever the seed and the names.

    Raises:
      ValueError: a line that begins with "[" and is no action; the message names it by number, without what it holds.
    """
    return _turns(enumerate(text.split("\n"), 1), lambda n: f"line {n} of the dialogue")


def _turns(lines: Iterable[tuple[int, str]], place: Callable[[int], str]) -> Dialogue:
    """The actions among numbered lines; `place` says where a line is, for errors."""
    found = []
    for number, line in lines:
        if line.startswith("["):
            turn = read_action(line)
            if turn is None:
                raise ValueError(f"{place(number)} is no action, such as {action(Asks('718-7'))}")
            found.append(turn)
    return tuple(found)


def read_action(line: str) -> Turn | None:
    """The turn that one line, such as a model's, stands for; None for anything else. Nothing raises."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, list) or not said:
        return None
    verb, *fields = said
    kind = VERBS.get(verb) if isinstance(verb, str) else None
    if kind is None or len(fields) != len(kind._fields):
        return None
    checks = [_CHECKS[name] for name in kind._fields]
    if not all(check(field) for check, field in zip(checks, fields, strict=True)):
        return None
    return kind(*(tuple(field) if isinstance(field, list) else field for field in fields))


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


def _are_texts(x: Any) -> bool:
    return isinstance(x, list) and all(map(_is_text, x))


def _is_number(x: Any) -> bool:
    """Finite, and no integer that is too large for a float."""
    return x is None or (isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= 1.7976931348623157e308)


_CHECKS = {
    "age": lambda x: x is None or (type(x) is int and 0 <= x < 200),
    "sex": lambda x: x in (None, "female", "male"),
    **dict.fromkeys(("symptoms", "history", "towards", "codes"), _are_texts),
    **dict.fromkeys(("name", "code", "unit"), _is_text),
    "word": lambda x: _is_text(x) and x in WORDS,
    "value": _is_number,
}


def messages(dialogue: Sequence[Turn], *, seed: int, names: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """A dialogue for chat templates: the doctor is the assistant; turns of one role in a row are one message."""
    found: list[dict[str, str]] = []
    for i, turn in enumerate(dialogue):
        role = "assistant" if TEMPLATES[type(turn)][0] == "Doctor" else "user"
        content = f"{sentence(turn, seed, i, names)}\n{action(turn)}"
        if found and found[-1]["role"] == role:
            found[-1]["content"] += f"\n{content}"
        else:
            found.append({"role": role, "content": content})
    return found


def write_dialogues(
    path: str | PathLike[str], dialogues: Iterable[Sequence[Turn]], *, seed: int, names: Mapping[str, str] | None = None
) -> int:
    """Writes dialogues, with the notices first, and a blank line after each; returns how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8", errors="replace") as file:
        file.write(f"# {NOTICE}\n# {LOINC_NOTICE}\n\n")
        for dialogue in dialogues:
            file.write(render(dialogue, seed=seed + count, names=names) + "\n")
            count += 1
    return count


def read_dialogues(path: str | PathLike[str]) -> list[Dialogue]:
    """What write_dialogues wrote, or dialogues of that form.

    Raises:
      ValueError: see `parse`, with the file and its line; bytes that are no UTF-8.
    """
    text = None
    with contextlib.suppress(UnicodeDecodeError):  # which holds all of the file
        text = Path(path).read_text(encoding="utf-8")
    if text is None:
        raise ValueError(f"{path}: not UTF-8; convert the file")
    blocks = itertools.groupby(enumerate(text.split("\n"), 1), lambda line: bool(line[1]))
    return [found for filled, lines in blocks if filled and (found := _turns(lines, lambda n: f"{path}:{n}"))]


def dialogues_of(events: Sequence[Event], *, seed: int, horizon: int = HORIZON, panels: bool = False) -> list[Dialogue]:
    """A dialogue for each visit of one subject that has a diagnosis and at least one result.

    Asked for are some of the tests with a result on record, never more than `horizon`: how many, which and in which
    order is drawn from the seed, the visit and each test's own code, not from the record. So a dialogue is the same
    whatever else was ordered: remove the results that it did not ask for, and nothing changes. What remains is that
    somebody ordered a test that has a result.

    Args:
      events: of one subject, as EventTable.of gives them.
      seed: for the draws.
      horizon: tests, or panels, asked for at most, > 0.
      panels: whether whole panels are asked for; tests outside PANELS by themselves.
    Returns:
      In the order of the visits. Diagnoses are ICD-10 codes of three characters, without symptoms, external causes and
      factors; they end the dialogue in alphabetical order, as the record has no other.
    Raises:
      ValueError: events of several subjects; a horizon below 1.
    """
    if len({event.subject for event in events}) > 1:
        raise ValueError("dialogues_of takes the events of one subject: use EventTable.of or by_subject")
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}, must be at least 1")
    sex = next((e.code.removeprefix("sex/") for e in events if e.system == PERSON and e.code != BIRTH), None)
    birth = next((e.time for e in events if e.system == PERSON and e.code == BIRTH), None)
    starts = {e.visit: e.time for e in events if e.system == VISIT and e.code == START and e.time is not None}
    ends = {e.visit: e.time for e in events if e.system == VISIT and e.code == END and e.time is not None}
    found = []
    for visit, start in sorted(starts.items(), key=lambda pair: (pair[1], pair[0])):
        own = [e for e in events if _belongs(e, visit, start, ends.get(visit))]
        diagnoses = _categories(own)
        age = None if birth is None or start < birth else completed_years(birth, start)
        earlier = [e for e in events if e.visit != visit and _known(e, start, ends)]
        opening = Opens(age, sex, _symptoms(own), tuple(sorted(set(_categories(earlier)))))
        asked = _asked(own, opening, f"{seed}\0{events[0].subject}\0{visit}", horizon, panels)
        if diagnoses and asked:
            found.append((opening, *asked, Diagnoses(diagnoses)))
    return found


def _belongs(event: Event, visit: str, start: int, end: int | None) -> bool:
    """Whether an event is of a visit: by its id, or, where it has none, by its time."""
    if event.visit:
        return event.visit == visit
    return event.system == LOINC and event.time is not None and end is not None and start <= event.time <= end


def _known(event: Event, start: int, ends: Mapping[str, int]) -> bool:
    """Whether an event's visit ended before a visit starts; of no visit, whether it was recorded before."""
    time = ends.get(event.visit) if event.visit else event.time
    return time is not None and (time <= start if event.visit else time < start)


def _categories(events: Iterable[Event]) -> tuple[str, ...]:
    """The diseases of three characters, in alphabetical order."""
    codes = {e.code[:3] for e in events if e.system == "icd10" and e.code[:1] not in NOT_DISEASES}
    return tuple(sorted(codes - {""}))


def _symptoms(events: Iterable[Event]) -> tuple[str, ...]:
    return tuple(sorted({e.code for e in events if e.system == "icd10" and e.code.startswith("R")}))


def _asked(events: Iterable[Event], opening: Opens, key: str, horizon: int, panels: bool) -> list[Turn]:
    """The turns in which tests are asked for, drawn by `key`."""
    known: dict[str, dict[str, Event]] = {}  # what can be asked for -> its results: the first of each test
    for event in events:
        meant = interpret_event(event, sex=opening.sex, age=opening.age)
        if event.system == LOINC and (event.value is not None or meant.label != "unknown"):
            name = TESTS[event.code].panel if panels and event.code in TESTS else event.code
            known.setdefault(name, {}).setdefault(event.code, event)
    draw = lambda text: int.from_bytes(hashlib.sha256(f"{key}\0{text}".encode()).digest()[:8], "big")
    count = 1 + draw("") % horizon
    turns: list[Turn] = []
    for name in sorted(known, key=lambda name: (draw(name), name))[:count]:
        turns.append(Asks(name))
        results = sorted(known[name].items())
        turns += [Result(code, event.value, event.unit) for code, event in results]
        turns += [Means(code, interpret_event(e, sex=opening.sex, age=opening.age).word) for code, e in results]
    return turns
