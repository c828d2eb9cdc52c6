"""From what an agent has seen to the tokens of its next prompt, and from its answer to an action.

    (turns so far, observation) ─form─▶ i32[P] ─policy─▶ text ─parse─▶ action, whether it is valid

Two forms. `rebuilt`, GiGPO's: every prompt is written anew and shows the last few turns, so its length is bounded.
`transcript`: the episode so far, token by token, and the new observation behind it; then the rows of an episode are one
path of the token forest, and `pack` stores each turn once.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlalign.envs.protocol import Observation
from rlalign.models.tokenizer import Tokenizer
from rlalign.types import StopReason


class Turn(NamedTuple):
    """One step of an episode: what the policy was shown, what it answered, and what came of it.

    Attributes:
      observation: that it acted upon.
      prompt: i32[P].
      response: i32[R], the end token included where it was sampled.
      logp, behaviour_logp: f32[R], as in Rollouts.
      stop: StopReason.
      text: the response's.
      action: what the environment was told.
      valid: whether that was a valid action; None until the environment has said so.
      reward: of the step.
    """

    observation: Observation
    prompt: np.ndarray
    response: np.ndarray
    logp: np.ndarray
    behaviour_logp: np.ndarray
    stop: int
    text: str
    action: str
    valid: bool | None
    reward: float


Form = Callable[[Sequence[Turn], Observation], np.ndarray]
# (answer, admissible actions) -> action, whether it is valid; None leaves that to the environment
Parse = Callable[[str, Sequence[str]], tuple[str, bool | None]]
Render = Callable[[Sequence[Turn], int, Observation], str]  # (turns to show, steps taken, observation) -> text


def in_full(shown: Sequence[Turn], taken: int, observation: Observation) -> str:
    """The prompt of a language model: task, steps taken, last turns, observation, admissible actions, how to answer.

    >>> print(in_full([], 0, Observation("You see a door.", "Leave.", ("open door", "wait"))))
    You act in a world of text. Your task: Leave.
    You now see: You see a door.
    You can: open door; wait
    Think about what to do inside <think> </think>, then give one of these actions inside <action> </action>.
    """
    lines = [f"You act in a world of text. Your task: {observation.task}"]
    if taken:
        last = f" The last {len(shown)} of them:" if shown else ""
        lines.append(f"You have taken {taken} step{'s' * (taken > 1)}.{last}")
        lines += [f"You saw: {turn.observation.text}\nYou did: {turn.action}" for turn in shown]
    lines.append(f"You now see: {observation.text}")
    if observation.admissible:
        lines.append(f"You can: {'; '.join(observation.admissible)}")
    lines.append(
        "Think about what to do inside <think> </think>, then give one of these actions inside <action> </action>."
    )
    return "\n".join(lines)


def rebuilt(encode: Callable[[str], np.ndarray], *, history: int = 2, render: Render = in_full) -> Form:
    """The form that writes every prompt anew (GiGPO, arXiv 2505.10978, appendix).

    Args:
      encode: text -> i32[P], with the chat template where there is one: chat_encoding(tokenizer).prompt.
      history: how many turns are shown.
      render: the text, of the turns to show, the number of steps taken and the observation.

    Raises:
      ValueError: history below 0.
    """
    if history < 0:
        raise ValueError(f"history must be >= 0, got {history}")

    def form(past: Sequence[Turn], observation: Observation) -> np.ndarray:
        shown = past[len(past) - min(history, len(past)) :]
        return encode(render(shown, len(past), observation))

    return form


def transcript(begin: Callable[[Observation], np.ndarray], more: Callable[[Observation, bool], np.ndarray]) -> Form:
    """The form that only appends: the prompt before, the tokens that were sampled, then the new observation.

    Args:
      begin: first observation -> i32[P].
      more: (observation, whether the answer before it has its end token) -> i32[P], what stands between the answer and
        the place where the next one begins; with the end token first where the answer has none.
    """

    def form(past: Sequence[Turn], observation: Observation) -> np.ndarray:
        if not past:
            return begin(observation)
        last = past[-1]
        return np.concatenate([last.prompt, last.response, more(observation, last.stop == StopReason.EOS)])

    return form


def chat_transcript(tokenizer: Tokenizer, *, render: Render = in_full) -> Form:
    """A transcript in the turns of a chat template: the first message is `render`'s, later ones what is seen and can be
    done.

    Raises:
      ValueError: a template that writes an earlier turn otherwise once others follow.
    """

    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    def later(observation: Observation) -> str:
        can = f"\nYou can: {'; '.join(observation.admissible)}" if observation.admissible else ""
        return f"You now see: {observation.text}{can}"

    def more(observation: Observation, ended: bool) -> np.ndarray:
        return tokenizer.between("-", later(observation), ended=ended)

    return transcript(lambda observation: tokenizer.chat(ask(render([], 0, observation))), more)


def bare(answer: str, admissible: Sequence[str]) -> tuple[str, bool | None]:
    """The whole answer is the action; valid where it is admissible, or where the environment says so if that is not
    known.

    >>> bare("open door ", ["open door", "wait"])
    ('open door', True)
    """
    action = " ".join(answer.split())
    return action, action in admissible if admissible else None if action else False


_TAGGED = re.compile(r"<action>((?:(?!<action>).)*?)</action>", re.DOTALL)
_CJK = re.compile(r"[\u4e00-\u9fff]")


def tagged(answer: str, admissible: Sequence[str], *, official: bool = False) -> tuple[str, bool | None]:
    """The action is what stands in the last <action> </action>, lower case; "" where there is none.

    Args:
      answer: the policy's text.
      admissible: actions that would do something; empty where that is not known.
      official: valid as in GiGPO's code: both tags, <think> too, and no Chinese character, admissible or not. Ours asks
        for <action> and, where they are known, one of the admissible actions.

    >>> tagged("<think>a door</think><action>Open door</action>", ["open door"])
    ('open door', True)
    >>> tagged("open door", ["open door"])
    ('', False)
    """
    found = _TAGGED.findall(answer)
    action = " ".join(found[-1].lower().split()) if found else ""
    if official:
        thought = "<think>" in answer and "</think>" in answer
        return action, bool(found) and thought and not _CJK.search(answer)
    known = {" ".join(a.lower().split()): a for a in admissible}
    return known.get(action, action), action in known if known else None if action else False
