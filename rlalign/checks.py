"""Shape and dtype checks that name the argument, at trace time; nothing broadcasts by accident."""

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
