"""Checks that name what is wrong: of shapes and dtypes at trace time, of settings against those of another run."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

KINDS = {"f": jnp.floating, "i": jnp.integer, "b": jnp.bool_}


def expect(*, bind: dict[str, int] | None = None, **arrays) -> dict[str, int]:
    """Check that each array has the dtype kind and axes it claims, the same letter being the same length everywhere.

    Args:
      bind: lengths known before.
      **arrays: name=(array, "f[N, R]"): a kind (f, i or b) and the axes; several forms are joined by "|".

    Returns:
      The length of each axis.

    Raises:
      ValueError: names the argument, what it is and what it should be. None is skipped.

    >>> expect(reward=(jnp.zeros(3), "f[N]"), group=(jnp.zeros(4, int), "i[N]"))
    Traceback (most recent call last):
    ValueError: group is int32[4], expected i[N] with N=3
    """
    axes = dict(bind or {})
    for name, (x, spec) in arrays.items():
        if x is None:
            continue
        if not hasattr(x, "dtype"):
            raise ValueError(f"{name} is a {type(x).__name__}, expected an array {spec}")
        for form in spec.split("|"):
            found = _match(x, form, axes)
            if found is not None:
                axes = found
                break
        else:
            known = ", ".join(f"{k}={v}" for k, v in axes.items() if k in spec)
            what = f"{jnp.result_type(x)}{list(jnp.shape(x))}"
            raise ValueError(f"{name} is {what}, expected {spec}" + (f" with {known}" if known else ""))
    return axes


def _match(x, form: str, axes: dict[str, int]) -> dict[str, int] | None:
    kind, letters = form.strip().rstrip("]").split("[")
    names = [letter.strip() for letter in letters.split(",") if letter.strip()]
    shape = jnp.shape(x)
    if not jnp.issubdtype(jnp.result_type(x), KINDS[kind]) or len(shape) != len(names):
        return None
    found = dict(axes)
    for letter, size in zip(names, shape, strict=True):
        if found.setdefault(letter, size) != size:
            return None
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Dotted name -> both values as JSON text, of every leaf in which two nested dicts differ; "absent" where it is.

    >>> differences({"lr": 0.1, "sampling": {"k": 4}}, {"lr": 0.1, "sampling": {"k": 8}})
    {'sampling.k': ('4', '8')}
    """
    # As JSON: tuples equal lists, NaN equals itself, and 1 differs from 1.0 and True.
    old, new = (dict(_flatten(json.loads(json.dumps(values)))) for values in (before, now))
    pairs = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, JSON text) of every leaf; an empty dict is a leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value, sort_keys=True)
