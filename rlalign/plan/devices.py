"""Devices as numbers: what a plan divides by."""

import math
from typing import NamedTuple


class Chip(NamedTuple):
    """One JAX device of a kind.

    Attributes:
      hbm: GiB that a program may take: what libtpu says when it refuses one, or the memory that a GPU reports.
      flops: bfloat16 operations a second, of the data sheet.
      bandwidth: bytes a second from HBM.
      links: bytes a second that arrive from other devices, half of the data sheet's figure for both directions.
      dimensions: of a topology's name: "4x4" has 2; a number of GPUs 1.
      per_chip: JAX devices of one chip of the topology.
      lanes: the last axis of an array is stored in multiples of this.
    """

    hbm: float
    flops: float
    bandwidth: float
    links: float
    dimensions: int
    per_chip: int = 1
    lanes: int = 1


# TPUs: cloud.google.com/tpu/docs, system architecture; hbm as libtpu states it. GPUs: NVIDIA's data sheets (SXM).
CHIPS: dict[str, Chip] = {
    "v5e": Chip(15.75, 197e12, 819e9, 100e9, dimensions=2, lanes=128),
    "v5p": Chip(95.74, 459e12, 2765e9, 300e9, dimensions=3, lanes=128),
    "v6e": Chip(31.25, 918e12, 1640e9, 224e9, dimensions=2, lanes=128),
    "tpu7x": Chip(94.75, 1153e12, 3690e9, 300e9, dimensions=3, per_chip=2, lanes=128),
    "a100": Chip(79.2, 312e12, 2039e9, 300e9, dimensions=1),
    "h100": Chip(79.1, 989e12, 3352e9, 450e9, dimensions=1),
    "h200": Chip(139.8, 989e12, 4800e9, 450e9, dimensions=1),
}


class Topology(NamedTuple):
    """So many devices of one kind."""

    name: str
    chip: Chip
    devices: int


def parse_topology(text: str) -> Topology:
    """The devices that "v5p:2x2x4" or "h100:8" names.

    Raises:
      ValueError: an unknown kind, or a shape that the kind does not come in.

    >>> parse_topology("v5p:2x2x4").devices, parse_topology("tpu7x:2x2x1").devices, parse_topology("h100:8").devices
    (16, 8, 8)
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise ValueError(
            f"topology {text!r}: unknown kind {kind!r}; choose one of {', '.join(CHIPS)}, as in 'v5p:2x2x4'"
        )
    chip, sizes = CHIPS[kind], shape.split("x")
    if len(sizes) != chip.dimensions or not all(size.isdecimal() and int(size) for size in sizes):
        example = {1: "8", 2: "4x4", 3: "2x2x4"}[chip.dimensions]
        raise ValueError(
            f"topology {text!r}: {kind} comes in {chip.dimensions} positive sizes, as in '{kind}:{example}'"
        )
    wrong = [int(size) for size in sizes if chip.dimensions > 1 and int(size) > 2 and (int(size) % 4 or int(size) > 28)]
    if wrong:
        raise ValueError(
            f"topology {text!r}: {kind} has no side of {wrong[0]}: sides are 1, 2 and multiples of 4, to 28"
        )
    return Topology(text, chip, math.prod(map(int, sizes)) * chip.per_chip)
