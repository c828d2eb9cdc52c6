"""What is counted of option letters: the majority's vote, and accuracy with the share that could be read."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence


def majority_vote(letters: Iterable[str | None]) -> str | None:
    """The letter that most samples of one question gave: CRPO's inference (arXiv 2512.00601).

    None, an answer that could not be read, does not vote; ties go to the letter seen first; no vote gives None.

    >>> majority_vote(["C", None, "A", "A", "C"]), majority_vote([None])
    ('C', None)
    """
    votes = collections.Counter(letter for letter in letters if letter is not None)
    return max(votes, key=votes.__getitem__, default=None)  # in the order of first sight, of which max takes the first


@dataclasses.dataclass(frozen=True)
class LetterAccuracy:
    """How many of N answers could be read, and are right.

    Attributes:
      correct, valid, total: counts.
    """

    correct: int
    valid: int
    total: int

    @property
    def valid_ratio(self) -> float:
        """Share that could be read."""
        return self.valid / self.total

    @property
    def of_all(self) -> float:
        """Share of all that are right: what could not be read is wrong."""
        return self.correct / self.total

    @property
    def of_valid(self) -> float:
        """Share of those that could be read which are right; 0 where none could."""
        return self.correct / self.valid if self.valid else 0.0


def letter_accuracy(letters: Sequence[str | None], answers: Sequence[str]) -> LetterAccuracy:
    """Counts letters against the right ones.

    Args:
      letters: of boxed_letter or majority_vote; None where there is none.
      answers: as many.

    Raises:
      ValueError: other numbers of both, or none.

    >>> found = letter_accuracy(["A", None, "C"], ["A", "B", "D"])
    >>> found.valid_ratio.__round__(2), found.of_valid, found.of_all.__round__(2)
    (0.67, 0.5, 0.33)
    """
    if len(letters) != len(answers) or not answers:
        raise ValueError(f"{len(letters)} letters for {len(answers)} answers: give as many, at least one")
    valid = sum(letter is not None for letter in letters)
    return LetterAccuracy(sum(map(str.__eq__, map(str, letters), answers)), valid, len(answers))
