"""A small clinic in words: three findings, five diagnoses to choose from, and an answer in two sections.

    a man of 40 has fever , cough and crackles . A:pneumonia B:asthma C:meningitis D:migraine E:pyelonephritis
    <dx> System 1 : fever and cough suggest A:pneumonia . System 2 : crackles fits A:pneumonia , not B:asthma . </dx>
    <conclusion> fever with crackles means A:pneumonia </conclusion> \\boxed{A}

On it a policy from scratch shows in minutes what CRPO's rewards do (rlalign.rewards.clinical). There are two sheets of
options, each always in the same order, so that to know the diagnosis is to know its letter: tiny policies take long to
learn to look one up. The table is written by hand, for this purpose and from common knowledge: no source of medical
facts, and not for diagnosis or treatment. A tenth of the cases, a disease with three of its seven findings, is held out
by a hash, in whichever order and of whichever person the question tells of them.
"""

import functools
import re

import numpy as np

from rlalign.envs import verified
from rlalign.types import Demonstration, Encoding, Prompt

PAD, EOS = 0, 1
LETTERS = "ABCDE"
QUESTIONS = 4096
SHEETS = (
    {
        "pneumonia": ("fever", "cough", "crackles", "sputum", "dullness", "rigors", "tachypnea"),
        "asthma": ("wheezing", "cough", "atopy", "tightness", "dyspnea", "eczema", "hyperinflation"),
        "meningitis": ("fever", "headache", "stiffness", "purpura", "photophobia", "confusion", "seizures"),
        "migraine": ("headache", "photophobia", "aura", "nausea", "vertigo", "scotoma", "phonophobia"),
        "pyelonephritis": ("fever", "dysuria", "pyuria", "chills", "nausea", "hematuria", "bacteriuria"),
    },
    {
        "gout": ("podagra", "tophi", "swelling", "erythema", "nephrolithiasis", "hyperuricemia", "tenderness"),
        "anemia": ("pallor", "fatigue", "dyspnea", "vertigo", "koilonychia", "palpitations", "pica"),
        "hypothyroidism": ("fatigue", "goiter", "bradycardia", "dryness", "constipation", "myxedema", "hoarseness"),
        "appendicitis": ("nausea", "guarding", "anorexia", "leukocytosis", "fever", "rebound", "vomiting"),
        "cirrhosis": ("jaundice", "ascites", "spiders", "asterixis", "fatigue", "varices", "splenomegaly"),
    },
)
DISEASES = {name: findings for sheet in SHEETS for name, findings in sheet.items()}
AGES = ("20", "40", "60", "80")
PERSONS = ("man", "woman")
FOREIGN = ("→", "因此", "≈")  # what CRPO's third term counts as not effective
BOXES = tuple(f"\\boxed{{{letter}}}" for letter in LETTERS)
_SAID = "a of has and , . : suggest fits not with means the answer is clear now System"
_TAGS = ("<dx>", "</dx>", "<conclusion>", "</conclusion>")
WORDS = tuple(
    dict.fromkeys(
        [
            *_SAID.split(),
            *_TAGS,
            *("1", "2", *AGES),
            *PERSONS,
            *(finding for findings in DISEASES.values() for finding in findings),
            *(f"{letter}:{name}" for sheet in SHEETS for letter, name in zip(LETTERS, sheet, strict=True)),
            *BOXES,
            *FOREIGN,
        ]
    )
)
_IDS = {word: number for number, word in enumerate(WORDS, start=EOS + 1)}
VOCAB_SIZE = len(WORDS) + EOS + 1
ANSWER_TOKENS = 40


def encode(text: str) -> np.ndarray:
    """i32 ids of the words between spaces; case counts, as in CRPO's tags and labels."""
    return np.array([_IDS[word] for word in text.split()], np.int32)


def decode(ids) -> str:
    """The text of ids, without padding and end.

    >>> decode([*encode("fever and cough"), EOS])
    'fever and cough'
    """
    return " ".join(WORDS[i - EOS - 1] for i in map(int, ids) if i > EOS)


ENCODING = Encoding(encode, lambda prompt, text: np.append(encode(text), np.int32(EOS)))


@functools.cache
def problems(split: str) -> tuple[Prompt, ...]:
    """All questions of a split, see verified.in_split; their `example` is what rewards.clinical takes.

    >>> problem = problems("held-out")[0]
    >>> problem.example["options"][problem.example["answer"]] in DISEASES
    True
    """
    made = {one.text: one for one in map(problem, range(QUESTIONS))}
    return tuple(one for one in made.values() if verified.in_split(case(one), split))


def case(problem: Prompt) -> str:
    """What a question asks, apart from its person, age and order: the disease and its findings."""
    disease = problem.example["options"][problem.example["answer"]]
    return f"{disease} with {', '.join(sorted(_findings(problem)))}"


def problem(number: int) -> Prompt:
    """The question of a number: three findings of a disease, all of which no other option has."""
    rng = np.random.default_rng((2512, number))
    sheet = SHEETS[rng.integers(len(SHEETS))]
    options = dict(zip(LETTERS, sheet, strict=True))
    answer = LETTERS[rng.integers(len(LETTERS))]
    findings = rng.permutation(sheet[options[answer]])[:3].tolist()
    person, age = PERSONS[rng.integers(len(PERSONS))], AGES[rng.integers(len(AGES))]
    question = f"a {person} of {age} has {findings[0]} , {findings[1]} and {findings[2]} ."
    text = f"{question} {' '.join(f'{letter}:{name}' for letter, name in options.items())}"
    return Prompt(number, encode(text), text, {"question": question, "options": options, "answer": answer})


def written(problem: Prompt, letter: str, *, against: str) -> str:
    """An honest answer: it argues for one option against another.

    Args:
      problem: of this module.
      letter, against: of its options.
    """
    options = problem.example["options"]
    name, other = (f"{one}:{options[one]}" for one in (letter, against))
    first, second, third = _findings(problem)
    return (
        f"<dx> System 1 : {first} and {second} suggest {name} . System 2 : {third} fits {name} , not {other} . </dx> "
        f"<conclusion> {first} with {third} means {name} </conclusion> \\boxed{{{letter}}}"
    )


def trace(
    problem: Prompt, rng: np.random.Generator, *, wrong: float, malformed: float, detached: float, foreign: float
) -> str:
    """An answer to imitate, with the faults of traces that nobody has checked.

    Args:
      problem: what it answers.
      rng: what draws the faults.
      wrong: probability that it argues for a wrong option.
      malformed: that a tag, a section or a label is missing, or the box there twice or not at all.
      detached: that its conclusion refers to nothing, or copies a part of the reasoning.
      foreign: that signs stand in it that are no ASCII.
    """
    answer = problem.example["answer"]
    others = [letter for letter in LETTERS if letter != answer]
    other = others[rng.integers(len(others))]
    letter, against = (other, answer) if rng.random() < wrong else (answer, other)
    text = written(problem, letter, against=against)
    if rng.random() < detached:
        first, second, _ = _findings(problem)
        copy = f"{first} and {second} suggest {letter}:{problem.example['options'][letter]}"
        told = copy if rng.random() < 0.5 else "the answer is clear now"
        text = re.sub("<conclusion>.*</conclusion>", f"<conclusion> {told} </conclusion>", text)
    if rng.random() < malformed:
        text = _FAULTS[rng.integers(len(_FAULTS))](text)
    if rng.random() < foreign:
        sign = FOREIGN[rng.integers(len(FOREIGN))]
        text = text.replace(" suggest ", f" {sign} {sign} {sign} suggest ").replace(" fits ", f" {sign} {sign} fits ")
    return text


_FAULTS = (
    lambda text: text.replace(" </dx>", ""),
    lambda text: text.replace("<conclusion> ", ""),
    lambda text: text.replace("System 2 : ", ""),
    lambda text: re.sub("<conclusion>.*</conclusion> ", "", text),
    lambda text: f"{text} {text.split()[-1]}",
    lambda text: text.rpartition(" ")[0],
)


def demonstrations(split: str, *, seed: int = 0, **faults: float) -> tuple[Demonstration, ...]:
    """A trace of each question of a split, see trace; the faults follow from the seed and the question's number."""
    made = ((one, np.random.default_rng((seed, one.id))) for one in problems(split))
    return tuple(Demonstration(one, ENCODING.response(one.text, trace(one, rng, **faults))) for one, rng in made)


def _findings(problem: Prompt) -> list[str]:
    said = problem.example["question"].split(" has ")[1]
    return [word for word in said.split() if word not in (",", "and", ".")]
