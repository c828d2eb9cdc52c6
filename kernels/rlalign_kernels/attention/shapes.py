"""Named shapes that tests and benchmarks share, and the forests that they stand for."""

from typing import NamedTuple


class GroupShape(NamedTuple):
    """Groups of `samples` responses of length `response` behind a prompt of length `prompt`."""

    prompt: int
    response: int
    samples: int

    @property
    def tokens(self) -> int:
        """Of the forest: P + G R."""
        return self.prompt + self.samples * self.response

    @property
    def pairs(self) -> int:
        """Visible pairs of the forest: (P (P + 1) + G R (2 P + R + 1)) / 2."""
        P, R, G = self
        return (P * (P + 1) + G * R * (2 * P + R + 1)) // 2

    @property
    def repeated_pairs(self) -> int:
        """Visible pairs of the batch that repeats the prompt: G (P + R) (P + R + 1) / 2."""
        P, R, G = self
        return G * (P + R) * (P + R + 1) // 2


class Branch(NamedTuple):
    """`length` tokens in a row, and what goes on behind the last of them."""

    length: int
    children: tuple["Branch", ...] = ()


def group(prompt: int, *responses: int) -> Branch:
    """Responses of these lengths behind one prompt."""
    return Branch(prompt, tuple(map(Branch, responses)))


def masked(*trees: Branch) -> tuple[list[int], list[int]]:
    """(visible_until, position) of one row that holds these trees in depth-first order."""
    until, position = [], []

    def walk(branch: Branch, depth: int) -> None:
        start = len(until)
        until.extend([0] * branch.length)
        position.extend(range(depth, depth + branch.length))
        for child in branch.children:
            walk(child, depth + branch.length)
        until[start : start + branch.length] = [len(until)] * branch.length

    for tree in trees:
        walk(tree, 0)
    return until, position


GROUPS = {
    "tiny": GroupShape(5, 3, 2),
    "short_prompt": GroupShape(1, 129, 3),
    "one_token": GroupShape(7, 1, 4),
    "odd": GroupShape(129, 200, 3),
}

# What benchmarks/attention.py measures on an accelerator, from a short prompt to one that is most of the batch.
MEASURED = {
    "1k": GroupShape(1024, 1024, 8),
    "4k": GroupShape(4096, 1024, 8),
    "8k": GroupShape(8192, 1024, 16),
    "16k": GroupShape(16384, 512, 16),
}

# Rows of trees that are no group of equal responses.
TREES = {
    "ragged": (group(129, 1, 200, 37), group(1, 129, 1)),
    "depth_4": (Branch(11, (Branch(20, (Branch(3, (Branch(29), Branch(1))), Branch(8))), group(7, 5, 2), Branch(17))),),
}

HEADS = {1: (2, 2), 4: (4, 1), 8: (8, 1)}  # query heads a key/value head -> (H, K)
