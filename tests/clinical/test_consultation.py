"""Consultations in words: whole episodes, what each turn earns, and what changes nothing."""

import math
import string

import numpy as np
import pytest

import rlalign as ra
from rlalign.clinical import consultation, diseases
from rlalign.clinical.consultation import CATEGORIES, interpretation_score
from rlalign.clinical.dialogue import Abstains, Asks, Diagnoses, Means, Opens, Result, action, parse
from rlalign.envs.episodes import Episodes, play
from rlalign.envs.prompting import rebuilt
from rlalign.envs.protocol import Info, as_observation, as_transition
from rlalign.envs.worlds import Worlds


@pytest.fixture(scope="module")
def room():
    return consultation.Consultation(horizon=2)


def test_an_episode_of_somebody_who_knows(room):
    """Asked and read rightly, the results' gains add up to what the diagnosis became likelier by."""
    seen = as_observation(room.reset(5))
    opening = parse(seen.text)[0]
    assert isinstance(opening, Opens)
    gold = room._cases.gold[0].argmax()
    before, rewards, kinds = room._p[gold], [], []
    while (said := room.expert()) is not None:
        done = as_transition(room.step(said))
        turn = parse(said)[0]
        kinds.append(type(turn))
        rewards.append(done.reward)
        if isinstance(turn, Asks):
            assert {type(line) for line in parse(done.observation.text)} == {Result}
            gained = (done.reward + 0.01) / 0.3
            assert gained == pytest.approx(math.log(room._p[gold] / before), abs=1e-3)
            before = room._p[gold]
        if isinstance(turn, Means):
            assert done.reward == pytest.approx(0.1)
        assert done.terminated == isinstance(turn, Diagnoses)
    assert kinds[-1] is Diagnoses
    assert set(kinds) == {Asks, Means, Diagnoses}
    assert kinds.count(Asks) <= 2
    hit = CATEGORIES[gold] in turn.codes
    assert rewards[-1] == pytest.approx((1 - 0.1 * 4 / 5) if hit else -0.1)
    assert done.info.won == (turn.codes[0] == CATEGORIES[gold])


def test_a_policy_of_noise_says_nothing_that_is_not_admissible():
    """Single tests: everything that may be said is finite, and a decoder with random weights says nothing else."""
    characters = sorted({*string.printable})
    encode = lambda text: np.array([characters.index(c) + 1 for c in text], np.int32)
    decode = lambda ids: "".join(characters[i - 1] for i in ids if i)
    config = ra.ModelConfig(
        vocab_size=len(characters) + 1, width=16, layers=1, heads=2, kv_heads=2, head_width=8, mlp_width=32,
        max_positions=512, tied_head=True,
    )  # fmt: skip
    decoder = ra.Decoder(config)
    settings = Episodes(2, 3, 400, ra.SampleConfig(1, 60, eos_ids=(0,)))
    form = rebuilt(encode, history=0, render=lambda past, taken, seen: seen.text)
    how = {"form": form, "parse": lambda text, _: (text, None), "decode": decode, "config": settings, "write": encode}
    arguments = {"horizon": 2, "panels": False}
    with Worlds(consultation.Consultation, copies=4, arguments=arguments) as worlds:
        found = play(decoder, decoder.init(0), worlds, [1, 2], seed=0, step=0, **how)
    turns = [turn for episode in found for turn in episode.turns]
    assert all(turn.valid and turn.text in turn.observation.admissible for turn in turns)
    kinds = {type(parse(turn.text)[0]) for turn in turns}
    assert kinds >= {Asks, Means}
    first = turns[0].observation.admissible
    assert sum(text.startswith('["asks"') for text in first) == 50
    assert sum(text.startswith('["diagnoses"') for text in first) == len(CATEGORIES)
    meanings = next(t.observation.admissible for t in turns if type(parse(t.text)[0]) is Means)
    assert len(meanings) == 5 * (len(CATEGORIES) + 1)


def test_codes_that_are_no_categories_are_wrong_diagnoses(room):
    def diagnosed(*codes):
        room.reset(5)
        return room.step(action(Diagnoses(codes)))

    room.reset(5)
    gold, wrong = CATEGORIES[room._cases.gold[0].argmax()], CATEGORIES[room._cases.gold[0].argmin()]
    assert diagnosed(gold).reward == pytest.approx(1.0)
    first = diagnosed("A00", gold)
    assert first.reward == pytest.approx(diagnosed(wrong, gold).reward) == pytest.approx(1 - 0.1 / 2)
    assert not first.info.won
    assert diagnosed("A00", "A01", "A02", "A03", "A04", gold).reward == pytest.approx(-0.1)
    assert diagnosed(gold + "9", gold).reward == pytest.approx(1.0)  # one category, named twice
    nothing = diagnosed()
    assert not nothing.info.valid
    assert not nothing.terminated


def test_somebody_who_knows_says_what_is_admissible():
    room = consultation.Consultation(horizon=2, panels=False)
    seen = room.reset(7)
    while (said := room.expert()) is not None:
        assert said in seen.admissible
        seen = room.step(said).observation


def test_what_changes_nothing(room):
    seen = room.reset(6)
    for said in ("", "ask for everything", '["asks", "moon"]', action(Means("3016-3", "high")), '["asks", 3]', "[[[["):
        done = room.step(said)
        assert (done.observation.text, done.reward, done.info) == ("Nothing happens.", 0.0, Info(valid=False))
        assert done.observation.admissible == seen.admissible
    asked = room.step(f"I would like to see.\n{action(Asks('thyroid panel'))}")
    assert asked.info.valid
    assert not room.step(action(Asks("heart panel"))).info.valid  # first what the results mean
    codes = [turn.code for turn in parse(asked.observation.text)]
    read = room.step("\n".join(action(Means(code, "unknown")) for code in codes))
    assert 0 <= read.reward < 0.1
    assert action(Asks("thyroid panel")) not in read.observation.admissible
    assert not room.step(action(Asks("thyroid panel"))).info.valid
    ended = room.step(action(Abstains()))
    assert (ended.reward, ended.terminated, ended.info.won) == (0.0, True, False)
    with pytest.raises(RuntimeError, match=r"call reset\(seed\) first$"):
        room.step("")


def test_the_horizon_leaves_a_diagnosis(room):
    room.reset(7)
    for name in ("thyroid panel", "spirometry"):
        codes = [turn.code for turn in parse(room.step(action(Asks(name))).observation.text)]
        seen = room.step("\n".join(action(Means(code, "normal")) for code in codes)).observation
    assert [type(parse(line)[0]) for line in seen.admissible] == [Diagnoses, Abstains]
    assert not room.step(action(Asks("heart panel"))).info.valid
    done = room.step(action(Diagnoses(("Z99", "I10", "I10"))))
    right = CATEGORIES[room._cases.gold[0].argmax()] == "I10"
    assert done.reward == pytest.approx(0.95 if right else -0.1)


def test_the_same_seed_is_the_same_patient(room):
    first = [room.reset(seed) for seed in range(5)]
    assert [room.reset(seed) for seed in reversed(range(5))] == first[::-1]
    assert len({seen.text for seen in first}) == 5
    assert len(set(CATEGORIES)) == len(diseases.NAMES)


def test_scores_of_meanings():
    words, moved = {"718-7": "low", "2276-4": "normal"}, {"D50": 0.3, "E83": -0.2, "I10": 0.0}
    says = lambda *turns: interpretation_score([Means(*turn) for turn in turns], words, moved)
    assert says(("718-7", "low", ("D50",)), ("2276-4", "normal", ())) == 1.0
    assert says(("718-7", "low", ("E83",)), ("2276-4", "normal", ())) == 0.5
    assert says(("718-7", "high", ("D50", "I10")), ("2276-4", "normal", ())) == 0.5
    assert says(("718-7", "high", ()), ("718-7", "low", ())) == 0.0  # the first counts, and something rose
    assert interpretation_score([Means("718-7", "low")], {"718-7": "low"}, {"D50": 0.0}) == 1.0
    assert interpretation_score([], words, moved) == 0.0
    assert np.isfinite(says(("9999-9", "low", ("D50",))))


def test_arguments_that_are_refused(room):
    with pytest.raises(ValueError, match=r"^Consultation: horizon is 0, must be at least 1$"):
        consultation.Consultation(horizon=0)
    with pytest.raises(ValueError, match=r"^Consultation\.reset: seed is -1, must be at least 0$"):
        room.reset(-1)
