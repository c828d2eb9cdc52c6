"""A tokenizer of whole words, for environments whose texts are made of a small closed vocabulary."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

PAD, EOS = 0, 1
_TIGHT = re.compile(r" ([\].,;:?!)])| ?(\[) ?|(\() ")  # no space before, around, behind


def words(text: str) -> list[str]:
    """Words, numbers and punctuation marks of a text.

    >>> words("click[item 12]"), words("look, apple 1!")
    (['click', '[', 'item', '12', ']'], ['look', ',', 'apple', '1', '!'])
    """
    return re.findall(r"\w+|[^\w\s]", text)


def vocabulary(texts: Iterable[str]) -> tuple[str, ...]:
    """The sorted words of texts in which "%s" stands for others."""
    return tuple(sorted({word for text in texts for word in words(text.replace("%s", " "))}))


def phrases(texts: Iterable[str]) -> tuple[str, ...]:
    """The sorted pieces of several words that texts have between the places of others, "%s".

    >>> phrases(["you see %s.", "take the %s from the %s", "look"])
    ('from the', 'take the', 'you see')
    """
    pieces = {" ".join(words(piece)) for text in texts for piece in text.split("%s")}
    return tuple(sorted(piece for piece in pieces if " " in piece))


class Words:
    """Words, numbers and punctuation marks as tokens; upper case becomes lower.

    Args:
      vocabulary: all that texts can hold, such as house.VOCABULARY. An entry of several words is one token wherever
        they come in a row: from the left, of those that begin alike the longest, though its rest may then be unknown.

    Raises:
      ValueError: an entry that is empty or comes twice.

    >>> words = Words(["go to", "go", "fridge", "1", "."])
    >>> words.encode("go to fridge 1.").tolist()
    [2, 4, 5, 6]
    >>> words.decode([2, 4, 5, 6, EOS])
    'go to fridge 1.'
    """

    def __init__(self, vocabulary: Sequence[str]):
        self._words = [" ".join(words(entry.lower())) for entry in vocabulary]
        self._ids = {word: number for number, word in enumerate(self._words, start=EOS + 1)}
        if isinstance(vocabulary, str) or "" in self._ids:
            raise ValueError(f"the vocabulary {vocabulary!r:.80} must be a list of words, none of them empty")
        if len(self._ids) != len(self._words):
            twice = next(word for word in self._words if self._words.count(word) > 1)
            raise ValueError(f"the vocabulary holds a word twice, {twice!r}: give each once")
        phrases = sorted((word for word in self._words if " " in word), key=len, reverse=True)
        self._piece = re.compile("|".join([*(rf"{re.escape(phrase)}(?= |$)" for phrase in phrases), r"\S+"]))
        self._known: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        """Ids, padding and end included."""
        return len(self._words) + EOS + 1

    def encode(self, text: str) -> np.ndarray:
        """i32[P] of a text.

        Raises:
          ValueError: a word outside the vocabulary.
        """
        if text not in self._known:
            if len(self._known) > 1 << 16:  # texts repeat in such environments
                self._known.clear()
            pieces = self._piece.findall(" ".join(words(text.lower())))
            if unknown := [piece for piece in pieces if piece not in self._ids]:
                raise ValueError(f"{unknown[0]!r} in {text!r:.80} is not in the vocabulary of {len(self._words)} words")
            self._known[text] = np.array([self._ids[piece] for piece in pieces], np.int32)
            self._known[text].flags.writeable = False  # it is given out again
        return self._known[text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without padding and end; "?" for those of a model with more than there are words."""
        text = " ".join(self._words[i - EOS - 1] if i < len(self) else "?" for i in map(int, ids) if i > EOS)
        return _TIGHT.sub(lambda found: found[1] or found[2] or found[3], text)
