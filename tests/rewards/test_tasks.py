"""GSM8K's numbers and HumanEval's programs."""

import doctest
import inspect
from fractions import Fraction

import pytest

from rlalign.rewards import RewardGuard, tasks
from rlalign.rewards.tasks import ENDS, cut, final_number, gsm8k, humaneval, program_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She pays 3 * 4 = 12 dollars.", 12),
        ("#### 1,234", 1234),
        ("It is 5.\n#### 42 apples, not 7", 42),
        ("#### 3\nQ: next\n#### -4", -4),
        ("#### nothing", None),
        (r"Thus \boxed{1{,}500} of 2000 are left", 1500),
        (r"\boxed{x = \frac{3}{4}} by line 2", Fraction(3, 4)),
        (r"\boxed{\text{about } 7.50\%} or so 9", Fraction(15, 2)),
        (r"first \boxed{1}, then \boxed{2", 2),
        (r"\boxed{none} of 3", None),
        ("It costs $1,234,567.80.", Fraction("1234567.8")),
        ("a profit of -$20", -20),
        ("a change of −3 degrees", -3),
        ("10-7=3", 3),
        ("the years 1990-1995", 1995),
        ("(3)-4", 4),
        ("3, 4, 5", 5),
        ("1, 200", 200),
        ("0.5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("50%", 50),
        ("3/4 of them", Fraction(3, 4)),
        ("1/0", None),
        ("$ 12", 12),
        ("007", 7),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_the_number_that_a_solution_ends_with(text, number):
    assert final_number(text) == number


def test_gsm8k():
    example = {"question": "?", "answer": "He has 2 * 617 = <<2*617=1234>>1234.\n#### 1,234"}
    assert gsm8k("so 1234.00 dollars", example) == 1.0
    assert gsm8k("so 1235", example) == 0.0
    assert gsm8k("I do not know", example) == 0.0
    assert gsm8k("7", {"answer": 7}) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gsm8k("1", {"answer": "none"}), "the reference answer 'none' holds no number"),
        (lambda: gsm8k([1, 2], {"answer": "1"}), "the completion is a list, not a text: give decode="),
    ],
)
def test_what_gsm8k_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples():
    assert doctest.testmod(tasks).failed == 0


ADD = {
    "task_id": "Test/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
RIGHT = [
    "    return a + b\n",
    "    return a + b\n\ndef other(:  # not read",
    "    return a + b\n\nprint('loud')\nassert False",
    "    return a + b\n```\nThat is all.",
    "Sure!\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds `a` and `b`.\n```\nno\n```",
    "```\n    return a + b\n```",
    "import operator\n\ndef add(a, b):\n    return operator.add(a, b)\n",
    "    print('x' * 100000)\n    return a + b",
    "    import atexit; atexit.register(print, 'late'); return a + b",
]
WRONG = [
    "    return a - b\n",
    "    return",
    "    syntax error",
    "",
    "    raise SystemExit(0)",
    "    import os; os._exit(0)",
    "    return a + b + open('/nowhere').read()",
    "    return int(input())",
    "    import os\n    for f in range(3, 20):\n        try:\n            os.write(f, b'0' * 32)\n"
    "        except OSError:\n            pass\n    os._exit(0)",
]


@pytest.fixture(scope="module")
def guard():
    with RewardGuard(humaneval, workers=2, time_limit=30.0) as one:
        yield one


def test_humaneval(guard):
    found = guard([*RIGHT, *WRONG], [ADD] * len(RIGHT + WRONG))
    assert found.reason == ("",) * len(RIGHT + WRONG)
    assert found.reward.tolist() == [1.0] * len(RIGHT) + [0.0] * len(WRONG)


def test_programs_that_hang_or_hoard_are_wrong(guard):
    """The worker goes on, with nothing of theirs in its folder."""
    hang = "    open('left', 'w').write('x')\n    while True:\n        pass"
    hoard = "    x = bytearray(1 << 34)\n    return a + b"
    orphan = "    import subprocess; subprocess.Popen(['sleep', '60']); return a + b"  # holds what it inherits open
    here = "    import os; assert os.listdir() == ['program.py'], os.listdir(); return a + b"
    found = guard([hang, hoard, orphan, here, here], [ADD] * 5)
    assert found.reason == ("",) * 5
    assert found.reward.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_humaneval_runs_in_a_worker_alone():
    with pytest.raises(RuntimeError, match=r"in reward workers only: give it to RewardGuard, score, fit"):
        humaneval(RIGHT[0], ADD)


def test_records_that_are_refused(guard):
    found = guard([RIGHT[0], [1, 2]], [ADD | {"entry_point": "add); evil("}, ADD])
    assert not found.valid.any()
    assert "entry_point 'add); evil(' is no name of a function" in found.reason[0]
    assert "the completion is a list, not a text" in found.reason[1]


def test_where_a_program_ends():
    assert program_of("  x\n\nclass A:", "f") == "  x\n"
    assert program_of("\n  x\n```\nmore\n```", "f") == "\n  x"
    assert program_of("async def f():\n  x\n\ndef g(): ...", "f") == "\nasync def f():\n  x\n\ndef g(): ..."
    assert cut("abc", ()) == cut("abc", ["", "z"]) == "abc"
    assert all(cut(f"x{end} y", ENDS) == "x" for end in ENDS)
    assert inspect.signature(humaneval) == inspect.signature(gsm8k)
