"""Judges that compare: against counting by hand, what a server is asked, and fit with one."""

import dataclasses
import functools
import itertools
import json
import logging
import math
import threading

import numpy as np
import pytest

import rlalign as ra
from rlalign.envs import sums
from rlalign.evaluation import endpoint_compare, judge_win_rate, make_pairwise_judge
from rlalign.io.identity import run_identity
from rlalign.rewards.pairwise import INSTRUCTION, ask
from rlalign.rollout import Engine, EngineError
from tests.graders import share_right
from tests.protocol import served
from tests.tiny import sums_model, sums_run


def longer(prompt, a, b):
    """The longer is better; NaN where an x is among the letters of either."""
    return math.nan if "x" in a + b else float(np.sign(len(a) - len(b)) + 1) / 2


def first(prompt, a, b):
    return 1.0


def rollouts(texts, owner):
    """Of letters: token i is the i-th of the alphabet."""
    tokens, mask = np.zeros((len(texts), 8), np.int32), np.zeros((len(texts), 8), bool)
    for n, text in enumerate(texts):
        tokens[n, : len(text)], mask[n, : len(text)] = [ord(letter) for letter in text], True
    zero = np.zeros((len(texts), 8), np.float32)
    return ra.Rollouts(tokens, mask, zero, zero, np.zeros(len(texts), np.int32), np.array(owner, np.int32))


def letters(ids):
    return "".join(map(chr, ids))


PROMPTS = [ra.Prompt(n, np.array([1]), text) for n, text in enumerate(("one?", "two?", "three?"))]
judged = functools.partial(make_pairwise_judge, decode=letters, at_once=1)


@pytest.mark.parametrize("swap", [True, False])
def test_a_reward_is_the_share_of_the_group_that_it_beats(swap):
    texts, owner = ["a", "bbb", "cc", "dd", "e", "ffff", "alone"], [0, 0, 0, 0, 1, 1, 2]
    got = judged(longer, swap=swap)(PROMPTS, rollouts(texts, owner))
    want = np.full(7, np.nan)
    for i, (text, prompt) in enumerate(zip(texts, owner, strict=True)):
        others = [t for j, (t, p) in enumerate(zip(texts, owner, strict=True)) if p == prompt and j != i]
        if others:
            want[i] = np.mean([longer("", text, other) for other in others])
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(want[:6], [0, 1, 0.5, 0.5, 0, 1])


def test_a_judge_that_likes_the_first_place():
    """In both positions nobody wins; in one, first and second fall to each alike, as far as they can."""
    texts = ["a", "b", "c", "d", "e"]
    np.testing.assert_array_equal(judged(first)(PROMPTS, rollouts(texts, [0] * 5)), np.full(5, 0.5))
    np.testing.assert_array_equal(judged(first, swap=False)(PROMPTS, rollouts(texts, [0] * 5)), np.full(5, 0.5))


def test_no_verdict_takes_the_pair_out_not_the_sample(caplog):
    with caplog.at_level(logging.WARNING):
        got = judged(longer)(PROMPTS, rollouts(["a", "bbb", "xx", "d", "xxx"], [0, 0, 0, 1, 1]))
    np.testing.assert_array_equal(got, [0, 1, np.nan, np.nan, np.nan])
    assert "6 of 8 comparisons gave no verdict" in caplog.text

    def one_side(prompt, a, b):
        return math.nan if a == "a" else 1.0

    got = judged(one_side)(PROMPTS, rollouts(["a", "b", "c"], [0, 0, 0]))
    np.testing.assert_array_equal(got, [np.nan, 0.5, 0.5])


def test_what_is_known_is_not_asked():
    asked = []

    def compare(prompt, a, b):
        asked.append((prompt, a, b))
        return longer(prompt, a, b)

    got = judged(compare)(PROMPTS, rollouts(["aa", "b", "aa", "b"], [0] * 4))
    np.testing.assert_allclose(got, [2.5 / 3, 0.5 / 3, 2.5 / 3, 0.5 / 3])
    assert sorted(asked) == [("one?", "aa", "b"), ("one?", "b", "aa")]


def test_questions_are_asked_at_once():
    together = threading.Barrier(4, timeout=20)

    def compare(prompt, a, b):
        together.wait()
        return 1.0

    questions = [("?", "a", str(n)) for n in range(8)]
    np.testing.assert_array_equal(ask(compare, questions, at_once=4), np.ones(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: judged(longer)(PROMPTS, rollouts(["a", "b"], [0, 1])),
            "no prompt has two samples .* num_samples >= 2",
        ),
        (
            lambda: judged(lambda p, a, b: 2.0)(PROMPTS, rollouts(["a", "b"], [0, 0])),
            "compare gave 2.0 for 'one.*: 1 a",
        ),
        (lambda: make_pairwise_judge(longer, decode=letters, at_once=0), "at_once must be at least 1, got 0"),
        (lambda: ask(longer, [], at_once=0), "at_once must be at least 1, got 0"),
        (lambda: judge_win_rate(longer, ["?"], ["a"], []), "1 prompts, 1 answers, 0 references"),
        (lambda: judge_win_rate(longer, ["?"], ["x"], ["a"]), "none of 1 comparisons has a verdict"),
        (lambda: endpoint_compare(Engine("http://x", "m"), instruction="[[A]] or [[B]]"), r"missing: \[\[C\]\]"),
        (lambda: endpoint_compare(Engine("http://x", "m"), max_tokens=0), "max_tokens=0 be at least 1"),
    ],
    ids=["alone", "outcome", "judge", "ask", "lengths", "silent", "verdicts", "tokens"],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("at_once", [1, 4])
def test_win_rate_against_references(at_once):
    prompts = [PROMPTS[0], "two?", "two?", "four?"]
    answers, references = ["aaa", "b", "bbbb", "x"], ["c", "ccc", "c", "d"]
    got = judge_win_rate(longer, prompts, answers, references, at_once=at_once)
    assert (got.rate.value, got.consistency, got.prompts, got.left_out) == (0.75, 1.0, 2, 1)
    swapped = judge_win_rate(longer, prompts, references, answers, at_once=at_once)
    np.testing.assert_allclose(1 - np.array(got.rate)[[0, 2, 1]], swapped.rate)


def test_win_rate_shows_a_judge_that_looks_at_the_place():
    got = judge_win_rate(first, ["?"] * 4, list("abcd"), list("efgh"))
    assert (got.rate.value, got.consistency) == (0.5, 0.0)
    once = judge_win_rate(first, ["?"] * 4, list("abcd"), list("efgh"), swap=False)
    assert once.rate.value == 1.0
    assert math.isnan(once.consistency)


class ChatServer:
    """Prefers the longer answer, as `say` words it."""

    path = "/v1/chat/completions"

    def __init__(self):
        self.asked, self.headers, self.failures, self.say = [], [], [], None

    def answer(self, body):
        text = body["messages"][1]["content"]
        a, b = (text.split(f"<answer_{name}>\n")[1].split(f"\n</answer_{name}>")[0] for name in "AB")
        verdict = {1.0: "[[A]]", 0.0: "[[B]]", 0.5: "[[C]]"}[longer("", a, b)]
        content = f"I was told to say [[A]] or [[B]]. My verdict: {verdict}"
        choice = {"message": {"content": content}} if self.say is None else self.say(verdict)
        return {"choices": [choice]}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with served(ChatServer()) as one:
        yield one


def test_what_a_server_is_asked(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server.failures = [503, 429]
    compare = endpoint_compare(Engine(server.url, "judge", key="MY_KEY"), max_tokens=99)
    assert compare("Which {one}?", "short", "a longer one") == 0.0
    assert compare("?", "the same", "the same") == 0.5
    assert len(server.asked) == 4
    body = server.asked[2]
    assert {"model": "judge", "temperature": 0.0, "max_tokens": 99}.items() <= body.items()
    assert body["messages"][0] == {"role": "system", "content": INSTRUCTION}
    shown = body["messages"][1]["content"]
    assert shown.index("Which {one}?") < shown.index("short") < shown.index("a longer one")
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "text", ["no verdict", "[[D]]", "[A]", "", None], ids=["none", "other", "single", "empty", "null"]
)
def test_an_answer_without_verdict_is_nan(server, text):
    server.say = lambda verdict: {"message": {"content": text}}
    assert math.isnan(endpoint_compare(Engine(server.url, "judge"))("?", "a", "bb"))


def test_servers_that_give_no_answer(server):
    compare = endpoint_compare(Engine(server.url, "judge", retries=1))
    server.say = lambda verdict: {"text": verdict}
    with pytest.raises(EngineError, match=r"no message \(KeyError: 'message'\): is this a chat model"):
        compare("?", "a", "b")
    server.failures = [400]
    with pytest.raises(EngineError, match=r"chat/completions, the comparison for 'Which\?', after 1 tries: 400"):
        compare("Which?", "a", "b")


def test_a_judges_identity_says_who_judges(server):
    """And nothing else: no address in memory, no setting that only changes how fast it is."""

    decoder = ra.Decoder(sums_model(16))

    def identity(compare, **how):
        judge = make_pairwise_judge(compare, **({"decode": sums.decode} | how))
        known = run_identity(decoder, ra.ALGORITHMS["grpo"], {}, PROMPTS, judge)
        return json.dumps(known["judge"], sort_keys=True)

    engine = Engine(server.url, "judge")
    one = identity(endpoint_compare(engine))
    assert one == identity(endpoint_compare(dataclasses.replace(engine, timeout=9.0, retries=0, key="K")), at_once=3)
    assert "0x" not in one
    assert json.loads(one)["compare"]["engine"]["model"] == "judge"
    others = [
        identity(endpoint_compare(dataclasses.replace(engine, model="other"))),
        identity(endpoint_compare(engine, instruction=INSTRUCTION + " Be strict.")),
        identity(endpoint_compare(engine), swap=False),
        identity(longer),
        identity(first),
    ]
    assert len({one, *others}) == 6


def better_sum(prompt, a, b):
    """Which answer has more right digits."""
    right = sums.written(sum(map(int, prompt.rstrip("=").split("+"))))
    score = [share_right(text, {"answer": right}) for text in (a, b)]
    return float(np.sign(score[0] - score[1]) + 1) / 2


def test_fit_learns_from_comparisons(tmp_path):
    decoder = ra.Decoder(sums_model(16))
    result = ra.fit(
        sums_run(tmp_path, steps=1, eval_every=1),
        decoder=decoder,
        params=decoder.init(0),
        prompts=sums.problems("train")[:20],
        eval_prompts=sums.problems("held-out")[:4],
        reward=sums.exact,
        decode=sums.decode,
        judge=make_pairwise_judge(better_sum, decode=sums.decode),
    )
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "reward" in row]
    assert len(trained) == 1
    # Shares of a group won: their mean is 1/2 whatever the policy does.
    np.testing.assert_allclose([row["reward"] for row in trained], 0.5)
    assert int(result.state.step) == 1


def test_every_pair_is_asked_in_both_positions():
    asked = []

    def compare(prompt, a, b):
        asked.append((a, b))
        return 0.5

    judged(compare)(PROMPTS, rollouts(list("abc"), [0] * 3))
    assert sorted(asked) == sorted(itertools.permutations("abc", 2))
    asked.clear()
    judged(compare, swap=False)(PROMPTS, rollouts(list("abc"), [0] * 3))
    assert sorted(tuple(sorted(pair)) for pair in asked) == [("a", "b"), ("a", "c"), ("b", "c")]
