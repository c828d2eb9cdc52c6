"""What a traced program holds: its equations and its arrays, however deeply nested."""

import math
from collections.abc import Iterator

import jax


def equations(jaxpr) -> Iterator:
    """Every equation of a (closed) jaxpr and of those inside it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def largest_array(jaxpr) -> tuple[int, ...]:
    """The shape of the largest array that some equation makes."""
    shapes = (getattr(v.aval, "shape", ()) for e in equations(jaxpr) for v in e.outvars)
    return max(shapes, key=math.prod)
