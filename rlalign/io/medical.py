"""Clinical multiple-choice questions: MedQA, MedMCQA and MedXpertQA, as prompts that CRPO's rewards score.

    prompts = read_medical_questions("medqa/dev.jsonl", chat_encoding(tokenizer), form="medqa", max_tokens=1024)
    fit(..., prompts=of_split(prompts, "train"), eval_prompts=of_split(prompts, "held-out"), reward=crpo)

All three are JSON Lines, whatever their names end in. Research software: not for diagnosis or treatment.
"""

import functools
import os
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlalign.envs.verified import in_split
from rlalign.io.records import BadRecord, Examples, check_length, check_utf8, kind, member, read, token_ids
from rlalign.types import Demonstration, Encoding, Prompt

LETTERS = string.ascii_uppercase
CHOICES = "Answer Choices:"  # what MedXpertQA's questions repeat their options behind
INSTRUCTION = """\
Answer the clinical question below in two tagged sections. Inside <dx> and </dx> reason about the case: after \
"System 1:" your first impression from the findings, after "System 2:" a careful check of it against every finding and \
the other options. Then, inside <conclusion> and </conclusion>, conclude in your own words and in far fewer of them, \
naming the findings that decide. Behind it give the letter of your answer once, as \\boxed{letter}."""


class Question(NamedTuple):
    """A question as all forms have it; the answer is a letter."""

    text: str
    options: dict[str, str]
    answer: str


def read_medical_questions(
    path: str | os.PathLike[str],
    encode: Encoding,
    *,
    form: Literal["medqa", "medmcqa", "medxpertqa"],
    max_tokens: int,
    first_option: Literal[0, 1] = 1,
    instruction: str = INSTRUCTION,
    on_error: Literal["raise", "skip"] = "raise",
) -> Examples[Prompt]:
    """Reads the questions of a file.

    Args:
      path: UTF-8, one object a line, blank lines ignored.
      encode: chat_encoding(tokenizer), plain_encoding(tokenizer), or functions of your own, for prompt_text.
      form: "medqa": question, options {letter: text}, answer_idx. "medmcqa": question, opa to opd, cop. "medxpertqa":
        question, options {letter: text}, label; questions with images are bad records.
      max_tokens: longer prompts are left out and counted, which is no error.
      first_option: what MedMCQA's cop counts from: 1 in the data set's own files, 0 in those of the Hugging Face hub. A
        cop outside of it is an error whatever on_error says: the other answers would be off by one.
      instruction: stands before the question.
      on_error: "raise" at the first bad record, or "skip" all of them and count.
    Returns:
      Examples of Prompt; `id` is the line's index, `example` {"question", "options", "answer", "form"}, the question
      without its options, the answer a letter.
    Raises:
      FileNotFoundError: no such file.
      ValueError: another form; as read_prompts; a record without a question, with fewer than two options, or whose
        answer is none of them; by file and line, without its text.
    """
    make = functools.partial(_prompt, encode=encode, max_tokens=max_tokens, instruction=instruction)
    question_of = functools.partial(_form(form), first=first_option) if form == "medmcqa" else _form(form)

    def one(record: dict[str, Any], number: int) -> Prompt:
        return make(question_of(record), number, form)

    return read(path, one, max_tokens=max_tokens, id_field=None, on_error=on_error, noun="questions")


def read_medical_demonstrations(
    path: str | os.PathLike[str],
    encode: Encoding,
    *,
    form: Literal["medqa", "medmcqa", "medxpertqa"],
    max_tokens: int,
    max_response: int | None = None,
    response_field: str = "response",
    first_option: Literal[0, 1] = 1,
    instruction: str = INSTRUCTION,
    on_error: Literal["raise", "skip"] = "raise",
) -> Examples[Demonstration]:
    """Reads reasoning traces for a cold start: the same records, with a response.

    Args:
      max_tokens: of prompt and response; longer ones are left out and counted. Nothing is cut.
      max_response: of the response alone; None for no such bound.
      response_field: where a record keeps the trace, a text.
      path, encode, form, first_option, instruction, on_error: as for read_medical_questions.
    Raises:
      FileNotFoundError, ValueError: as read_medical_questions; a record without a response.
    """
    make = functools.partial(_prompt, encode=encode, max_tokens=max_tokens, instruction=instruction)
    question_of = functools.partial(_form(form), first=first_option) if form == "medmcqa" else _form(form)

    def one(record: dict[str, Any], number: int) -> Demonstration:
        prompt = make(question_of(record), number, form)
        said = _words(member(record, response_field), response_field)
        try:
            tokens = token_ids(encode.response(prompt.text, said), said, "encode.response", "see Encoding")
        except ValueError as error:
            raise BadRecord("bad response", f"field {response_field!r} is refused: {error}", "mend it") from None
        check_length(len(prompt.tokens) + tokens.size, max_tokens)
        if max_response is not None:
            check_length(tokens.size, max_response, "max_response")
        return Demonstration(prompt, tokens)

    return read(path, one, max_tokens=max_tokens, id_field=None, on_error=on_error, noun="traces")


def prompt_text(question: str, options: Mapping[str, str], *, instruction: str = INSTRUCTION) -> str:
    """What is asked: the instruction, the question, and a line for each option.

    >>> print(prompt_text("Which?", {"A": "One", "B": "Two"}, instruction="Answer."))
    Answer.
    <BLANKLINE>
    Question: Which?
    A: One
    B: Two
    """
    return "\n".join([f"{instruction}\n\nQuestion: {question}", *(f"{a}: {text}" for a, text in options.items())])


def of_split(prompts: Sequence[Prompt], split: str, *, half: Literal[0, 1] | None = None) -> tuple[Prompt, ...]:
    """The prompts that belong to a split by a hash of their question: see in_split.

    Args:
      prompts: of read_medical_questions.
      split: "train", its parts "policy" and "reward", or "held-out".
      half: one of two halves by another hash, such as those of a cold start and of what comes after; None for both.

    Raises:
      ValueError: an unknown split.
    """
    chosen = [prompt for prompt in prompts if in_split(prompt.example["question"], split)]
    halves = [zlib.crc32(b"half " + prompt.example["question"].encode()) >> 16 & 1 for prompt in chosen]
    return tuple(prompt for prompt, own in zip(chosen, halves, strict=True) if half in (None, own))


def _prompt(
    question: Question, number: int, form: str, *, encode: Encoding, max_tokens: int, instruction: str
) -> Prompt:
    text = prompt_text(question.text, question.options, instruction=instruction)
    tokens = token_ids(encode.prompt(text), text, "encode.prompt", "see Encoding")
    check_length(tokens.size, max_tokens)
    example = {"question": question.text, "options": question.options, "answer": question.answer, "form": form}
    return Prompt(id=number, tokens=tokens, text=text, example=example)


def _medqa(record: dict[str, Any]) -> Question:
    return _checked(record, _options(record), _letter(record, "answer_idx"), "answer_idx")


def _medmcqa(record: dict[str, Any], *, first: int) -> Question:
    number = member(record, "cop")
    detail = f"field 'cop' is no number from {first} to {first + 3}"
    if isinstance(number, bool) or not isinstance(number, int):
        raise BadRecord("bad answer", detail, "correct it")
    if not 0 <= number - first < len(_FIELDS):  # where counting begins elsewhere, all other answers are wrong too
        remedy = f"here options count from {first}: pass first_option={1 - first}, or remove records without an answer"
        raise BadRecord("bad answer", detail, remedy, of_all=True)
    options = {a: _words(member(record, name), name) for a, name in zip("ABCD", _FIELDS, strict=True)}
    return _checked(record, options, LETTERS[number - first], "cop")


_FIELDS = ("opa", "opb", "opc", "opd")


def _medxpertqa(record: dict[str, Any]) -> Question:
    if record.get("images"):
        raise BadRecord("images", "field 'images' is not empty", "models here read texts alone: use the Text subset")
    found = _checked(record, _options(record), _letter(record, "label"), "label")
    stem = found.text.partition(CHOICES)[0].strip()
    if not stem:
        raise BadRecord("empty text", f"field 'question' has nothing before {CHOICES!r}", "remove the record")
    return found._replace(text=stem)


FORMS: dict[str, Callable[..., Question]] = {"medqa": _medqa, "medmcqa": _medmcqa, "medxpertqa": _medxpertqa}


def _form(form: str) -> Callable[..., Question]:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    return FORMS[form]


def _checked(record: dict[str, Any], options: dict[str, str], answer: str, field: str) -> Question:
    text = _words(member(record, "question"), "question")
    if answer not in options:
        raise BadRecord("bad answer", f"field {field!r} names none of the {len(options)} options", "correct it")
    return Question(text, options, answer)


def _options(record: dict[str, Any]) -> dict[str, str]:
    found = member(record, "options")
    if not isinstance(found, dict):
        raise BadRecord("bad options", f"field 'options' is {kind(found)}, not an object", 'write {"A": "...", ...}')
    if len(found) < 2 or list(found) != list(LETTERS[: len(found)]):
        raise BadRecord("bad options", "field 'options' has not A, B, ... as its names, at least two", "rename them")
    return {letter: _words(text, f"options.{letter}") for letter, text in found.items()}


def _letter(record: dict[str, Any], field: str) -> str:
    return _words(member(record, field), field).upper()


def _words(value: Any, field: str) -> str:
    """A text that is not blank, trimmed."""
    if not isinstance(value, str):
        raise BadRecord("not a text", f"field {field!r} is {kind(value)}, not a text", "write a text")
    if not value.strip():
        raise BadRecord("empty text", f"field {field!r} is empty or blank", "remove the record")
    check_utf8(value, f"field {field!r}")
    return value.strip()
