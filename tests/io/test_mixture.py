"""Mixing sets by weights: how many of each a step takes, in which order, and that a run continues in it."""

import collections
import itertools
import json
import math

import numpy as np
import pytest

import rlalign as ra
from rlalign.envs import sums
from rlalign.io import mixture as module
from rlalign.io.checkpoint import ConfigMismatch
from rlalign.io.data import prompts_at_step
from rlalign.io.identity import run_identity
from rlalign.io.metrics import read_metrics
from rlalign.io.mixture import Mixture, at_step, entries_at_step, mix
from tests.io import graders
from tests.tiny import sums_model, sums_run

SETS = {"a": [f"a{i}" for i in range(5)], "b": [f"b{i}" for i in range(11)], "c": ["c0"]}
WEIGHTS = {"a": 0.5, "b": 3, "c": 1.25}
DECODER = ra.Decoder(sums_model(16))


def visited(mixture, per_step, steps, seed=3):
    return [at_step(mixture, per_step, seed=seed, step=step) for step in range(steps)]


@pytest.mark.parametrize(("size", "per_step"), [(10, 4), (3, 8), (1, 1)])
def test_a_plain_sequence_is_visited_as_ever(size, per_step):
    items = [object() for _ in range(size)]
    for step in range(20):
        chosen = at_step(items, per_step, seed=7, step=step)
        expected = prompts_at_step(size, per_step, seed=7, step=step)
        assert all(x is items[i] for x, i in zip(chosen, expected, strict=True))


@pytest.mark.parametrize("per_step", [1, 2, 8, 37])
def test_no_step_is_off_by_one(per_step):
    total = sum(WEIGHTS.values())
    steps, counts = 400, collections.Counter()
    for chosen in visited(mix(SETS, weights=WEIGHTS), per_step, steps):
        assert len(chosen) == per_step
        step = collections.Counter(item[0] for item in chosen)
        for name, weight in WEIGHTS.items():
            assert abs(step[name] - per_step * weight / total) < 1
        counts += step
    for name, weight in WEIGHTS.items():  # a step's count has a standard deviation of at most 1/2: six of them
        assert abs(counts[name] / steps - per_step * weight / total) < 6 * 0.5 / math.sqrt(steps)


def test_the_expected_share_is_the_weight(monkeypatch):
    """Over offsets on a grid, on which these shares have their ends, the mean is exact, and so are all counts."""
    monkeypatch.setattr(module, "raw_bits", lambda count, seed, key: np.arange(8, dtype=np.uint64)[:count] << 61)
    shares, per_step = (2 / 8, 3 / 8, 3 / 8), 3
    whole, last = module._counts(shares, per_step, seed=0, step=7)
    assert ((whole + last) / 8).tolist() == [per_step * share for share in shares]
    for step in range(8):  # the definition: points u, u + 1, u + 2 on a line that the sets cut
        ends = [0, *itertools.accumulate(per_step * share for share in shares)]
        points = [step / 8 + j for j in range(per_step)]
        inside = [sum(a <= point < b for point in points) for a, b in itertools.pairwise(ends)]
        assert module._counts(shares, per_step, seed=0, step=step)[1].tolist() == inside


def test_equal_weights_that_divide_a_step_leave_nothing_to_chance():
    mixture = mix({"a": "12", "b": "345"}, weights={"a": 7e300, "b": 7e300})
    assert {sum(x in "12" for x in chosen) for chosen in visited(mixture, 6, 50)} == {3}


def test_every_entry_of_a_set_is_visited_once_an_epoch_of_that_set_whatever_the_restarts():
    mixture = mix(SETS, weights=WEIGHTS)
    steps = visited(mixture, 7, 60)
    for name, items in SETS.items():
        mine = [item for step in steps for item in sorted_by_visit(mixture, step, name)]
        epochs = [mine[i : i + len(items)] for i in range(0, len(mine) - len(items) + 1, len(items))]
        assert len(epochs) > 3
        assert all(sorted(epoch) == sorted(items) for epoch in epochs)
        assert len(items) == 1 or len(set(map(tuple, epochs))) > 1
    module.visits.__globals__["_order"].cache_clear()
    for step in (59, 0, 31):  # a resumed run asks for any step first
        assert at_step(mixture, 7, seed=3, step=step) == steps[step]
    assert at_step(mixture, 7, seed=4, step=5) != steps[5]


def sorted_by_visit(mixture, chosen, name):
    """Those of one set: a step keeps their order."""
    return [item for item in chosen if item[0] == name]


def test_the_choice_is_recorded():
    """A resumed run must find the same entries after every upgrade."""
    chosen = [entries_at_step(mix(SETS, weights=WEIGHTS), 5, seed=0, step=step).tolist() for step in (0, 1, 100)]
    assert chosen == [[13, 10, 16, 8, 14], [12, 15, 16, 6, 11], [12, 7, 16, 14, 11]]


def test_sets_have_orders_of_their_own():
    same = list(range(50))
    chosen = at_step(mix({"a": same, "b": same}, weights={"a": 1, "b": 1}), 100, seed=0, step=0)
    first, second = chosen[::2], chosen[1::2]  # spread evenly over the step
    assert sorted(first) == sorted(second) == same
    assert first != second
    alone = at_step(mix({"b": same}, weights={"b": 1}), 50, seed=0, step=0)
    assert alone == second  # whatever it is mixed with


def test_parts_of_a_step_have_their_shares():
    mixture = mix({"a": range(40), "b": range(100, 200)}, weights={"a": 1, "b": 3})
    chosen = np.array(at_step(mixture, 32, seed=0, step=0)) < 100
    assert chosen.reshape(4, 8).sum(axis=1).tolist() == [2, 2, 2, 2]


def test_a_mixture_is_a_sequence():
    mixture = mix(SETS, weights=WEIGHTS)
    whole = [*SETS["a"], *SETS["b"], *SETS["c"]]
    assert len(mixture) == 17
    assert list(mixture) == [mixture[i] for i in range(17)] == whole
    assert (mixture[-1], mixture[-17], mixture[np.int64(5)]) == ("c0", "a0", "b0")
    assert mixture[3:7] == ("a3", "a4", "b0", "b1")
    for index in (17, -18):
        with pytest.raises(IndexError):
            mixture[index]
    assert mixture.summary() == "10.5% a (5), 63.2% b (11), 26.3% c (1)"
    with pytest.raises(AttributeError, match="cannot assign"):
        mixture.shares = (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("sets", "weights", "error", "message"),
    [
        ({}, {}, ValueError, r"mix needs at least one set"),
        ({"a": [1], "b": []}, {"a": 1, "b": 1}, ValueError, r"set 'b' is empty; leave it out"),
        ({"a": [1], "b": [2]}, {"a": 1}, ValueError, r"weights has no 'b' \(present: a\); give each set one"),
        ({"a": [1]}, {}, ValueError, r"weights has no 'a' \(present: none\); give each set one"),
        ({"a": [1]}, {"a": 1, "c": 1}, ValueError, r"weights has 'c', which is no set \(sets: a\); remove it"),
        ({"a": [1]}, {"a": 0}, ValueError, r"weights\['a'\] is 0, must be finite and positive; leave the set out"),
        ({"a": [1]}, {"a": -0.5}, ValueError, r"weights\['a'\] is -0.5, must be finite and positive"),
        ({"a": [1]}, {"a": math.inf}, ValueError, r"weights\['a'\] is inf, must be finite and positive"),
        ({"a": [1]}, {"a": math.nan}, ValueError, r"weights\['a'\] is nan, must be finite and positive"),
        ({"a": Mixture(("b",), ([1],), (1.0,))}, {"a": 1}, TypeError, r"set 'a' is a Mixture itself; mix the sets"),
    ],
)
def test_mixtures_that_are_refused(sets, weights, error, message):
    with pytest.raises(error, match=message):
        mix(sets, weights=weights)


@pytest.mark.parametrize("wrong", [{"per_step": 0}, {"seed": -1}, {"step": -1}])
@pytest.mark.parametrize("items", [[1, 2], mix({"a": [1, 2]}, weights={"a": 1})], ids=["plain", "mixture"])
def test_arguments_out_of_range(items, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, must be at least"):
        at_step(items, **{"per_step": 2, "seed": 0, "step": 0} | wrong)
    with pytest.raises(ValueError, match="num_prompts is 0, must be at least 1"):
        at_step([], 2, seed=0, step=0)


def test_the_identity_of_a_run_sees_weights_names_and_sizes():
    few, more = sums.problems("train")[:4], sums.problems("train")[4:9]

    def identity(sets, weights):
        prompts = mix(sets, weights=weights)
        return json.dumps(run_identity(DECODER, ra.ALGORITHMS["grpo"], {}, prompts, None))

    base = identity({"a": few, "b": more}, {"a": 1, "b": 2})
    assert identity({"a": few, "b": more}, {"a": 2, "b": 4}) == base  # ratios alone count
    moved = {"a": [*few, more[0]], "b": more[1:]}  # the same prompts in the same order
    others = [
        identity({"a": few, "b": more}, {"a": 2, "b": 1}),
        identity({"a": few, "c": more}, {"a": 1, "c": 2}),
        identity({"b": few, "a": more}, {"b": 1, "a": 2}),
        identity({"a": more, "b": few}, {"a": 1, "b": 2}),
        identity(moved, {"a": 1, "b": 2}),
        json.dumps(run_identity(DECODER, ra.ALGORITHMS["grpo"], {}, [*few, *more], None)),
    ]
    assert len({base, *others}) == 7


def run(settings, weights):
    problems = sums.problems("train")
    even = [p for p in problems if p.example["answer"][0] in "02468"]
    odd = [p for p in problems if p.example["answer"][0] in "13579"]
    prompts = mix({"even": even[:30], "odd": odd[:10]}, weights=weights)
    return ra.fit(
        settings,
        decoder=DECODER,
        params=DECODER.init(0),
        prompts=prompts,
        eval_prompts=sums.problems("held-out"),
        reward=graders.even,
        decode=sums.decode,
    )


def test_fit_takes_a_mixture_and_continues_with_no_other(tmp_path):
    settings = sums_run(tmp_path, steps=2)
    run(settings, {"even": 1, "odd": 3})
    rows = read_metrics(tmp_path / "metrics.jsonl")[:-1]
    for row in rows:  # 1 and 3 of 4 in every step
        assert (row["reward/even"] + 3 * row["reward/odd"]) / 4 == pytest.approx(row["reward"])
    assert any(row["reward/even"] != row["reward/odd"] for row in rows)
    with pytest.raises(ConfigMismatch, match=r"mixture\S*: saved .*0\.25.*now .*0\.5"):
        run(settings, {"even": 1, "odd": 1})
