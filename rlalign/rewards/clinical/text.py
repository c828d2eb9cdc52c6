"""What the rules of clinical rewards read off a text: boxes, sections, words and terms. Time is linear in the text."""

import functools
import re
import string
from typing import NamedTuple

LETTERS = frozenset(string.ascii_uppercase)
BOX = "\\boxed"
EFFECTIVE = (string.ascii_letters + string.digits + string.punctuation + " \n").encode()
WORD = re.compile(r"[^\W_]++")  # letters and digits
A_BOX = re.compile(r"\\boxed(?:\{[^{}]*+\})?")
LABEL = re.compile(r"System ([12])(?!\d)")
BOX_IN_A_LINE = re.compile(r"\\boxed\{[^}\n]*+(\})?")  # what stays open to the end of its line is none
LEAST_LETTERS = 4  # of a content term without a digit
KEPT = 1 << 14  # characters of a question whose terms are kept
# Of words that are long enough to be content terms, those that carry none.
STOP_WORDS = frozenset(
    WORD.findall(
        "about above after again against almost already also although always among another around because been "
        "before being below between both cannot could does doing done down during each either else even ever every "
        "following from further have having hence here hers herself himself however indeed instead into itself just "
        "least less like likely made make many might more most much must myself near neither never next none "
        "nothing often once only onto other others ought ours ourselves over perhaps quite rather same several "
        "shall should since some such than that their theirs them themselves then there therefore these they this "
        "those though through thus together toward towards under unless until upon very were what whatever when "
        "where whereas whether which while whom whose will with within without would your yours yourself yourselves"
    )
)


class Sections(NamedTuple):
    """The two inner texts of an answer."""

    dx: str
    conclusion: str


def words(text: str) -> list[str]:
    """Case-folded runs of letters or digits.

    >>> words("T 38.5, Fever_now")
    ['t', '38', '5', 'fever', 'now']
    """
    return WORD.findall(text.casefold())


def terms(text: str) -> set[str]:
    """Content terms: words of four letters or more that are no stop words, and those with a digit; not those of boxes.

    >>> sorted(terms("With B12 so low, anemia: \\\\boxed{C1}"))
    ['anemia', 'b12']
    """
    found = set(words(without_boxes(text)))
    return {word for word in found if not word.isalpha() or (len(word) >= LEAST_LETTERS and word not in STOP_WORDS)}


def question_terms(question: str) -> frozenset[str]:
    """terms, found once for the many answers to a question."""
    return _kept_terms(question) if len(question) <= KEPT else frozenset(terms(question))


@functools.lru_cache(maxsize=256)
def _kept_terms(question: str) -> frozenset[str]:
    return frozenset(terms(question))


def without_boxes(text: str) -> str:
    """The text without \\boxed{...}, and without a \\boxed that has no braces."""
    return A_BOX.sub(" ", text) if BOX in text else text


def boxed_letter(text: str) -> str | None:
    """The option letter of the only box of a text; None where there is no box, several, or no letter in it.

    >>> boxed_letter("So \\\\boxed{B}."), boxed_letter("\\\\boxed{A} \\\\boxed{B}"), boxed_letter("\\\\boxed{fever}")
    ('B', None, None)
    """
    if text.count(BOX) != 1:
        return None
    inside = inside_box(text)
    return inside.strip() if inside is not None and inside.strip() in LETTERS else None


def inside_box(text: str, *, line: bool = False) -> str | None:
    """What the first \\boxed{...} holds, closed on its line if asked for; None where no braces follow directly."""
    start = text.find(BOX) + len(BOX)
    if text[start : start + 1] != "{":
        return None
    end = text.find("}", start)
    if end < 0 or (line and "\n" in text[start:end]):
        return None
    return text[start + 1 : end]


def sections(text: str) -> Sections | None:
    """The inner texts of <dx>...</dx><conclusion>...</conclusion>; None where they are not there as they should.

    Each tag occurs exactly once and in this order, and between the two sections is nothing but white space.
    """
    places = []
    for tag in ("<dx>", "</dx>", "<conclusion>", "</conclusion>"):
        if text.count(tag) != 1:
            return None
        places += [text.find(tag), text.find(tag) + len(tag)]
    _, begin, end, behind, before, start, stop, _ = places
    if places != sorted(places) or text[behind:before].strip():
        return None
    return Sections(text[begin:end], text[start:stop])


def has_both_systems(dx: str) -> bool:
    """Whether the label "System 1", and behind it "System 2", occur; "System 10" is none."""
    labels = [found[1] for found in LABEL.finditer(dx)]
    return "1" in labels and "2" in labels[labels.index("1") :]


def refers_back(dx: str, conclusion: str, question: str) -> bool:
    """Whether a conclusion refers back to the reasoning before it, in words of its own: our rule, the paper has none.

    At least 2 distinct content terms of the conclusion occur in dx, one of them also in the question (unless that is
    empty); the conclusion does not occur inside dx as it stands, and has at most 60% of its length. The labels of the
    sections are no terms. It is a rule of words, not of sense: two of the question's words, said in both, are enough.
    """
    if 5 * len(conclusion.strip()) > 3 * len(dx.strip()):
        return False
    shared = terms(LABEL.sub(" ", conclusion)).intersection(words(without_boxes(LABEL.sub(" ", dx))))
    if len(shared) < 2 or (question.strip() and shared.isdisjoint(question_terms(question))):
        return False
    return _even(conclusion) not in _even(dx)


def _even(text: str) -> str:
    """Case-folded, white space collapsed, without boxes."""
    return " ".join(without_boxes(text).casefold().split())


def effective_share(text: str) -> float:
    """The share of characters that are ASCII letters, digits, punctuation, space or newline; 0 of an empty text.

    >>> effective_share("ab\\tЖ")
    0.5
    """
    seen = text.encode("ascii", "ignore")
    return (len(seen) - len(seen.translate(None, EFFECTIVE))) / len(text) if text else 0.0
