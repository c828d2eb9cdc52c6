"""Estimates against enumeration, published numbers and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign.evaluation import interval, pass_at_k, share, wilson, win_rate
from rlalign.evaluation.estimates import class_mean, ratio


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_counts_the_subsets_that_hold_a_right_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([i < c for i in range(n)], k))
        np.testing.assert_allclose(pass_at_k(c, n, k), np.mean([any(s) for s in subsets]), rtol=1e-14, atol=0)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.data())
def test_pass_at_k_is_exact_for_many_answers(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)  # of Python's integers
    np.testing.assert_allclose(pass_at_k(np.array([c, 0]), np.array([n, n]), k), [exact, 0.0], rtol=0, atol=1e-12)


def test_pass_at_k_of_problems_with_other_numbers_of_answers():
    got = pass_at_k(np.array([[1, 2], [3, 0]]), np.array([[2, 3], [3, 5]]), 2)
    np.testing.assert_allclose(got, [[1.0, 1.0], [1.0, 0.0]])
    assert pass_at_k(np.zeros(0, int), np.zeros(0, int), 1).shape == (0,)


@pytest.mark.parametrize(
    ("correct", "total", "k", "message"),
    [
        ([1, 1], [4, 2], 3, r"problem \[1\]: correct=1 of total=2; k=3 must be .* at most total: sample more"),
        ([1], [4], 0, "k=0 must be at least 1"),
        ([5], [4], 1, r"problem \[0\]: correct=5 of total=4; correct must lie"),
        ([-1], [4], 1, "correct=-1"),
        ([1.0], [4], 1, r"correct is float64\[1\] and total int64\[1\]: give integers"),
        ([1], [4, 4], 1, "of one shape"),
    ],
)
def test_counts_that_are_refused(correct, total, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(np.array(correct), np.array(total), k)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [  # Newcombe 1998 (Statist. Med. 17, 857), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_numbers(successes, total, low, high):
    got = wilson(successes, total)
    np.testing.assert_allclose(got, (successes / total, low, high), rtol=0, atol=5e-5)
    mirrored = wilson(total - successes, total)
    np.testing.assert_allclose((1 - mirrored.high, 1 - mirrored.low), got[1:], atol=1e-15)


def test_wilson_ends_where_a_test_would_reject():
    """Its ends are the shares p with (p - observed)^2 = z^2 p (1 - p) / n."""
    for end in wilson(7, 31, level=0.9)[1:]:
        np.testing.assert_allclose((end - 7 / 31) ** 2, 1.6448536269514722**2 * end * (1 - end) / 31, rtol=1e-12)


def test_share_of_coins_is_agresti_and_coulls():
    for right in (0, 3, 12):
        got, z = share(np.arange(12) < right), 1.959963984540054
        n, p = 12 + z * z, (right + z * z / 2) / (12 + z * z)
        ends = p - z * math.sqrt(p * (1 - p) / n), p + z * math.sqrt(p * (1 - p) / n)
        np.testing.assert_allclose(got, (right / 12, *np.clip(ends, 0, 1)), rtol=1e-12, atol=1e-15)


def test_share_covers_what_it_should():
    """Means of two coins a prompt, which a coin's interval would cover too often, and coins near 1."""
    rng = np.random.default_rng(0)
    for p, coins in ((0.5, 2), (0.8, 1), (0.9, 2)):
        inside = [e.low <= p <= e.high for e in (share(rng.binomial(coins, p, 60) / coins) for _ in range(2000))]
        assert 0.935 < np.mean(inside) < 0.985
    assert share(np.full(50, 0.5)).high < 0.55 < wilson(25, 50).high


@pytest.mark.parametrize(
    ("values", "level", "half"),  # t quantiles of printed tables times s / sqrt(n)
    [
        ([0.0, 1.0], 0.95, 12.7062047362 * 0.5),
        ([1.0, 2.0, 3.0], 0.95, 4.30265272991 / math.sqrt(3)),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.99, 4.60409487142 * math.sqrt(2.5 / 5)),
        (list(range(31)), 0.9, 1.69726088659 * math.sqrt(np.var(range(31), ddof=1) / 31)),
    ],
)
def test_students_interval(values, level, half):
    mean, low, high = interval(values, level)
    np.testing.assert_allclose((mean, high - mean, mean - low), (np.mean(values), half, half), rtol=1e-9)


def test_one_value_bounds_nothing():
    value, low, high = interval([0.3])
    assert value == 0.3
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(3, 2), "successes=3 of total=2"),
        (lambda: wilson(0, 0), "total >= 1"),
        (lambda: wilson(1, 2, level=95), r"level=95 must lie in \(0, 1\)"),
        (lambda: interval([]), r"f\[N\] with N >= 1, got \[0\]"),
        (lambda: interval([[1.0]]), r"got \[1, 1\]"),
        (lambda: interval([1.0, 2.0], level=1.0), r"level=1.0"),
        (lambda: share([0.5, 1.5]), r"values\[1\] is outside"),
        (lambda: share([math.nan]), r"values\[0\] .* not a number"),
        (lambda: win_rate(np.zeros((2, 3))), r"outcome is f\[2, 3\]"),
        (lambda: win_rate([2.0]), "outside .* 1 won"),
        (lambda: win_rate([1.0, 0.0], prompt=[0]), r"prompt has shape \[1\] for 2"),
        (lambda: win_rate([math.nan, math.nan]), "none of 2 comparisons has a verdict"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_win_rate_by_hand():
    nan = math.nan
    outcome = [[1, 1], [1, 0], [0, 0], [0.5, 1], [nan, 1], [1, nan]]
    got = win_rate(outcome, prompt=[7, 7, 3, 5, 3, 9])
    # Prompt 7: (1 + .5) / 2; 3: 0; 5: .75; what lacks a verdict is left out whole, and prompt 9 with it.
    assert got.rate.value == pytest.approx((0.75 + 0 + 0.75) / 3)
    assert got.rate == share([0.75, 0.0, 0.75])
    assert got[1:] == (0.5, 3, 4, 2)
    once = win_rate([1.0, 0.5, nan])
    assert (once.rate.value, once.prompts, once.left_out) == (0.75, 2, 1)
    assert math.isnan(once.consistency)


def test_a_judge_that_likes_the_first_place_gives_no_rate():
    """Swapped positions: 1/2, never consistent. In one position alone: always won."""
    assert win_rate(np.tile([1.0, 0.0], (20, 1)))[:2] == (share(np.full(20, 0.5)), 0.0)
    assert win_rate(np.ones(20)).rate.value == 1.0


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_the_ratio_of_single_diagnoses_is_a_share(found):
    got, want = ratio(found, np.ones(len(found), int)), share(np.array(found, float))
    np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("of", ["ratio", "class_mean"])
def test_intervals_cover_the_truth(of):
    """4,000 samples of 80 patients with one to three of four diagnoses, found together or not."""
    rng = np.random.default_rng(0)
    prior, found = np.array([0.6, 0.5, 0.3, 0.2]), np.array([0.9, 0.6, 0.4, 0.7])

    def draw(count):
        gold = rng.random((count, 4)) < prior
        gold[~gold.any(axis=1), 0] = True
        lucky = rng.random((count, 1)) < 0.3  # all of a patient's diagnoses go together
        return gold & (lucky | (rng.random((count, 4)) < found)), gold

    def estimate(hit, gold):
        return class_mean(hit, gold) if of == "class_mean" else ratio(hit.sum(axis=1), gold.sum(axis=1))

    truth = estimate(*draw(400_000)).value
    inside = [low <= truth <= high for _, low, high in (estimate(*draw(80)) for _ in range(4000))]
    assert 0.93 < np.mean(inside) < 0.975


@pytest.mark.parametrize(
    "call",
    [
        lambda: ratio([1, 2], [1, 1]),
        lambda: ratio([0, 0], [0, 0]),
        lambda: ratio([1], [1, 1]),
        lambda: ratio([-1, 1], [1, 1]),
        lambda: class_mean(np.zeros((3, 2)), np.array([[1, 0]] * 3)),
        lambda: class_mean(np.zeros((3, 2)), np.ones((3, 3))),
        lambda: class_mean(np.zeros((3, 0)), np.zeros((3, 0))),
    ],
)
def test_ratios_of_nothing_are_refused(call):
    with pytest.raises(ValueError, match="need"):
        call()
