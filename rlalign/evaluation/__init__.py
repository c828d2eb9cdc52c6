"""Evaluation: how good a policy is, and how sure that number is.

    evaluate_answers    accuracy and pass@k of sampled answers, by a reward in killable workers
    perplexity          of held-out demonstrations
    judge_win_rate      against reference answers, in both positions; endpoint_compare asks a language model
    harness_model       a policy as a model of lm-eval-harness: its tasks by their names

Each gives an Estimate with its interval where there is one; `interval` is that over seeds.
"""

from rlalign.evaluation.answers import AnswerScores, evaluate_answers
from rlalign.evaluation.estimates import Estimate, WinRate, interval, pass_at_k, share, wilson, win_rate
from rlalign.evaluation.harness import harness_model
from rlalign.evaluation.judged import judge_win_rate
from rlalign.evaluation.perplexity import Perplexity, perplexity
from rlalign.rewards.pairwise import endpoint_compare, make_pairwise_judge
from rlalign.rewards.tasks import gsm8k, humaneval

__all__ = [
    "AnswerScores",
    "Estimate",
    "Perplexity",
    "WinRate",
    "endpoint_compare",
    "evaluate_answers",
    "gsm8k",
    "harness_model",
    "humaneval",
    "interval",
    "judge_win_rate",
    "make_pairwise_judge",
    "pass_at_k",
    "perplexity",
    "share",
    "wilson",
    "win_rate",
]
