"""Algorithms as data: an advantage, a loss and vetted defaults. Adding one is a function, a line here and an oracle.

    ALGORITHMS["grpo"]
    dataclasses.replace(ALGORITHMS["grpo"], advantage=my_advantage)

algorithm.py  what an entry is          registry.py  the papers' entries          parity.py  TRL's and verl's readings
"""

from rlalign.algorithms.algorithm import DATA, NEEDS, About, Algorithm, try_out
from rlalign.algorithms.parity import PARITY
from rlalign.algorithms.registry import PAPERS

ALGORITHMS: dict[str, Algorithm] = {**PAPERS, **PARITY}


def get_algorithm(name: str) -> Algorithm:
    """The entry of that name.

    Raises:
      ValueError: unknown name, with those there are.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


__all__ = ["ALGORITHMS", "DATA", "NEEDS", "About", "Algorithm", "get_algorithm", "try_out"]
