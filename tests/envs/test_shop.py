"""Shop: whole episodes by their texts, WebShop's reward, and what any environment of texts must keep to."""

import doctest
import fractions
import itertools
import random

import pytest

from rlalign.envs import shop
from rlalign.envs.protocol import Info
from rlalign.envs.shop import LEVELS, Goal, Item, Shop
from rlalign.envs.words import words
from tests.envs.test_house import (
    aliases,
    any_of,
    digest,
    digest_elsewhere,
    nonsense_changes_nothing,
    play,
    rate,
    spoken,
    transcript,
)

LOST = """\
task: find me a red linen pillow, size l, price lower than 90 dollars.
this is the search page.
| search[red linen pillow]; search[linen pillow]; search[pillow]
> search[red linen pillow]
page 1. item 8: washable linen pillow, 82 dollars; item 29: light linen pillow, 60 dollars; item 2: light linen
    blanket, 63 dollars.
| click[item 8]; click[item 29]; click[item 2]; click[next >]; click[back to search]
> click[next >]
page 2. item 4: warm wool pillow, 93 dollars; item 27: washable cotton pillow, 26 dollars; item 1: warm cotton
    pillow, 76 dollars.
| click[item 4]; click[item 27]; click[item 1]; click[next >]; click[< prev]; click[back to search]
> click[item 4]
item 4: warm wool pillow, 93 dollars. colors: black, green, red. sizes: s, xl. you chose nothing.
| click[black]; click[green]; click[red]; click[s]; click[xl]; click[buy now]; click[< prev]; click[back to
    search]
> click[green]
item 4: warm wool pillow, 93 dollars. colors: black, green, red. sizes: s, xl. you chose green.
| click[black]; click[red]; click[s]; click[xl]; click[buy now]; click[< prev]; click[back to search]
> click[xl]
item 4: warm wool pillow, 93 dollars. colors: black, green, red. sizes: s, xl. you chose green and xl.
| click[black]; click[red]; click[s]; click[buy now]; click[< prev]; click[back to search]
> click[red]
item 4: warm wool pillow, 93 dollars. colors: black, green, red. sizes: s, xl. you chose red and xl.
| click[black]; click[green]; click[s]; click[buy now]; click[< prev]; click[back to search]
> click[buy now] = 0, score 0.25
thank you for shopping with us.
|
"""
FOUND = """\
task: find me a blue wool shirt, size s, price lower than 100 dollars.
this is the search page.
| search[blue wool shirt]; search[wool shirt]; search[shirt]
> search[rug s]
page 1. item 1: warm cotton pillow, 76 dollars; item 3: light cotton rug, 51 dollars.
| click[item 1]; click[item 3]; click[next >]; click[back to search]
> click[buy now] (not understood)
nothing happens.
| click[item 1]; click[item 3]; click[next >]; click[back to search]
> click[next >]
page 2. item 4: warm wool pillow, 93 dollars; item 5: light cotton dress, 59 dollars.
| click[item 4]; click[item 5]; click[next >]; click[< prev]; click[back to search]
> click[< prev]
page 1. item 1: warm cotton pillow, 76 dollars; item 3: light cotton rug, 51 dollars.
| click[item 1]; click[item 3]; click[next >]; click[back to search]
> click[back to search]
this is the search page.
| search[blue wool shirt]; search[wool shirt]; search[shirt]
> search[9]
page 1. no items.
| click[back to search]
> click[back to search]
this is the search page.
| search[blue wool shirt]; search[wool shirt]; search[shirt]
> search[blue wool shirt]
page 1. item 6: warm wool shirt, 92 dollars; item 1: warm cotton pillow, 76 dollars.
| click[item 6]; click[item 1]; click[next >]; click[back to search]
> click[item 6]
item 6: warm wool shirt, 92 dollars. colors: black, blue, green. sizes: s, m, l. you chose nothing.
| click[black]; click[blue]; click[green]; click[s]; click[m]; click[l]; click[buy now]; click[< prev];
    click[back to search]
> click[blue]
item 6: warm wool shirt, 92 dollars. colors: black, blue, green. sizes: s, m, l. you chose blue.
| click[black]; click[green]; click[s]; click[m]; click[l]; click[buy now]; click[< prev]; click[back to search]
> click[s]
item 6: warm wool shirt, 92 dollars. colors: black, blue, green. sizes: s, m, l. you chose blue and s.
| click[black]; click[green]; click[m]; click[l]; click[buy now]; click[< prev]; click[back to search]
> click[buy now] = 10, score 1
thank you for shopping with us.
|
"""
TO_AND_FRO = ["search[rug s]", "click[buy now]", "click[next >]", "click[< prev]", "click[back to search]"]
TO_AND_FRO += ["search[9]", "click[back to search]"]
WRONG = ["", "click[next >]", "click[item 4]", "click[green]", "click[xl]", "click[red]", "click[buy now]"]


@pytest.mark.parametrize(("level", "seed", "scripted", "text"), [(1, 0, TO_AND_FRO, FOUND), (2, 3, WRONG, LOST)])
def test_whole_episodes(level, seed, scripted, text):
    assert transcript(Shop(**LEVELS[level]), seed, scripted) == text


def by_hand(goal, item, color, size):
    """WebShop's reward, term by term, exactly."""
    matched = len(set(goal.attributes) & set(item.attributes))
    options = (goal.color == color) + (goal.size == size)
    total = fractions.Fraction(matched + options + (item.price < goal.limit), len(goal.attributes) + 2 + 1)
    (theirs,) = [d for d, kinds in shop.DEPARTMENTS.items() if item.kind in kinds]
    (ours,) = [d for d, kinds in shop.DEPARTMENTS.items() if goal.kind in kinds]
    kind = fractions.Fraction(1) if item.kind == goal.kind else fractions.Fraction(1, 2 if theirs == ours else 10)
    return kind * total


def test_the_score_is_webshops():
    goal = Goal("shirt", ("soft", "cotton"), "red", "m", 30)
    seen = set()
    for kind, attributes, color, size, price in itertools.product(
        ("shirt", "dress", "rug"),
        (("soft", "cotton"), ("warm", "cotton"), ("warm", "wool")),
        ("red", "blue", None),
        ("m", "s", None),
        (29, 30, 31),
    ):
        item = Item(kind, attributes, ("blue", "red"), ("s", "m"), price)
        for asked in (goal, goal._replace(attributes=("cotton",))):
            expected = by_hand(asked, item, color, size)
            assert shop.score(asked, item, color, size) == pytest.approx(float(expected), abs=1e-15)
            assert (shop.score(asked, item, color, size) == 1.0) == (expected == 1)
            seen.add(expected)
    assert min(seen) == 0
    assert max(seen) == 1
    assert len(seen) > 15


def test_what_is_bought_ends_the_episode_with_its_score():
    draw, scores = random.Random(0), set()
    world = Shop(items=99)
    for seed in range(600):
        steps = play(world, seed, any_of(draw))
        assert steps[-1].terminated == (steps[-1].observation.text == shop.BOUGHT)
        assert all(t.info.score == 0 for t in steps if not t.terminated)
        assert all(t.observation.text != shop.BOUGHT for t in steps[:-1])
        assert steps[-1].reward == (10.0 if steps[-1].info.score == 1 else 0.0)
        scores.add(steps[-1].info.score)
    assert len(scores) > 10


def test_the_expert_buys_what_is_asked_for():
    for settings in LEVELS.values():
        world = Shop(**settings)
        won, longest = rate(world, 300, lambda observation, world=world: world.expert())
        assert won == 1
        assert longest <= 7
        assert world.expert() is None


def test_the_expert_manages_in_every_catalogue():
    for catalogue in range(40):
        world = Shop(items=99, catalogue=catalogue, horizon=12)
        assert rate(world, 40, lambda observation, world=world: world.expert())[0] == 1


def test_the_expert_finds_out_of_every_page():
    draw = random.Random(3)
    for settings in LEVELS.values():
        world = Shop(**settings | {"horizon": 100})
        astray = lambda seen: any_of(draw)(seen._replace(admissible=[a for a in seen.admissible if a != shop.BUY]))
        for seed in range(100):
            play(world, seed, astray, most=20)
            steps = [world.step(world.expert()) for _ in range(79) if world.expert()]
            assert steps[-1].info.won
            assert len(steps) <= 12


def test_chance_buys_the_right_thing_rarely():
    """Measured: 0.016, 0.012 and 0.007 of 3000 tasks of the levels."""
    rates = [rate(Shop(**settings), 400, any_of(random.Random(0)))[0] for settings in LEVELS.values()]
    assert 0.003 < rates[0] < 0.04
    assert all(0 <= r < 0.03 for r in rates[1:])


def test_any_search_is_understood_on_the_search_page_only():
    world = Shop(items=99, horizon=1000)
    first = world.reset(0)
    for text in ("red", "RED Shirt", "rug, please!", "shirt shirt", "s", "unheard of", "7"):
        listed = world.step(f"search[{text}]")
        assert listed.info.valid
        assert listed.observation.text.startswith("page 1. ")
        again = world.step(f"search[{text}]")
        assert again.observation == listed.observation._replace(text="nothing happens.")
        assert world.step("click[back to search]").observation == first
    for text in (
        "search[]",
        "search[ ]",
        "search red",
        "search[red",
        "Search[red]",
        "red",
        "search[red] ",
        "search [red]",
    ):
        assert world.step(text)[1:] == (0.0, False, False, Info(valid=False))
    say = lambda text: (world.step(f"search[{text}]").observation, world.step("click[back to search]"))[0]
    assert say("RED shirt!") == say("shirt red red")
    assert say("red") != say("shirt")


def test_searches_put_what_has_most_of_the_words_first():
    world = Shop(items=99, horizon=1000)
    stock = shop.stock(99, 0)
    for query in ("red", "red cotton shirt", "soft wool rug xl", "white s"):
        has = [
            sum(word in (item.kind, *item.attributes, *item.colors, *item.sizes) for word in query.split())
            for item in stock
        ]
        expected = [i for i in sorted(range(99), key=lambda i: (-has[i], i)) if has[i]][: shop.MOST]
        world.reset(0)
        seen, found = world.step(f"search[{query}]").observation, []
        while True:
            found += [action for action in seen.admissible if action.startswith("click[item")]
            if "click[next >]" not in seen.admissible:
                break
            seen = world.step("click[next >]").observation
        assert found == [f"click[item {i + 1}]" for i in expected]


def test_a_catalogue_is_what_its_seed_says():
    assert shop.stock(99, 1)[:30] == shop.stock(30, 1) != shop.stock(30, 2)
    for item in shop.stock(99, 3):
        assert item.title == f"{item.attributes[0]} {item.attributes[1]} {item.kind}"
        assert item.attributes[0] in shop.FEATURES
        assert item.attributes[1] in shop.MATERIALS
        assert 2 <= len(item.colors) <= 3
        assert 2 <= len(item.sizes) <= 3
        assert item.colors == tuple(sorted(set(item.colors)))
        assert 5 <= item.price <= 99
    assert {item.kind for item in shop.stock(99, 3)} == set(shop.DEPARTMENT)


def test_equal_anchors_are_one_state():
    draw = random.Random(1)
    for settings in LEVELS.values():
        assert aliases(Shop(**settings | {"horizon": 100}), 4, 6, any_of(draw)) == 0


@pytest.mark.parametrize("coarser", [lambda seen: seen.text, lambda seen: seen.anchor[:1]], ids=["text", "page"])
def test_coarser_anchors_alias(coarser):
    world = Shop(**LEVELS[3] | {"horizon": 100})
    assert aliases(world, 3, 10, any_of(random.Random(1)), coarser) > 0


def test_nonsense_changes_nothing():
    draw = random.Random(2)
    nonsense = ["", " ", "click", "click[]", "click[item 100]", "click[BUY NOW]", "click[pink]", "buy now", "search[]"]
    nonsense += ["click[next page]", "look"]
    for settings in LEVELS.values():
        world = Shop(**settings | {"horizon": 1000})
        for seed in range(20):
            nonsense_changes_nothing(world, seed, nonsense, draw)


def test_what_can_be_clicked_elsewhere_changes_nothing():
    world = Shop(horizon=1000)
    everything = ["click[item 1]", "click[red]", "click[xl]", shop.BUY, shop.BACK, shop.NEXT, shop.PREV]
    draw = random.Random(4)
    for seed in range(20):
        observation = world.reset(seed)
        for _ in range(6):
            for action in set(everything) - set(observation.admissible):
                assert world.step(action).observation == observation._replace(text="nothing happens.")
            transition = world.step(any_of(draw)(observation))
            observation = transition.observation
            if transition.terminated:
                break


def test_every_word_is_in_the_vocabulary_and_every_word_of_it_is_said():
    draw = random.Random(6)
    extra = lambda seen: "what?" if draw.random() < 0.1 else any_of(draw)(seen)
    said = set().union(*(spoken(Shop(**settings), 300, extra) for settings in LEVELS.values()))
    world = Shop()
    world.reset(0)
    said |= set(words(world.step("search[unheard of]").observation.text))
    assert said <= set(shop.VOCABULARY)
    assert {word for word in shop.VOCABULARY if word not in said and not word.isdigit()} == set()
    assert sorted(set(shop.VOCABULARY)) == list(shop.VOCABULARY)
    assert len(shop.VOCABULARY) == 168


def test_the_horizon_ends_an_episode():
    world = Shop(horizon=12)
    world.reset(0)
    steps = [world.step("look") for _ in range(12)]
    assert [t.truncated for t in steps] == [False] * 11 + [True]
    assert not any(t.terminated or t.reward for t in steps)
    with pytest.raises(
        RuntimeError, match=r"^Shop\.step\('look'\) after the end of the episode: call reset\(seed\) first"
    ):
        world.step("look")


def test_what_is_bought_at_the_horizon_is_bought():
    world = Shop()
    for seed in range(20):
        needed = len(play(world, seed, lambda observation: world.expert()))
        world.reset(seed)
        for _ in range(15 - needed):
            world.step("wait")
        last = [world.step(world.expert()) for _ in range(needed)][-1]
        assert last[1:] == (10.0, True, False, Info(won=True, score=1.0))


def test_the_same_in_every_process():
    assert digest("Shop", range(60)) == digest_elsewhere("Shop", range(60), "1") == DIGEST


DIGEST = 4127153731  # of all levels; changes with every text, draw and rule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"items": 5}, r"^Shop: items is 5, must be an int in \[6, 99\]$"),
        ({"items": 30.0}, r"^Shop: items is 30\.0, must be an int"),
        ({"per_page": 1}, r"^Shop: per_page is 1, must be an int in \[2, 10\]$"),
        ({"catalogue": -1}, r"^Shop: catalogue is -1, must be an int in \[0, 4294967295\]$"),
        ({"horizon": 11}, r"^Shop: horizon is 11, must be an int in \[12, 1000\]$"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Shop(**arguments)


def test_seeds_and_steps_that_are_refused():
    world = Shop()
    assert world.expert() is None
    with pytest.raises(RuntimeError, match=r"^Shop\.step\('look'\) before reset: call reset\(seed\) first$"):
        world.step("look")
    with pytest.raises(ValueError, match=r"^Shop\.reset: seed is -1, must be at least 0$"):
        world.reset(-1)


def test_examples_in_docstrings():
    result = doctest.testmod(shop)
    assert (result.failed, result.attempted > 6) == (0, True)
