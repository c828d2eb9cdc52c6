"""What a reward is, what a misbehaving function costs, and what is refused at once."""

import contextlib
import functools
import json
import re
import resource
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from rlalign.rewards import RewardGuard, process, score
from rlalign.types import Prompt, Rollouts

graders = sys.modules["reward_graders"]  # see conftest.py


def run(function, completions, examples=None, **options):
    with RewardGuard(function, **options) as guard:
        return guard(completions, examples or [{}] * len(completions))


# What a reward is


def test_rewards_come_in_order_and_the_function_is_still_a_plain_one():
    texts = [str(number) for number in range(500)]
    examples = [{"scale": 0.1}] * 250 + [{}] * 250
    rewards = run(graders.number, texts, examples)
    expected = [graders.number(text, example) for text, example in zip(texts, examples, strict=True)]
    assert rewards.reward.dtype == np.float64
    np.testing.assert_array_equal(rewards.reward, expected)  # every bit of a float survives
    assert rewards.valid.dtype == bool
    assert rewards.valid.all()
    assert rewards.reason == ("",) * 500


def test_completions_and_examples_arrive_as_they_are():
    value = {"text": 'é\u2028"\\\n', "ids": [1, 2**60], "none": None, "nested": {"a": [True, 1.5]}}
    texts = ['é\u2028"\\\n\x00', "\ud800", ""]
    examples = [types.MappingProxyType({"value": 1.0, "completion": text, "more": value}) for text in texts]
    assert run(graders.echo, texts, examples).reward.tolist() == [1.0, 1.0, 1.0]
    ids = [[3, 4], (3, 4), np.array([3, 4], np.int32)]
    assert run(graders.echo, ids, [{"value": 2, "completion": [3, 4]}] * 3).reward.tolist() == [2.0, 2.0, 2.0]


def test_no_completions_give_no_rewards():
    rewards = run(graders.length, [])
    assert rewards.reward.shape == rewards.valid.shape == (0,)
    assert rewards.reason == ()


def test_large_completions_pass_while_a_worker_is_busy():
    texts = ["x" * size for size in (3_000_000, 1, 2_000_000, 40_000, 40_000, 40_000)] * 3
    rewards = run(graders.length, texts, workers=1)
    assert rewards.reward.tolist() == [len(text) for text in texts]


@pytest.mark.parametrize("value", ["True", "7", "0.5", "-0.0", "type('F', (), {'__float__': lambda self: 2.5})()"])
def test_what_counts_as_a_number(one_guard, value):
    rewards = one_guard([f"value = {value}"], [{}])
    assert rewards.valid.tolist() == [True], rewards.reason
    assert rewards.reward[0] == float(eval(value))


def test_terms_come_by_name_beside_their_total(one_guard):
    code = "value = {'right': 1, 'form': 0.5, 'total': 10.5}"
    other = code.replace("1,", "True,").replace("10.5", "11")
    rewards = one_guard([code, other], [{}] * 2)
    assert rewards.reward.tolist() == [10.5, 11.0]
    assert rewards.valid.all()
    assert list(rewards.terms) == ["right", "form"]
    assert {name: value.tolist() for name, value in rewards.terms.items()} == {"right": [1, 1], "form": [0.5, 0.5]}
    assert one_guard(["value = 1"], [{}]).terms is None
    assert one_guard(["value = {'total': 1}"], [{}]).terms == {}


def test_terms_that_are_not_those_of_the_others_cost_their_item(one_guard):
    codes = ["1 / 0", "value = {'a': 1, 'total': 1}", "value = 2", "value = {'b': 1, 'total': 3}"]
    rewards = one_guard([*codes, "value = {'total': 4, 'a': 2}"], [{}] * 5)
    assert rewards.valid.tolist() == [False, True, False, False, True]
    assert rewards.reason[2:4] == ("gave the terms none, others a", "gave the terms b, others a")
    np.testing.assert_array_equal(rewards.terms["a"], [np.nan, 1, np.nan, np.nan, 2])
    np.testing.assert_array_equal(rewards.reward, [np.nan, 1, np.nan, np.nan, 4])


def test_terms_with_long_names_get_a_short_reason(one_guard):
    codes = [f"value = {{'{name}' * 30_000: 1, 'total': 1}}" for name in "ab"]
    first, second = one_guard(codes, [{}] * 2).reason
    assert (first, second) == ("", f"gave the terms {'b' * 150}, others {'a' * 150}")


# What costs an item

FAILURES = {
    "terms without a total": ("value = {'a': 1.0}", r"returned \{'a': 1\.0\}, terms without 'total' or with names .*"),
    "a name that is no text": ("value = {1: 1.0, 'total': 1}", r"returned \{.*\}, terms without 'total' or .*"),
    "a term that is nan": ("value = {'a': float('nan'), 'total': 1}", r"returned nan, which is not finite \(a\)"),
    "a total that is no number": ("value = {'a': 1, 'total': None}", r"returned None, not a number \(total\)"),
    "raises": ("1 / 0", r"raised ZeroDivisionError: division by zero \(graders\.py:\d+\)"),
    "long message": ("raise ValueError('x\\n' * 10**6)", r"raised ValueError: (x ){149}x \(graders\.py:\d+\)"),
    "long type": ("raise type('E' * 50_000, (Exception,), {})('x')", r"raised E{60}: x \(graders\.py:\d+\)"),
    "long name": ("value = {'a' * 50_000: None, 'total': 1}", r"returned None, not a number \(a{60}\)"),
    "message that raises": (
        "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E",
        r"raised E \(graders\.py:\d+\)",
    ),
    "sys.exit": ("sys.exit(0)", r"raised SystemExit: 0 .*"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", r"raised KeyboardInterrupt .*"),
    "nan": ("value = float('nan')", "returned nan, which is not finite"),
    "inf": ("value = float('-inf')", "returned -inf, which is not finite"),
    "string": ("value = '1.0'", r"returned '1\.0', not a number"),
    "NumPy's string": ("import numpy; value = numpy.str_('1.0')", r"returned .*'1\.0'\)?, not a number"),
    "NumPy's bytes": ("import numpy; value = numpy.bytes_(b'1')", r"returned .*b'1'\)?, not a number"),
    "None": ("value = None", "returned None, not a number"),
    "wrong length": ("value = [1.0, 2.0]", r"returned \[1\.0, 2\.0\], not a number"),
    "complex": ("value = 1j", "returned 1j, not a number"),
    "huge integer": ("value = 10**400", "raised OverflowError: int too large .*"),
    "stack overflow": (
        "sys.setrecursionlimit(10**8)\nclass A:\n    def __getattr__(self, n): return repr(self)\n"
        "    def __repr__(self): return getattr(self, 'x')\nrepr(A())",
        r"(its worker was killed by SIG|raised |took longer).*",
    ),
    "killed": ("os.kill(os.getpid(), signal.SIGSEGV)", "its worker was killed by SIGSEGV"),
    "closes all": ("os.closerange(0, 256)\nwhile True: time.sleep(1)", "its worker was killed by SIGKILL"),
    "huge file": ("open('big', 'wb').truncate(1 << 40)", r"raised OSError: .*File too large.*"),
}


@pytest.mark.parametrize(("code", "reason"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_costs_its_item_only(one_guard, code, reason):
    rewards = one_guard(["value = 1", code, "value = 2"], [{}] * 3)
    assert rewards.valid.tolist() == [True, False, True]
    assert rewards.reward[[0, 2]].tolist() == [1.0, 2.0]
    assert np.isnan(rewards.reward[1])
    assert re.fullmatch(reason, rewards.reason[1]), rewards.reason[1]
    assert len(rewards.reason[1]) < 400


def test_what_the_function_makes_its_worker_call_finite_is_checked_again():
    lie = "import math; math.isfinite = lambda value: True; nan, inf = float('nan'), float('inf'); value = "
    rewards = run(graders.python, [lie + value for value in ("nan", "-inf", "{'a': inf, 'total': 1}", "2")], workers=1)
    assert rewards.valid.tolist() == [False, False, False, True]
    np.testing.assert_array_equal(rewards.reward, [np.nan, np.nan, np.nan, 2])
    assert rewards.reason[:2] == ("returned nan, which is not finite", "returned -inf, which is not finite")
    assert rewards.reason[2] == "returned inf, which is not finite (a)"


@pytest.mark.parametrize(
    "code", ["while True: pass", "time.sleep(60)", "import re; re.match('(a+)+$', 'a' * 60 + 'b')"]
)
def test_a_hang_costs_its_limit_and_itself(code):
    with RewardGuard(graders.python, workers=2, time_limit=0.3) as guard:
        completions = [f"value = {number}" for number in range(40)]
        completions[5] = code
        start = time.monotonic()
        rewards = guard(completions, [{}] * 40)
        assert 0.3 <= time.monotonic() - start < 1.3
        assert rewards.reason[5] == "took longer than 0.3 s"
        assert rewards.valid.tolist() == [number != 5 for number in range(40)]
        assert np.delete(rewards.reward, 5).tolist() == [float(number) for number in range(40) if number != 5]


def test_a_hang_that_catches_every_exception_ends_too():
    start = time.monotonic()
    rewards = run(graders.swallow, ["a"], time_limit=0.3)
    assert rewards.reason == ("took longer than 0.3 s",)
    assert time.monotonic() - start < 3.0


def test_the_limit_is_per_item_and_starts_with_it():
    rewards = run(graders.python, ["time.sleep(0.1); value = 1"] * 16, workers=1, time_limit=0.5)
    assert rewards.valid.all(), rewards.reason


def test_large_completions_behind_a_hang_do_not_block_the_trainer():
    start = time.monotonic()
    completions = ["time.sleep(60)"] + ["value = 1  # " + "x" * 200_000] * 15
    rewards = run(graders.python, completions, workers=1, time_limit=0.5)
    assert time.monotonic() - start < 10.0
    assert rewards.valid.tolist() == [False] + [True] * 15


def test_nothing_but_hangs_comes_back_without_rewards():
    rewards = run(graders.python, ["time.sleep(60)"] * 4, workers=2, time_limit=0.1)
    assert rewards.reason == ("took longer than 0.1 s",) * 4


def test_processes_that_a_function_forks_are_allowed():
    code = "child = os.fork()\nif not child: os._exit(3)\nvalue = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])"
    returns = "child = os.fork()\nvalue = 1\nif child: os.waitpid(child, 0); value = 2"
    assert run(graders.python, [code, returns, code], workers=1).reward.tolist() == [3.0, 2.0, 3.0]


def test_a_leak_costs_an_item_and_then_a_fresh_worker_goes_on():
    rewards = run(graders.hoard, [""] * 8, workers=1, memory_limit_gib=0.07, time_limit=10.0)
    assert rewards.reason.count("") == 6, rewards
    assert rewards.reward[rewards.valid].tolist() == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("line", ['"hello"', f"[0, 1{'0' * 400}, 0, 0]", "[Infinity, 0, 0, 0]", "[" * 60_000])
def test_a_function_that_writes_to_the_channel_loses_its_item(line):
    rewards = run(graders.stray, ["fine", line, "fine"], workers=1)
    assert rewards.valid.tolist() == [True, False, True]
    assert rewards.reason[1] == "wrote to the channel of its worker"


WORST = {
    "while True: os.fork()": "raised RuntimeError: a reward may fork 64 processes, and those may fork none",
    "value = len(bytearray(2 << 30))": "raised MemoryError",
    "def f(): return f()\nf()": "raised RecursionError",
    "os._exit(0)": "its worker exited with status 0",
    "line = 'x' * (1 << 20)\nfor _ in range(1024): print(line)\nos.write(2, b'x'); value = 1": "",
}


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def most_resident():
    """A list of what `resident` said, looked up all the time."""
    found, over = [resident()], threading.Event()

    def look():
        while not over.wait(0.005):
            found.append(resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found.append(resident())


def test_the_worst_of_items_cost_themselves_and_the_trainer_does_not_grow(capfd):
    codes = [code for worst in WORST for code in ("value = 2", worst)]
    with RewardGuard(graders.python, workers=1, time_limit=30.0) as guard:
        assert guard(["value = 1"] * 10, [{}] * 10).valid.all()
        with most_resident() as sizes:
            rewards = guard(codes, [{}] * len(codes))
        assert max(sizes) - sizes[0] < 50_000_000
    assert rewards.valid.tolist() == [True, False] * 4 + [True, True]
    assert rewards.reward[rewards.valid].tolist() == [2.0] * 5 + [1.0]
    for reason, expected in zip(rewards.reason[1::2], WORST.values(), strict=True):
        assert reason.startswith(expected)
    assert capfd.readouterr() == ("", "")


# What is refused at once


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (graders.nameless, r"the reward <lambda> in reward_graders is a lambda; .* def it at the top level"),
        (graders.make(), r"the reward make\.<locals>\.inner in .* is a closure, defined inside a function; "),
        (graders.Grader().method, r"is not what the name reward_graders\.Grader\.method leads to; "),
        (graders.Grader(), r"is not what the name reward_graders\.Grader leads to; "),
        (functools.partial(graders.number, example={}), r"is not what the name functools\.partial leads to; "),
        (3, r"the reward 3 is not what the name .* leads to"),
    ],
)
def test_a_function_that_no_worker_can_find_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        RewardGuard(function)


def test_a_static_method_is_fine():
    assert run(graders.Grader.static, [""]).reward.tolist() == [2.0]


def test_a_function_typed_in_at_a_prompt_is_refused(monkeypatch):
    prompt = types.ModuleType("__main__")
    exec("def typed(completion, example): return 1.0", prompt.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", prompt)
    with pytest.raises(ValueError, match=r"the reward typed was typed into an interactive session; .* and import it"):
        RewardGuard(prompt.typed)


def test_a_worker_starts_no_workers(monkeypatch):
    monkeypatch.setenv(process.INSIDE, "1")
    with pytest.raises(RuntimeError, match="a worker must not start workers of its own"):
        RewardGuard(graders.length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_limit": 0}, "time_limit is 0; it must be positive and finite"),
        ({"time_limit": float("nan")}, "time_limit is nan; it must be positive"),
        ({"workers": 0}, "workers is 0; it must be positive"),
        ({"memory_limit_gib": -1}, "memory_limit_gib is -1; it must be positive"),
        ({"start_limit": -1.0}, r"start_limit is -1\.0; it must be positive"),
    ],
)
def test_limits_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RewardGuard(graders.length, **options)


@pytest.mark.parametrize(
    ("completion", "example", "message"),
    [
        (
            "a",
            {"answer": np.arange(2)},
            r"example 1, field 'answer': Object of type ndarray is not JSON serializable; ",
        ),
        ("a", {"answer": {1}}, r"example 1, field 'answer': Object of type set is not JSON serializable; "),
        (
            "a",
            {3: "x"},
            r"example 1, field 3: its name is not a text; a reward's example must be a mapping of JSON values",
        ),
        ("a", ["x"], r"example 1 is a list; a reward's example must be a mapping of JSON values"),
        ("a", None, r"example 1 is a NoneType; "),
        (3.5, {}, r"completion 1 is 3\.5, neither a text nor token ids"),
        ([1.5], {}, r"completion 1 is \[1\.5\], neither a text nor token ids"),
    ],
)
def test_an_item_that_cannot_be_sent_is_refused_by_name(one_guard, completion, example, message):
    with pytest.raises(ValueError, match=message):
        one_guard(["value = 1", completion], [{}, example])
    with pytest.raises(ValueError, match="1 completions but 2 examples; give one for each"):
        one_guard(["a"], [{}, {}])


# score


def rollouts(tokens, mask, prompt):
    tokens, mask = np.array(tokens, np.int32), np.array(mask, bool)
    zeros = np.zeros(tokens.shape, np.float32)
    return Rollouts(tokens, mask, zeros, zeros, np.zeros(len(tokens), np.int32), np.array(prompt, np.int32))


SAMPLES = rollouts([[7, 8, 9], [7, 8, 2], [5, 0, 0]], [[1, 1, 0], [1, 0, 1], [0, 0, 0]], [1, 0, 1])
IDS = [[7, 8], [7, 2], []]


def test_score_gives_every_sample_the_example_of_its_prompt():
    prompts = [Prompt(id=9 - n, tokens=np.array([1]), example={"value": 1.0 + n}) for n in range(2)]
    with RewardGuard(graders.echo, workers=1) as guard:
        assert score(guard, prompts, SAMPLES).reward.tolist() == [2.0, 1.0, 2.0]


def test_score_hands_ids_or_decoded_texts():
    prompts = [np.array([1, 2]), [3]]
    with RewardGuard(graders.length, workers=1) as guard:
        assert score(guard, prompts, SAMPLES).reward.tolist() == [2.0, 2.0, 0.0]
        longer = score(guard, prompts, SAMPLES, decode=lambda ids: "x" * sum(ids))
        assert longer.reward.tolist() == [15.0, 9.0, 0.0]
    with RewardGuard(graders.length, workers=1, decode=lambda ids: "x" * 5) as guard:
        assert score(guard, prompts, SAMPLES).reward.tolist() == [5.0, 5.0, 5.0]
        assert score(guard, prompts, SAMPLES, decode=lambda ids: "").reward.tolist() == [0.0, 0.0, 0.0]


def test_score_takes_a_plain_function():
    rewards = score(graders.length, [[1], [2]], SAMPLES, decode=json.dumps, workers=1, time_limit=1.0)
    assert rewards.reward.tolist() == [len(json.dumps(ids)) for ids in IDS]


def test_a_decoder_that_raises_costs_its_item():
    def decode(ids):
        return {(7, 8): "a", (): ""}[tuple(ids)]

    rewards = score(graders.length, [[1], [2]], SAMPLES, decode=decode, workers=1)
    assert rewards.valid.tolist() == [True, False, True]
    assert rewards.reason[1].startswith("decode raised KeyError: (7, 2) (test_guard.py:")


def test_score_refuses_a_sample_of_no_prompt():
    with (
        RewardGuard(graders.length, workers=1) as guard,
        pytest.raises(ValueError, match="has 1, but there are 1 prompts"),
    ):
        score(guard, [[1]], SAMPLES)
