"""The table of BUILD.md: 48 faults, each with tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def table() -> dict[int, list[str]]:
    """fault -> its tests, from the section "Faults held"."""
    section = (ROOT / "BUILD.md").read_text().split("## Faults held")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \|([^|]+)\|([^|]+)\|$", section, re.MULTILINE)
    assert len({number for number, _, _ in rows}) == len(rows)
    return {int(number): re.findall(r"`([^`]+)`", tests) for number, what, tests in rows if what.strip()}


def missing(name: str) -> bool:
    """Whether there is no such file, or no such function in it."""
    file, _, function = name.partition("::")
    path = ROOT / "tests" / file
    if not path.is_file():
        return True
    return function not in {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_tests_that_exist():
    faults = table()
    assert sorted(faults) == list(range(1, 49))
    assert all(faults.values())
    assert not {number: gone for number, tests in faults.items() if (gone := [t for t in tests if missing(t)])}


def test_a_test_that_is_not_there_is_missed():
    assert missing("faults/test_table.py::test_nothing")
    assert missing("faults/none.py::table")
    assert not missing("faults/test_table.py::table")
