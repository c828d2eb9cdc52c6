"""How reasoning uses its case, by cheap rules of ours: reported beside CRPO's terms, and weighted 0 by default.

The paper (arXiv 2512.00601) judges evidence, unsupported claims and the discussion of options by language models; see
rlalign.evaluation.reasoning for that. These rules count words, and see no negation and no synonym.
"""

import re
from collections.abc import Mapping

from rlalign.rewards.clinical.text import LABEL, question_terms, words

REPORTED = ("citation", "unsupported", "coverage")
# A number, and a unit that follows it directly or behind one space.
NUMBER = re.compile(
    r"(?<![^\W_])(\d++(?:[.,]\d++)*+)\s?"
    r"(%|°\s?[CF]?|(?:mm\s?hg|[mcdkµμn]?(?:g|mol|l|m|eq|s|u|iu|pa)|bpm|min|h|(?:day|week|month|year)s?)"
    r"(?:/(?:[mcdµμ]?l|min|kg|day|h|mm3))?(?![^\W_]))?",
    re.IGNORECASE,
)


def reported(dx: str, question: str, options: Mapping[str, str]) -> dict[str, float]:
    """What dx does with the question and the options.

    Args:
      dx: the reasoning; empty gives 0 throughout.
      question: the case.
      options: letter -> text.

    Returns:
      citation: the share of the question's evidence that dx takes up, in [0, 1]: of its numbers with their units, and
        of its other content terms (findings). A number counts where dx gives it the same unit or none.
      unsupported: the share of dx's numbers that the question does not hold, in [0, 1].
      coverage: the share of the options whose words all stand in dx, in [0, 1].

    >>> case = "Temperature 39.5 °C, pulse 110/min, stiff neck"
    >>> reported("Stiff neck at 39.5 °C, white cells 12000", case, {"A": "Stiff man", "B": "Neck"})
    {'citation': 0.5, 'unsupported': 0.5, 'coverage': 0.5}
    """
    if not dx:
        return dict.fromkeys(REPORTED, 0.0)
    said, asked = set(words(dx)), numbers(question)
    claimed = numbers(LABEL.sub(" ", dx))
    values = {value for value, _ in claimed}
    bare = {value for value, unit in claimed if not unit}
    cited = sum(number in claimed or (number[0] in bare) or (not number[1] and number[0] in values) for number in asked)
    findings = {term for term in question_terms(question) if term.isalpha()}
    evidence = len(asked) + len(findings)
    known = {value for value, _ in asked}
    named = [all(word in said for word in found) for text in options.values() if (found := words(text))]
    return {
        "citation": (cited + len(findings & said)) / evidence if evidence else 0.0,
        "unsupported": len(values - known) / len(values) if values else 0.0,
        "coverage": sum(named) / len(options) if options else 0.0,
    }


def numbers(text: str) -> set[tuple[str, str]]:
    """Each different number of a text with its unit, "" without.

    >>> sorted(numbers("BP 120/80 mm Hg, 1,200 mg"))
    [('120', ''), ('1200', 'mg'), ('80', 'mmhg')]
    """
    return {
        (value.replace(",", "").rstrip("."), "".join(unit.split()).casefold()) for value, unit in NUMBER.findall(text)
    }
