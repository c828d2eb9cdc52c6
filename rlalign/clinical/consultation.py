"""Asking and diagnosing in words: an environment of texts over embedded patients, in the manner of DiaLLM.

    consultation = Consultation()
    seen = consultation.reset(7)                                # a patient opens
    seen, reward, *_ = consultation.step('["asks", "thyroid panel"]')
    seen, reward, *_ = consultation.step('["means", "3016-3", "high", ["E03"]]')     # what a result says
    seen, reward, *_ = consultation.step('["diagnoses", ["E03", "E66"]]')

Turns are those of dialogue.py: a sentence and an action; of what the agent says, lines that are actions count. Three
tasks are rewarded: which test to ask for (confirmation), what its results mean (interpretation, a turn of its own), and
the diagnosis (class-sensitive). Here an order that brings nothing new changes nothing. Reject sampling has its place
where answers are sampled: with panels=False an order is one test, what can be done is finite, and `admissible` has all
of it, so that fit_agent(write=...) draws from it alone, exactly.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlalign.clinical import diseases, generator
from rlalign.clinical.dialogue import (
    Abstains,
    Asks,
    Diagnoses,
    Means,
    Opens,
    Result,
    Turn,
    action,
    read_action,
    sentence,
)
from rlalign.clinical.healthy import CODES
from rlalign.clinical.inquiry import HORIZON, learn, new_tests, truth
from rlalign.clinical.loinc import TESTS
from rlalign.clinical.posterior import Exact, action_names
from rlalign.clinical.reference import WORDS, interpret
from rlalign.clinical.scores import cross_entropy, diagnosis_reward
from rlalign.envs.protocol import Info, Observation, Transition

CATEGORIES = tuple(code[:3] for code in diseases.NAMES)  # a diagnosis in words has three characters
TASK = "ask for tests or panels, say what each result means, and give the likeliest diagnoses, or abstain."
NOTHING = "Nothing happens."
ROSE = 0.02  # of probability: a result that moved no disease by more argues for none
PLACES = 5  # of the ranked list that count


class Consultation:
    """One patient an episode; a rlalign.envs.protocol.TextEnvironment.

    Args:
      horizon: orders until only a diagnosis is left.
      panels: whether panels can be asked for. If not, `admissible` is complete: orders, a meaning with at most one
        diagnosis that it argues for, one diagnosis, abstaining.
      interprets: whether the agent says what results mean before it goes on.
      confirmation, interpretation: what these rewards count.
      cost: of an order.
      abstain: the reward of giving no diagnosis.
      weight: category -> weight of a diagnosis; others have 1.

    Raises:
      ValueError: a horizon below 1; a seed below 0.
      RuntimeError: a step before `reset` or after the end.
    """

    def __init__(
        self,
        horizon: int = HORIZON,
        *,
        panels: bool = True,
        interprets: bool = True,
        confirmation: float = 0.3,
        interpretation: float = 0.1,
        cost: float = 0.01,
        abstain: float = 0.0,
        weight: Mapping[str, float] | None = None,
    ):
        if horizon < 1:
            raise ValueError(f"Consultation: horizon is {horizon}, must be at least 1")
        self._rules = generator.rules(horizon, panels=panels)
        self._complete = not panels
        self._exact = Exact(self._rules)
        self._names = action_names(self._rules)[: self._rules.stop]
        self._interprets, self._abstain, self._cost = interprets, abstain, cost
        self._confirmation, self._interpretation = confirmation, interpretation
        self._weight = jnp.array([(weight or {}).get(code, 1.0) for code in CATEGORIES])
        self._over = True

    def reset(self, seed: int) -> Observation:
        """The patient that `seed` >= 0 names."""
        if seed < 0:
            raise ValueError(f"Consultation.reset: seed is {seed}, must be at least 0")
        self._seed, self._place, self._orders, self._over = seed, 0, 0, False
        self._patient = generator.draw_patients(1, seed)
        self._cases = generator.cases_of(self._patient)
        self._known, self._state = jnp.asarray(self._cases.told), self._exact.start(self._cases)
        self._p = self._probabilities()
        self._waiting: list[int] = []  # tests whose meaning is asked for
        self._before = self._p
        felt = zip(diseases.SYMPTOMS, self._patient.symptom[0], strict=True)
        symptoms = tuple(code.replace(".", "") for code, has in felt if has)
        self._sex, self._age = "male" if self._patient.male[0] else "female", int(self._patient.age[0])
        names = {code.replace(".", ""): name.lower() for code, name in diseases.SYMPTOMS.items()}
        return self._observe([Opens(self._age, self._sex, symptoms)], names)

    def step(self, action: str) -> Transition:
        """Say something. Lines that are actions count; of several, all that mean something, else the last."""
        if self._over:
            raise RuntimeError(
                "Consultation.step after the end of the episode, or before reset: call reset(seed) first"
            )
        turns = [turn for line in action.splitlines() if (turn := read_action(line.strip())) is not None]
        means = [turn for turn in turns if isinstance(turn, Means)]
        if self._waiting:
            return self._mean(means) if means else self._refused()
        match turns[-1] if turns else None:
            case Asks(name) if name in self._names and self._orders < self._rules.horizon:
                return self._ask(self._names.index(name))
            case Diagnoses(codes) if codes:
                return self._diagnose(codes)
            case Abstains():
                return self._end(self._abstain, False)
        return self._refused()

    def _ask(self, index: int) -> Transition:
        tests = new_tests(self._rules, self._known, jnp.array([index], jnp.int32))
        if (np.asarray(tests) < 0).all():
            return self._refused()
        self._orders += 1
        self._before = self._p
        self._state = self._exact.learn(self._state, self._cases, tests)
        self._known, self._p = learn(self._known, tests), self._probabilities()
        gold = np.asarray(truth(self._cases))[0]
        gained = float(cross_entropy(gold, self._before) - cross_entropy(gold, self._p))
        asked = [int(k) for k in np.asarray(tests)[0] if k >= 0]
        said = [Result(CODES[k], *self._result(k)) for k in asked]
        self._waiting = asked if self._interprets else []
        return Transition(self._observe(said), self._confirmation * gained - self._cost, False, False, Info())

    def _mean(self, means: list[Means]) -> Transition:
        """Half for the words, half for what the results argue for; see `interpretation_score`."""
        words = {CODES[k]: self._word(k) for k in self._waiting}
        moved = dict(zip(CATEGORIES, (self._p - self._before).tolist(), strict=True))
        self._waiting = []
        reward = self._interpretation * interpretation_score(means, words, moved)
        return Transition(self._observe([]), reward, False, False, Info())

    def _diagnose(self, codes: tuple[str, ...]) -> Transition:
        named = list(dict.fromkeys(code[:3] for code in codes))[:PLACES]
        # A code that is no category is a wrong diagnosis like others: each gets a class that nobody has.
        ranked = [CATEGORIES.index(c) if c in CATEGORIES else len(CATEGORIES) + place for place, c in enumerate(named)]
        gold = jnp.pad(jnp.asarray(self._cases.gold), ((0, 0), (0, PLACES)))
        lists = jnp.array([ranked + [-1] * (PLACES - len(ranked))], jnp.int32)
        reward = float(diagnosis_reward(lists, gold, jnp.pad(self._weight, (0, PLACES)), k=PLACES)[0])
        return self._end(reward, bool(gold[0, ranked[0]]))

    def _end(self, reward: float, won: bool) -> Transition:
        self._over = True
        return Transition(self._observe([]), reward, True, False, Info(won=won, score=float(won)))

    def _refused(self) -> Transition:
        seen = self._observe([])
        return Transition(seen._replace(text=NOTHING), 0.0, False, False, Info(valid=False))

    def _probabilities(self) -> np.ndarray:
        return np.asarray(self._exact.probabilities(self._state))[0]

    def _result(self, k: int) -> tuple[float | None, str]:
        value = self._patient.value[0, k]
        return (None, "") if np.isnan(value) else (float(value), TESTS[CODES[k]].unit)

    def _word(self, k: int) -> str:
        value, unit = self._result(k)
        return interpret(CODES[k], value, unit, sex=self._sex, age=float(self._age)).word

    def _observe(self, said: Sequence[Turn], names: Mapping[str, str] | None = None) -> Observation:
        lines = []
        for turn in said:
            lines += [sentence(turn, self._seed, self._place, names), action(turn)]
            self._place += 1
        text = "\n".join(lines) or ("The consultation is over." if self._over else "Go on.")
        known = np.flatnonzero(np.asarray(self._known)[0]).tolist()
        anchor: Any = (tuple(known), bool(self._waiting))
        return Observation(text, TASK, self._left(), anchor)

    def _left(self) -> tuple[str, ...]:
        """The actions that would do something; with panels, of diagnoses and meanings one each, for their form."""
        if self._over:
            return ()
        if self._waiting:
            words = tuple(WORDS) if self._complete else ("normal",)
            towards = ((), *((code,) for code in CATEGORIES)) if self._complete else ((),)
            return tuple(action(Means(CODES[k], w, to)) for k in self._waiting for w in words for to in towards)
        known, orders = np.asarray(self._known)[0], []
        if self._orders < self._rules.horizon:
            fresh = [(row >= 0) & ~known[np.maximum(row, 0)] for row in np.asarray(self._rules.members)]
            orders = [action(Asks(name)) for name, new in zip(self._names, fresh, strict=True) if new.any()]
        named = CATEGORIES if self._complete else CATEGORIES[:1]
        return (*orders, *(action(Diagnoses((code,))) for code in named), action(Abstains()))

    def expert(self) -> str | None:
        """Asks for what tells most while that is more than .05 nats, reads results rightly, and diagnoses by Bayes."""
        if self._over:
            return None
        moved = self._p - self._before
        if self._waiting:
            towards = tuple(CATEGORIES[d] for d in np.argsort(-moved)[:1] if moved[d] > ROSE)
            return "\n".join(action(Means(CODES[k], self._word(k), towards)) for k in self._waiting)
        gain = self._exact.gain(self._state, self._cases)[0]
        gain[[not ((row >= 0) & ~np.asarray(self._known)[0][row]).any() for row in np.asarray(self._rules.members)]] = 0
        if self._orders < self._rules.horizon and gain.max() > 0.05:
            return action(Asks(self._names[int(gain.argmax())]))
        listed = 1 if self._complete else PLACES
        return action(Diagnoses(tuple(CATEGORIES[d] for d in np.argsort(-self._p)[:listed])))


def interpretation_score(means: list[Means], words: Mapping[str, str], moved: Mapping[str, float]) -> float:
    """How right it is what results are said to mean, in [0, 1]: half for words, half for directions.

    Args:
      means: what was said; of one test the first counts, and other tests than those of `words` do not.
      words: LOINC code -> what the reference says of the result.
      moved: category -> how far its probability rose with these results.

    Returns:
      Half the share of results with the right word, and half the share of the named diagnoses that rose by more than
      ROSE (to name one of several that rose is enough); where none is named, 1 if none rose.

    >>> interpretation_score([Means("3016-3", "high", ("E03",))], {"3016-3": "high"}, {"E03": 0.4, "I10": -0.4})
    1.0
    """
    said = {turn.code: turn.word for turn in reversed(means)}
    right = sum(said.get(code) == word for code, word in words.items()) / max(len(words), 1)
    named = {code[:3] for turn in means if turn.code in words for code in turn.towards}
    rose = {code for code, by in moved.items() if by > ROSE}
    direction = len(named & rose) / len(named) if named else float(not rose)
    return 0.5 * right + 0.5 * direction
