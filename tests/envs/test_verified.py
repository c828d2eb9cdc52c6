"""Demonstrations and preferences of known quality: what is right, what is wrong, how much of it, and in which split."""

import itertools
import json
import re
import sys
import zlib

import numpy as np
import pytest

import rlalign as ra
from rlalign.envs import sums, verified
from rlalign.io.examples import read_preferences


def is_right(prompt, tokens):
    """From the tokens alone: the digits, least significant first, are those of the sum, and the end follows."""
    a, b = re.fullmatch(r"(\d\d)\+(\d\d)=", sums.decode(prompt.tokens)).groups()
    digits = [int(i) - 2 for i in tokens[:-1]]
    return tokens[-1] == sums.EOS and sum(d * 10**k for k, d in enumerate(digits)) == int(a) + int(b)


def answers(prompt, tokens):
    return "".join(str(i - 2) for i in tokens[:-1]), prompt.example["answer"]


def test_splits_are_disjoint_and_those_of_before():
    split = {name: {p.id for p in sums.problems(name)} for name in verified.SPLITS}
    assert split["policy"] | split["reward"] == split["train"]
    for one, other in itertools.combinations(("policy", "reward", "held-out"), 2):
        assert not split[one] & split[other]
    assert split["train"] | split["held-out"] == set(range(10_000))
    assert split["held-out"] == {n for n in range(10_000) if zlib.crc32(f"{n // 100}+{n % 100}".encode()) % 10 == 0}
    assert 1_600 < len(split["reward"]) < 2_000
    with pytest.raises(ValueError, match="split must be one of train, policy, reward, held-out, got 'test'"):
        sums.problems("test")


def test_right_answers_are_chosen_and_wrong_ones_rejected():
    pairs = sums.preferences("reward")
    assert [p.prompt.id for p in pairs] == [p.id for p in sums.problems("reward")]
    assert all(is_right(p.prompt, p.chosen) and not is_right(p.prompt, p.rejected) for p in pairs)
    assert {p.rejected.size for p in pairs} == {sums.ANSWER_TOKENS}
    for p in pairs:
        assert sum(x != y for x, y in zip(*answers(p.prompt, p.rejected), strict=True)) == 1


def test_a_forgotten_carry():
    """Each column is right by itself; where nothing is carried, one digit slips."""
    carried = 0
    for p in sums.preferences("held-out", kind="carry"):
        a, b = divmod(p.prompt.id, 100)
        forgotten = [(a % 10 + b % 10) % 10, (a // 10 + b // 10) % 10, 0]
        written, right = answers(p.prompt, p.rejected)
        if a % 10 + b % 10 > 9 or a // 10 + b // 10 > 9:
            carried += 1
            assert [int(letter) for letter in written] == forgotten
        else:
            assert sum(x != y for x, y in zip(written, right, strict=True)) == 1
    assert carried > 500


def test_answers_of_other_sums():
    wrong = [answers(p.prompt, p.rejected)[0] for p in sums.preferences("held-out", kind="any")]
    assert all(0 <= int(text[::-1]) <= 198 for text in wrong)
    assert len(set(wrong)) > 150
    with pytest.raises(ValueError, match="kind must be 'digit', 'carry' or 'any', got 'word'"):
        sums.preferences("held-out", kind="word")


def flips(share, **options):
    return np.array([not is_right(p.prompt, p.chosen) for p in sums.preferences("reward", flipped=share, **options)])


def test_so_many_labels_are_flipped_and_more_noise_flips_those_too():
    shares = (0.0, 0.1, 0.3, 0.5, 1.0)
    by_share = [flips(share) for share in shares]
    for share, flipped in zip(shares, by_share, strict=True):  # four standard deviations
        assert abs(flipped.mean() - share) <= 4 * np.sqrt(share * (1 - share) / flipped.size)
    assert all((less <= more).all() for less, more in itertools.pairwise(by_share))
    np.testing.assert_array_equal(flips(0.3, kind="any"), by_share[2])
    clean, noisy = sums.preferences("reward"), sums.preferences("reward", flipped=1.0)
    for one, other in zip(clean, noisy, strict=True):  # the same two answers
        np.testing.assert_array_equal(one.chosen, other.rejected)
        np.testing.assert_array_equal(one.rejected, other.chosen)


def test_so_many_demonstrations_are_wrong():
    wrong = np.array([not is_right(*d) for d in sums.demonstrations("reward", wrong=0.25)])
    assert abs(wrong.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / wrong.size)
    assert all(is_right(*d) for d in sums.demonstrations("held-out"))
    assert not any(is_right(*d) for d in sums.demonstrations("held-out", wrong=1.0))
    np.testing.assert_array_equal(wrong, flips(0.25))  # of the same prompts, labels are flipped


def test_a_set_follows_from_its_seed():
    spell = lambda **options: [d.response.tolist() for d in sums.demonstrations("held-out", wrong=0.5, **options)]
    assert spell() == spell(seed=0) != spell(seed=1)
    assert spell()[:3] == [[6, 2, 2, 1], [8, 4, 2, 1], [6, 2, 2, 1]]
    part = sums.problems("held-out")[50:60]
    rest = {"score": sums.exact, "wrong_answer": sums.wrong_answer, "wrong": 0.5}
    alone = verified.demonstrations(part, sums.ENCODING, **rest)
    assert [d.response.tolist() for d in alone] == spell()[50:60]  # whatever else is in the set


def test_written_to_a_file_and_read_again(tmp_path):
    pairs = sums.preferences("held-out", flipped=0.2)[:20]
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": p.prompt.text, "chosen": sums.decode(p.chosen), "rejected": sums.decode(p.rejected)} for p in pairs
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    for one, other in zip(pairs, read_preferences(path, sums.ENCODING, max_tokens=10), strict=True):
        np.testing.assert_array_equal(one.prompt.tokens, other.prompt.tokens)
        np.testing.assert_array_equal(one.chosen, other.chosen)
        np.testing.assert_array_equal(one.rejected, other.rejected)


def test_slips():
    rng = np.random.default_rng(0)
    for text, places in (("a1b2", {1, 3}), ("Abc", {1, 2}), ("ABC", {0, 1, 2}), ("-3.5", {1, 3})):
        slipped = [verified.slip(text, rng) for _ in range(60)]
        changed = [[i for i, (x, y) in enumerate(zip(text, other, strict=True)) if x != y] for other in slipped]
        assert {len(c) for c in changed} == {1}
        assert {c[0] for c in changed} == places
    with pytest.raises(ValueError, match=r"'⊕ \?' has neither digit nor letter that could slip; use answers of other"):
        verified.slip("⊕ ?", rng)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match=rf"wrong is {share}, must lie in \[0, 1\]"):
        sums.demonstrations("held-out", wrong=share)
    with pytest.raises(ValueError, match=rf"flipped is {share}, must lie in \[0, 1\]"):
        sums.preferences("held-out", flipped=share)


def test_the_verifier_has_the_last_word():
    (problem,) = sums.problems("held-out")[:1]
    usual = {"score": sums.exact, "wrong_answer": sums.wrong_answer}
    right = problem.example["answer"]
    late = iter([right, right, "000", right])
    (pair,) = verified.preferences([problem], sums.ENCODING, **usual | {"wrong_answer": lambda *_: next(late)})
    assert sums.decode(pair.rejected) == "000"
    with pytest.raises(
        ValueError, match=rf"prompt {problem.id}: 100 answers in a row .* the last '{right}'; choose an"
    ):
        verified.preferences([problem], sums.ENCODING, **usual | {"wrong_answer": lambda *_: right})
    with pytest.raises(
        ValueError, match=rf"prompt {problem.id}: the verifier does not call its own answer '{right}' ri"
    ):
        verified.demonstrations([problem], sums.ENCODING, **usual | {"score": lambda *_: 0.5})


@pytest.fixture(scope="module")
def reasoning():
    pytest.importorskip("reasoning_gym")
    from rlalign.envs import reasoning

    return reasoning


def as_bytes(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


BYTES = ra.Encoding(as_bytes, lambda prompt, text: np.append(as_bytes(text), np.int32(0)))


def text_of(tokens):
    return bytes(tokens[:-1].tolist()).decode()


def test_reasoning_splits_share_no_question(reasoning):
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # so few that most come again
    found = {
        split: [p.text for p in reasoning.reasoning_prompts("chain_sum", split, 8, BYTES, config=small, seed=seed)]
        for split, seed in (("policy", 0), ("reward", 1), ("held-out", 2))
    }
    assert all(len(set(questions)) == 8 for questions in found.values())
    for one, other in itertools.combinations(found.values(), 2):
        assert not set(one) & set(other)
    dataset = reasoning.reasoning_gym.create_dataset("chain_sum", **small, seed=0, size=reasoning.SIZE)
    first = {question: number for number, question in reversed([(i, dataset[i]["question"]) for i in range(100)])}
    prompts = reasoning.reasoning_prompts("chain_sum", "policy", 30, BYTES, config=small)
    assert all(p.id == first[p.text] for p in prompts)  # where it comes again, the first counts
    train = reasoning.reasoning_prompts("chain_sum", "train", 40, BYTES)
    policy, reward = (reasoning.reasoning_prompts("chain_sum", split, 5, BYTES) for split in ("policy", "reward"))
    assert {p.text for p in (*policy, *reward)} <= {p.text for p in train}
    more = reasoning.reasoning_prompts("chain_sum", "policy", 9, BYTES)
    assert [(p.id, p.text) for p in more[:5]] == [(p.id, p.text) for p in policy]


def test_reasoning_prompts_hold_what_a_reward_worker_needs(reasoning):
    prompts = reasoning.reasoning_prompts("chain_sum", "held-out", 4, BYTES, config={"max_terms": 3})
    completions, expected = [], []
    for prompt in prompts:
        total = sum(int(sign + number) for sign, number in re.findall(r"([+-]?) ?(\d+)", prompt.text.split(":")[1]))
        completions += [f" {total}\n", f"It is <answer>{total}</answer>.", str(total + 1)]
        expected += [1.0, 1.0, 0.0]
    here = [reasoning.reasoning_score(c, prompts[i // 3].example) for i, c in enumerate(completions)]
    assert here == expected
    (gcd,) = reasoning.reasoning_prompts("gcd", "policy", 1, BYTES)
    assert reasoning.reasoning_score(f" {gcd.example['answer']}\n", gcd.example) == 1
    with ra.RewardGuard(reasoning.reasoning_score, workers=1, time_limit=20.0) as guard:
        rewards = guard(completions, [prompts[i // 3].example for i in range(len(completions))])
    assert rewards.reward.tolist() == expected


@pytest.mark.parametrize("kind", ["slip", "other"])
@pytest.mark.parametrize("task", ["chain_sum", "word_sorting"])
def test_reasoning_pairs_are_verified(reasoning, task, kind):
    prompts = reasoning.reasoning_prompts(task, "reward", 12, BYTES)
    pairs = reasoning.reasoning_preferences(prompts, BYTES, kind=kind)
    named = [prompt.example["answer"] for prompt in prompts]
    for pair in pairs:
        assert text_of(pair.chosen) == pair.prompt.example["answer"]
        assert reasoning.reasoning_score(text_of(pair.rejected), pair.prompt.example) < 1
        assert (text_of(pair.rejected) in named) == (kind == "other")
    flipped = reasoning.reasoning_preferences(prompts, BYTES, kind=kind, flipped=1.0)
    assert [text_of(p.rejected) for p in pairs] == [text_of(p.chosen) for p in flipped]
    shown = reasoning.reasoning_demonstrations(prompts, BYTES, kind=kind, wrong=0.5)
    assert {text_of(d.response) == d.prompt.example["answer"] for d in shown} == {True, False}


def test_reasoning_tasks_that_are_refused(reasoning):
    ask = lambda task, **options: reasoning.reasoning_prompts(
        task, **{"split": "policy", "count": 2} | options, encode=BYTES
    )
    for task, options, message in (
        ("sums", {}, r"Reasoning Gym has no task 'sums': one of .*chain_sum"),
        ("chain_sum", {"split": "test"}, r"split must be one of train, policy, reward, held-out, got 'test'"),
        ("chain_sum", {"count": 0}, r"count is 0, must be at least 1"),
        ("chain_sum", {"config": {"terms": 2}}, r"task 'chain_sum' refuses the settings \{\"seed\": 0, \"terms\": 2\}"),
        ("chain_sum", {"config": {"min_terms": 9}}, r"task 'chain_sum' refuses the settings"),
        ("propositional_logic", {}, r"task 'propositional_logic' names no answer that scores 1 \(None"),
        ("coin_flip", {"count": 400, "config": {"min_trials": 3, "max_trials": 3}}, r"questions for 'policy', not 400"),
        (
            "chain_sum",
            {"config": {"size": 3}, "count": 9},
            r"has \d questions for 'policy', not 9: lower it, or widen conf",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ask(task, **options)
    prompts = ask("chain_sum")
    with pytest.raises(ValueError, match="kind must be 'slip' or 'other', got 'word'"):
        reasoning.reasoning_preferences(prompts, BYTES, kind="word")


def test_a_task_that_draws_from_elsewhere_is_refused(reasoning, monkeypatch):
    """As list_functions does, in some of its problems."""

    class Drifting:
        size, drawn = 100, itertools.count()

        def __getitem__(self, index):
            return {"question": f"{index} {next(self.drawn) if index > 2 else ''}", "answer": "1", "metadata": {}}

        def score_answer(self, answer, entry):
            return float(answer == entry["answer"])

    monkeypatch.setattr(reasoning, "_dataset", lambda task, config: Drifting())
    with pytest.raises(
        ValueError, match=r"task 'mine' gives another problem each time: no run could be continued; use"
    ):
        reasoning.reasoning_prompts("mine", "train", 10, BYTES)


def test_without_reasoning_gym(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "rlalign.envs.reasoning", raising=False)
    with pytest.raises(
        ImportError, match=r"rlalign\.envs\.reasoning needs reasoning-gym: pip install rlalign\[reasoni"
    ):
        import rlalign.envs.reasoning  # noqa: F401
