"""Rewards of public tasks, for training and for evaluation: GSM8K's numbers, HumanEval's programs.

    gsm8k_prompts = read_prompts("gsm8k/test.jsonl", encode, max_tokens=512, field="question")
    humaneval_prompts = read_prompts("HumanEval.jsonl", encode, max_tokens=1024, id_field="task_id")

Plain functions of a text and the record of its prompt, 1.0 or 0.0: `fit(reward=gsm8k, decode=tokenizer.decode)`.
"""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from rlalign.rewards.process import INSIDE

SECONDS = 3.0  # that a program of HumanEval may run: the default of OpenAI's human-eval
ENDS = (
    "\nclass",
    "\ndef",
    "\n#",
    "\nif",
    "\nprint",
    "\n```",
)  # where a function has ended: arXiv 2107.03374, section 2.1
FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
NUMBER = re.compile(
    r"((?<![\w.)])[-−]\s?)?"  # a sign, where it has no operand before it
    r"[$€£]?\s?"
    r"((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # commas between groups of three
    r"(?:\s?/\s?(\d+))?"
)
MAX_DIGITS = 100  # more are no answer, and take Python long


def gsm8k(completion: str, example: dict) -> float:
    """1.0 if the completion's number is that of the reference, else 0.0 (GSM8K: Cobbe et al. 2021, arXiv 2110.14168).

    Args:
      completion: see final_number.
      example: its `answer` ends in "#### 1,234", as in the data set, or is a number.

    Raises:
      ValueError: a reference without a number, a completion that is no text.

    >>> gsm8k("So they pay $1,234.00 in all.", {"answer": "2 * 617 = 1234 #### 1,234"})
    1.0
    """
    wanted = final_number(str(example["answer"]))
    if wanted is None:
        raise ValueError(f"the reference answer {str(example['answer'])[-80:]!r} holds no number")
    return float(final_number(_text(completion)) == wanted)


def final_number(text: str) -> Fraction | None:
    """The number that a solution ends with: the first after "####", else the last in the last \\boxed{}, else the last.

    Commas between thousands, currency signs, units and what LaTeX puts between are dropped; 3/4 and \\frac{3}{4} are
    fractions, and 50% is 50. None where there is no number.

    >>> final_number("#### -1,234.50 dollars"), final_number("\\\\boxed{\\\\frac{3}{4}}, 7 steps")
    (Fraction(-2469, 2), Fraction(3, 4))
    """
    text = re.sub(r"\\[dt]?frac\s?\{(-?\d+)\}\s?\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\\[,!;:]|\\(?=\$)", "", text.replace("{,}", ","))
    if "####" in text:
        numbers = NUMBER.findall(text.rpartition("####")[2])[:1]
    else:
        boxed = _boxed(text)
        numbers = NUMBER.findall(text if boxed is None else boxed)[-1:]
    if not numbers or sum(map(len, numbers[0])) > MAX_DIGITS:
        return None
    sign, number, divisor = numbers[0]
    if divisor and not int(divisor):
        return None
    value = Fraction(number.replace(",", "")) / int(divisor or 1)
    return -value if sign else value


def _boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds; None where there is none."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for place, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return rest[:place]
    return rest if found else None  # cut off in it


def humaneval(completion: str, example: dict) -> float:
    """1.0 if the program passes its tests within 3 seconds, else 0.0 (HumanEval: Chen et al. 2021, arXiv 2107.03374).

    The completion goes on from example["prompt"], up to where the function ends (ENDS); or it is a whole answer with a
    ``` block, or with a definition of the function, as chat models give. The program runs as a process of its own, in a
    folder that is removed, under the worker's memory limit. It counts as passed when it has come to its last line,
    behind the tests: to leave with status 0 before is no pass. Not a security sandbox, see RewardGuard.

    Args:
      completion: what the model wrote.
      example: a record of HumanEval.jsonl: prompt, test (which defines `check`) and entry_point.

    Raises:
      RuntimeError: called outside a reward worker.
      ValueError: a completion that is no text, an entry_point that is no name.

    >>> with RewardGuard(humaneval, workers=4, time_limit=10.0) as guard:    # doctest: +SKIP
    ...     found = evaluate_answers(decoder, params, prompts, guard, config=config, ks=(1, 10), decode=decode)
    """
    if not os.environ.get(INSIDE):
        raise RuntimeError(
            "humaneval runs programs that a model wrote, in reward workers only: give it to RewardGuard, score, fit or "
            "evaluate_answers rather than call it"
        )
    name = example["entry_point"]
    if not str(name).isidentifier():
        raise ValueError(f"entry_point {name!r} is no name of a function")
    lines = [example["prompt"] + program_of(completion, name), example["test"], f"check({name})"]
    return float(_comes_to_its_end("\n".join(lines)))


def program_of(completion: str, name: str) -> str:
    """What of a completion is program: its first ``` block, all of it if it defines `name`, else up to ENDS.

    >>> program_of("    return 1\\n\\ndef other():", "f"), program_of("Sure!\\n```\\ndef f():\\n  pass\\n```\\n", "f")
    ('    return 1\\n', '\\ndef f():\\n  pass')
    """
    text = _text(completion)
    block = FENCE.search(text)
    if block and text.lstrip("\n")[:1] not in (" ", "\t"):  # behind an indented line the first ``` closes a block
        return "\n" + block[1]  # of a prompt that goes on behind its docstring, a new definition or the body
    if re.search(rf"^(?:async )?def {re.escape(name)}\b", text, re.MULTILINE):
        return "\n" + text
    return cut(text, ENDS)


def cut(text: str, ends: Iterable[str]) -> str:
    """The text before the first of `ends`.

    >>> cut("one. Q: two", ["Q:", "."])
    'one'
    """
    return text[: min((at for end in ends if end and (at := text.find(end)) >= 0), default=len(text))]


def _comes_to_its_end(program: str) -> bool:
    """Whether a program runs, in time, to the line behind its last, which writes what it cannot have guessed."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(dir=".") as folder, tempfile.TemporaryFile() as said:
        end = f"\n__import__('os').write({said.fileno()}, b'{word}')\n"
        Path(folder, "program.py").write_text(program + end, encoding="utf-8", errors="replace")
        with contextlib.suppress(subprocess.TimeoutExpired):
            # In the worker's process group, which the guard ends; no pipe, which a process left behind would hold open.
            subprocess.run(
                [sys.executable, "-B", "program.py"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(said.fileno(),),
                timeout=SECONDS,
                check=False,
            )
        said.seek(0)
        return said.read(len(word) + 1) == word.encode()


def _text(completion: object) -> str:
    if not isinstance(completion, str):
        raise ValueError(f"the completion is a {type(completion).__name__}, not a text: give decode=")
    return completion
