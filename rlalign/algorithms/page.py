"""The page to choose an algorithm by: python -m rlalign.algorithms.page > docs/algorithms.md"""

import functools
from collections.abc import Callable, Mapping

from rlalign.algorithms import ALGORITHMS, DATA, Algorithm
from rlalign.losses import importance_weight

HEAD = """# Which algorithm

One row an entry of `rlalign.ALGORITHMS`; `get_algorithm(name)` gives it, `dataclasses.replace` changes it. Written by
`python -m rlalign.algorithms.page` from the entries themselves. r: reward, A: advantage, f: importance ratio
pi / pi_old, L: log-ratio to the reference summed over a response, sig: sigmoid. The last table has the settings; those
that a row does not show are the defaults of the functions that it names.
"""


def _call(function: Callable | None) -> str:
    """`name(option=value)` of a function or a partial; the options that hold None are left out."""
    if function is None:
        return ""
    if not isinstance(function, functools.partial):
        return function.__name__
    options = ", ".join(f"{k}={v!r}" for k, v in function.keywords.items() if v is not None)
    return f"{function.func.__name__}({options})"


def _settings(algorithm: Algorithm) -> str:
    parts = [_call(algorithm.advantage), _call(algorithm.loss)]
    if algorithm.data in ("rollouts", "demonstrations"):
        parts.append(f"aggregate={algorithm.aggregate!r}")
    if algorithm.kl_coef > 0:
        parts.append(f"kl_coef={algorithm.kl_coef} ({algorithm.kl_kind})")
    if algorithm.entropy_coef > 0:
        parts.append(f"entropy_coef={algorithm.entropy_coef}")
    if algorithm.data == "rollouts" and algorithm.correction is not importance_weight:
        parts.append(f"correction={_call(algorithm.correction) or None}")
    if algorithm.needs:
        parts.append(f"needs {', '.join(algorithm.needs)}")
    if algorithm.optional:
        parts.append(f"takes {', '.join(algorithm.optional)}")
    return ", ".join(f"`{part}`" for part in parts if part)


def algorithms_page(algorithms: Mapping[str, Algorithm] = ALGORITHMS) -> str:
    """Markdown: one table for each kind of data, one row an algorithm.

    Raises:
      ValueError: an entry without `about`.
    """
    out = [HEAD]
    for data, meaning in DATA.items():
        rows = {name: a for name, a in algorithms.items() if a.data == data}
        if not rows:
            continue
        out += [f"## {data.capitalize()}: {meaning}\n", *_table("formula and source", "when", "cost", "trap")]
        for name, algorithm in rows.items():
            if algorithm.about is None:
                raise ValueError(f"algorithm {name!r} has no `about`: give it one to list it")
            formula, source, *rest = algorithm.about
            out.append(_row(name, f"{formula}<br>{source}", *rest))
        out.append("")
    out += ["## Settings\n", *_table("what it is made of")]
    out += [_row(name, _settings(algorithm)) for name, algorithm in algorithms.items()]
    return "\n".join([*out, ""])


def _table(*columns: str) -> list[str]:
    return ["| name | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]


def _row(name: str, *cells: str) -> str:
    return f"| `{name}` | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(algorithms_page(), end="")
