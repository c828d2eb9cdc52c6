"""One patient's workup: what was asked, what was diagnosed, and what is on record; the same for any asker or model.

    Workup("my model", gold=("E11.9",), ranked=("E11.9", "I10"), belief=(0.8, 0.1), tests=("blood count",), age="40-49")

There is no place in it for an identifier, a date, an exact age or free text, and each field is checked when one is
made. Errors name the field and never the value.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

SEXES = ("female", "male", "other", "unknown")
_ICD = re.compile(r"([A-Z][0-9][0-9A-Z])\.?([0-9A-Z]{0,4})")
_ASKER = re.compile(r"[A-Za-z][A-Za-z0-9 .,+()-]{0,39}")
_TEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9 :./()%+-]{0,79}")
_BAND = re.compile(r"([0-9]{1,2})-([0-9]{1,2})|([1-8]?[0-9]|90)\+")
NARROWEST = 5  # years of an age band
OLDEST = 89  # years; who is older is in a band without an end
MOST = 1000  # entries of a list

Texts = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Workup:
    """What one asker did with one patient, beside what is on record. None: not known, of all patients of an asker.

    Attributes:
      asker: who asked, such as "trained"; what the page names it by.
      gold: the diagnoses on record, ICD-10 codes, with or without the point.
      ranked: the asker's diagnoses, the likeliest first, ten or so.
      belief: the probability of each of them; together at most 1.
      tests: what was asked for, in order; a test inside a panel may be "panel:test".
      orders: what was ordered on record, by the names of `tests`; no asker may see it.
      results, abnormal: how many results the tests brought, and how many of those were low, high or abnormal.
      redundant: how many tests brought only what was known.
      rejects: candidates that reject sampling turned down, or their expected number.
      abstained: no diagnosis was given; `ranked` then counts as empty.
      sex: of SEXES.
      age: a band: "40-49" or "90+", at least five years and no end above 89; or "unknown".
      lists: `ranked` after 0, 1, 2, ... tests; may go on after the asker stopped, for comparison at equal budgets.

    Raises:
      ValueError: a field that is none of this; names the field and the remedy.
    """

    asker: str
    gold: Texts
    ranked: Texts
    belief: tuple[float, ...] | None = None
    tests: Texts | None = None
    orders: Texts | None = None
    results: int | None = None
    abnormal: int | None = None
    redundant: int | None = None
    rejects: float | None = None
    abstained: bool = False
    sex: str | None = None
    age: str | None = None
    lists: tuple[Texts, ...] | None = None

    def __post_init__(self):
        _require("asker", isinstance(self.asker, str) and _ASKER.fullmatch(self.asker), "a name of at most 40 letters")
        _require("gold", bool(self.gold), "at least one code: leave patients without a diagnosis out")
        for name in ("gold", "ranked"):
            object.__setattr__(self, name, _codes(name, getattr(self, name)))
        if self.belief is not None:
            _belief(self.belief, len(self.ranked))
        for name in ("tests", "orders"):
            if (found := getattr(self, name)) is not None:
                _list(name, found, lambda one: isinstance(one, str) and _TEST.fullmatch(one), "names of tests or codes")
        _require("orders", self.orders is None or len(set(self.orders)) == len(self.orders), "each order once")
        self._check_counts()
        _require("abstained", isinstance(self.abstained, bool), "true or false")
        _require("sex", self.sex is None or self.sex in SEXES, f"one of {', '.join(SEXES)}")
        good = self.age in (None, "unknown") or band(self.age) is not None
        _require("age", good, f'a band of {NARROWEST} years or more, such as "40-49" or "90+", or "unknown"')
        if self.lists is not None:
            _list("lists", self.lists, lambda one: isinstance(one, tuple), "lists of codes, one after each test")
            _require("lists", bool(self.lists), "at least the list before any test")
            object.__setattr__(self, "lists", tuple(_codes("lists", one) for one in self.lists))

    def _check_counts(self) -> None:
        for name in ("results", "abnormal", "redundant"):
            value = getattr(self, name)
            _require(name, value is None or (type(value) is int and 0 <= value < 2**31), "a whole number >= 0")
        _require("abnormal", (self.abnormal is None) == (self.results is None), "given together with results")
        _require("abnormal", (self.abnormal or 0) <= (self.results or 0), "at most as many as results")
        _require("redundant", self.redundant is None or self.tests is not None, "given together with tests")
        _require("redundant", (self.redundant or 0) <= len(self.tests or ()), "at most as many as tests")
        _require("rejects", self.rejects is None or (_is_number(self.rejects) and self.rejects >= 0), "a number >= 0")
        _require("rejects", self.rejects is None or self.tests is not None, "given together with tests")


def band(age: Any) -> tuple[int, float] | None:
    """(first year, last year) of an age band, the last one inf for "90+"; None if it is no band.

    >>> band("40-49"), band("90+"), band("43")
    ((40, 49), (90, inf), None)
    """
    found = _BAND.fullmatch(age) if isinstance(age, str) else None
    if found is None:
        return None
    if found[3] is not None:
        return int(found[3]), math.inf
    first, last = int(found[1]), int(found[2])
    return (first, last) if last - first + 1 >= NARROWEST and last <= OLDEST else None


def _require(name: str, good: Any, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {wanted}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list(name: str, found: Any, good: Callable[[Any], Any], wanted: str) -> None:
    _require(name, isinstance(found, tuple) and len(found) <= MOST, f"a list of at most {MOST} {wanted}")
    if wrong := next((place for place, one in enumerate(found, start=1) if not good(one)), None):
        raise ValueError(f"entry {wrong} of {name} is none of {wanted}")


def _codes(name: str, found: Any) -> Texts:
    """The codes with a point after the third character."""
    _list(name, found, lambda one: isinstance(one, str) and _pointed(one), 'ICD-10 codes such as "E11.9"')
    codes = tuple(map(_pointed, found))
    _require(name, len(set(codes)) == len(codes), "each code once")
    return codes


@functools.lru_cache(maxsize=4096)
def _pointed(code: str) -> str:
    """The code with its point; "" if it is none."""
    found = _ICD.fullmatch(code)
    return "" if found is None else ".".join(filter(None, found.groups()))


def _belief(found: Any, many: int) -> None:
    _list("belief", found, lambda one: _is_number(one) and 0 <= one <= 1, "probabilities")
    _require("belief", len(found) == many, "as long as ranked")
    _require("belief", sum(found) <= 1.001, "probabilities of one distribution: together at most 1")
