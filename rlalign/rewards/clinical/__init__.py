"""Rewards of clinical questions: CRPO's terms, letters and votes, and how reasoning uses its case.

    crpo_reward(completion, "B", question)          {"accuracy", "reasoning", "consistency", "total"}
    fit(..., reward=crpo)                           the same of a prompt's example; crpo_code, accuracy_alone
    majority_vote(map(boxed_letter, completions))   of the samples of one question

Pure functions of texts. Research software: not a medical device, not for diagnosis or treatment.
"""

from rlalign.rewards.clinical.answers import LetterAccuracy, letter_accuracy, majority_vote
from rlalign.rewards.clinical.crpo import accuracy_alone, crpo, crpo_code, crpo_reward
from rlalign.rewards.clinical.text import boxed_letter

__all__ = [
    "LetterAccuracy",
    "accuracy_alone",
    "boxed_letter",
    "crpo",
    "crpo_code",
    "crpo_reward",
    "letter_accuracy",
    "majority_vote",
]
