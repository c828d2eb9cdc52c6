"""Named shapes that tests and benchmarks share."""

from typing import NamedTuple


class GroupShape(NamedTuple):
    """Groups of `samples` responses of length `response` behind a prompt of length `prompt`."""

    prompt: int
    response: int
    samples: int


GROUPS = {
    "tiny": GroupShape(5, 3, 2),
    "short_prompt": GroupShape(1, 129, 3),
    "one_token": GroupShape(7, 1, 4),
    "odd": GroupShape(129, 200, 3),
    "fixed_problem": GroupShape(512, 64, 8),
    "long_prompt": GroupShape(2048, 128, 8),
    "large_group": GroupShape(2048, 128, 16),
}
