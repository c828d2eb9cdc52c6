"""Shop: a small web shop to find and buy one thing in, in the manner of WebShop, in plain Python.

    environment = Shop(**LEVELS[2])
    observation = environment.reset(task_seed)
    observation, reward, terminated, truncated, info = environment.step("search[red cotton shirt]")

    search page ─search[...]─▶ list page, some items ─click[item 7]─▶ item page, options ─click[buy now]─▶ end

What can be clicked is admissible, and on the search page three searches made of the instruction; any other search
is understood there too. Every text is made of the tables below, so VOCABULARY is all that can be said, word by word,
and with PHRASES beside it in fewer tokens.
"""

import collections
import functools
import operator
import random
from collections.abc import Sequence
from typing import NamedTuple

from rlalign.envs.protocol import Info, Observation, Transition
from rlalign.envs.words import phrases, vocabulary, words

REWARD = 10.0  # of buying what is asked for, in all respects
MOST = 20  # items that a search finds
LIMITS = {"items": range(6, 100), "per_page": range(2, 11), "catalogue": range(2**32), "horizon": range(12, 1001)}

DEPARTMENTS = {
    "clothes": ("dress", "jacket", "shirt", "skirt"),
    "home": ("blanket", "curtain", "pillow", "rug"),
}
DEPARTMENT = {kind: name for name, kinds in DEPARTMENTS.items() for kind in kinds}
FEATURES = ("light", "soft", "warm", "washable")
MATERIALS = ("cotton", "linen", "silk", "wool")
COLORS = ("black", "blue", "green", "red", "white")
SIZES = ("s", "m", "l", "xl")
PRICES = range(5, 100)  # dollars
LEVELS = {  # a curriculum: Shop(**LEVELS[1]) ...
    1: {"items": 6, "per_page": 2, "horizon": 15},
    2: {"items": 30, "per_page": 3, "horizon": 15},
    3: {"items": 99, "per_page": 3, "horizon": 15},
}
ASKED = "find me a %s %s %s, size %s, price lower than %s dollars."
HOME = "this is the search page."
PAGE = "page %s. %s."
LISTED = "item %s: %s, %s dollars"
EMPTY = "no items"
ITEM = "item %s: %s, %s dollars. colors: %s. sizes: %s. you chose %s."
BOUGHT = "thank you for shopping with us."
NOTHING = "nothing happens."
SEARCH = "search[%s]"
CLICK = "click[%s]"
BUY, BACK, NEXT, PREV = (CLICK % what for what in ("buy now", "back to search", "next >", "< prev"))
TEMPLATES = (ASKED, HOME, PAGE, LISTED, EMPTY, ITEM, BOUGHT, NOTHING, SEARCH, CLICK, BUY, BACK, NEXT, PREV)
VOCABULARY = vocabulary(
    (
        *(*DEPARTMENT, *FEATURES, *MATERIALS, *COLORS, *SIZES, ", ; and nothing"),
        *TEMPLATES,
        *map(str, range(1, PRICES.stop + 1)),
    )
)
# What stands between what differs, "click[item": with VOCABULARY, texts in fewer tokens; see Words.
PHRASES = phrases((*TEMPLATES, CLICK % "item %s"))
VALID, INVALID = Info(), Info(valid=False)


class Item(NamedTuple):
    """What the shop sells: a washable cotton shirt in some colors and sizes."""

    kind: str
    attributes: tuple[str, ...]
    colors: tuple[str, ...]
    sizes: tuple[str, ...]
    price: int

    @property
    def title(self) -> str:
        return " ".join((*self.attributes, self.kind))


class Goal(NamedTuple):
    """What is asked for; the price must be lower than the limit."""

    kind: str
    attributes: tuple[str, ...]
    color: str
    size: str
    limit: int


def score(goal: Goal, item: Item, color: str | None, size: str | None) -> float:
    """WebShop's reward, in [0, 1]: the share of what is asked for that holds, times that of the kind of thing.

        r_type (attributes that match + options that match + [price < limit]) / (attributes + options + 1)

    with r_type 1 for the kind that is asked for, 0.5 for another of its department, 0.1 for the other department.
    WebShop compares titles for that.

    >>> shirt = Item("shirt", ("soft", "cotton"), ("red", "blue"), ("s", "m"), 25)
    >>> goal = Goal("shirt", ("cotton",), "red", "m", 30)
    >>> score(goal, shirt, "red", "m"), score(goal, shirt, "red", None)
    (1.0, 0.75)
    >>> score(goal._replace(kind="dress"), shirt, "red", "m")
    0.5
    """
    right = sum([name in item.attributes for name in goal.attributes])
    right += (color == goal.color) + (size == goal.size) + (item.price < goal.limit)
    same = 1.0 if item.kind == goal.kind else 0.5 if DEPARTMENT[item.kind] == DEPARTMENT[goal.kind] else 0.1
    return same * right / (len(goal.attributes) + 3)


@functools.lru_cache(maxsize=64)
def stock(items: int, catalogue: int) -> tuple[Item, ...]:
    """So many items, which follow from the catalogue's seed."""
    draw = random.Random(catalogue).random  # of random, only this is the same in every version of Python

    def some(names: Sequence[str], count: int) -> tuple[str, ...]:
        """`count` of the names, in their order."""
        left = list(names)
        while len(left) > count:
            left.pop(int(draw() * len(left)))
        return tuple(left)

    kinds = tuple(DEPARTMENT)
    return tuple(
        Item(
            kinds[int(draw() * len(kinds))],
            some(FEATURES, 1) + some(MATERIALS, 1),
            some(COLORS, 2 + int(draw() * 2)),
            some(SIZES, 2 + int(draw() * 2)),
            PRICES[int(draw() * len(PRICES))],
        )
        for _ in range(items)
    )


@functools.lru_cache(maxsize=64)
def index(items: int, catalogue: int) -> dict[str, list[int]]:
    """Word -> the items of a stock, by their places, that it finds."""
    found: dict[str, list[int]] = {}
    for i, item in enumerate(stock(items, catalogue)):
        for word in (item.kind, *item.attributes, *item.colors, *item.sizes):
            found.setdefault(word, []).append(i)
    return found


@functools.lru_cache(maxsize=1 << 12)
def search(items: int, catalogue: int, query: frozenset[str]) -> tuple[int, ...]:
    """The items that any of the words, all known, finds; those that most of them find come first, and MOST count."""
    found = index(items, catalogue)
    hits = collections.Counter(i for word in query for i in found[word])
    return tuple(sorted(hits, key=lambda i: (-hits[i], i))[:MOST])


class Shop:
    """One shop with one thing to buy an episode; a rlalign.envs.protocol.TextEnvironment.

    Args:
      items: in stock, 6 to 99.
      per_page: how many a list page shows, 2 to 10.
      catalogue: the seed that the stock follows from.
      horizon: steps until an episode is truncated, at least 12.

    Its observations' anchor is (the page as it is seen, the items that were found), so that equal anchors of one task
    are one state, whatever was said last. Buying ends the episode, with the reward only where the score is 1;
    `info.score` has the degrees.

    Raises:
      ValueError: an argument out of range; a seed below 0.
      RuntimeError: a step before `reset` or after the end.

    >>> shop = Shop()
    >>> shop.reset(0).task
    'find me a green wool curtain, size s, price lower than 100 dollars.'
    >>> shop.step("search[curtain]").observation.admissible
    ('click[item 11]', 'click[item 14]', 'click[item 26]', 'click[back to search]')
    >>> shop.step("click[item 100]")[1:]
    (0.0, False, False, Info(valid=False, won=False, score=0.0))
    """

    def __init__(self, items: int = 30, per_page: int = 3, catalogue: int = 0, horizon: int = 15):
        for value, (name, allowed) in zip((items, per_page, catalogue, horizon), LIMITS.items(), strict=True):
            if not isinstance(value, int) or value not in allowed:
                raise ValueError(f"Shop: {name} is {value!r}, must be an int in [{allowed[0]}, {allowed[-1]}]")
        self._name, self._stock = (items, catalogue), stock(items, catalogue)
        self._per_page, self._horizon = per_page, horizon
        self._links = [CLICK % f"item {i + 1}" for i in range(items)]
        self._listed = [LISTED % (i + 1, item.title, item.price) for i, item in enumerate(self._stock)]
        self._random = random.Random()
        self._left = 0  # steps until the horizon; 0 where no episode is going on
        self._started = False

    def reset(self, seed: int) -> Observation:
        """Begin the task that `seed` >= 0 names."""
        if seed < 0:
            raise ValueError(f"Shop.reset: seed is {seed}, must be at least 0")
        self._started, self._left = True, self._horizon
        self._random.seed(operator.index(seed))
        draw = self._random.random
        item = self._stock[int(draw() * len(self._stock))]
        self._goal = goal = Goal(
            item.kind,
            item.attributes if draw() < 0.5 else item.attributes[1:],
            item.colors[int(draw() * len(item.colors))],
            item.sizes[int(draw() * len(item.sizes))],
            item.price // 10 * 10 + 10,
        )
        what = " ".join(goal.attributes)
        self._task = ASKED % (goal.color, what, goal.kind, goal.size, goal.limit)
        queries = f"{goal.color} {what} {goal.kind}", f"{what} {goal.kind}", goal.kind
        self._searches = tuple([SEARCH % query for query in queries])
        self._go_home()
        return Observation(self._show(), self._task, self._admissible, self._anchor)

    def step(self, action: str) -> Transition:
        """Do something: what is admissible, or any search on the search page; anything else changes nothing."""
        if not self._left:
            when = "after the end of the episode" if self._started else "before reset"
            raise RuntimeError(f"Shop.step({action!r}) {when}: call reset(seed) first")
        self._left -= 1
        info, text, bought = VALID, None, action == BUY and self._item >= 0
        if bought:
            value = score(self._goal, self._stock[self._item], *self._chosen)
            info = Info(won=value == 1.0, score=value)
            text, self._left, self._admissible, self._anchor = BOUGHT, 0, (), (BOUGHT, *self._anchor)
        elif self._results is None and (query := _query(action)):
            self._results, self._page = self._search(query), 0
        elif action in self._admissible:
            self._click(action)
        else:
            info, text = INVALID, NOTHING
        text = text or self._show()
        observation = Observation(text, self._task, self._admissible, self._anchor)
        return Transition(observation, REWARD * info.won, bought, not self._left and not bought, info)

    def _go_home(self) -> None:
        self._results: tuple[int, ...] | None = None
        self._page, self._item = 0, -1
        self._chosen: tuple[str | None, str | None] = None, None

    def _search(self, query: list[str]) -> tuple[int, ...]:
        return search(*self._name, frozenset(query).intersection(index(*self._name)))

    def _click(self, action: str) -> None:
        if action == BACK:
            self._go_home()
        elif action == NEXT:
            self._page += 1
        elif action == PREV:
            self._page -= self._item < 0
            self._item, self._chosen = -1, (None, None)
        elif self._item < 0:
            self._item = self._links.index(action)
        else:
            what, (color, size) = action[len(CLICK) - 3 : -1], self._chosen
            self._chosen = (what, size) if what in COLORS else (color, what)

    def _show(self) -> str:
        """The page; also finds what is admissible, and the anchor."""
        results, page = self._results or (), self._page
        if self._results is None:
            text, self._admissible = HOME, self._searches
        elif self._item < 0:
            here = results[page * self._per_page : (page + 1) * self._per_page]
            text = PAGE % (page + 1, "; ".join([self._listed[i] for i in here]) or EMPTY)
            clicks = [self._links[i] for i in here]
            clicks += [NEXT] * (len(results) > (page + 1) * self._per_page) + [PREV] * (page > 0)
            self._admissible = (*clicks, BACK)
        else:
            item = self._stock[self._item]
            chosen = " and ".join([name for name in self._chosen if name]) or "nothing"
            offered = ", ".join(item.colors), ", ".join(item.sizes)
            text = ITEM % (self._item + 1, item.title, item.price, *offered, chosen)
            options = [CLICK % name for name in item.colors + item.sizes if name not in self._chosen]
            self._admissible = (*options, BUY, PREV, BACK)
        self._anchor = text, results
        return text

    def expert(self) -> str | None:
        """The next action of somebody who knows the stock, from any state; None where no episode goes on."""
        if not self._left:
            return None
        goal = self._goal
        if self._results is None:
            return min(self._searches, key=lambda action: self._first(self._search(_query(action))))
        first = self._first(self._results)
        if self._item >= 0:
            if not self._fits(self._item):
                return PREV
            missing = [name for name in (goal.color, goal.size) if name not in self._chosen]
            return CLICK % missing[0] if missing else BUY
        if first == len(self._results):
            return BACK
        page = first // self._per_page
        return NEXT if page > self._page else PREV if page < self._page else self._links[self._results[first]]

    def _fits(self, i: int) -> bool:
        item = self._stock[i]
        return (
            self._goal.color in item.colors
            and self._goal.size in item.sizes
            and score(self._goal, item, self._goal.color, self._goal.size) == 1.0
        )

    def _first(self, results: tuple[int, ...]) -> int:
        """The place of the first item that has all that is asked for; len(results) where none has."""
        return next((place for place, i in enumerate(results) if self._fits(i)), len(results))


def _query(action: str) -> list[str]:
    """The words of a search; none where the action is something else."""
    before, after = SEARCH.split("%s")
    return words(action[len(before) : -1].lower()) if action.startswith(before) and action.endswith(after) else []
