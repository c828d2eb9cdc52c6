"""What an agent is shown, and what its answers do."""

import numpy as np
import pytest

from rlalign.envs.imitation import shown_by_expert
from rlalign.envs.prompting import Turn, bare, chat_transcript, in_full, rebuilt, tagged
from rlalign.envs.protocol import Observation
from rlalign.envs.words import EOS, Words
from rlalign.models.tokenizer import load_tokenizer
from tests.envs.corridor import Corridor
from tests.models.tokenizers import CHATML, FORGETS, save_tokenizer


def turn(text, action, prompt=(1,), response=(2,), stop=0):
    none = np.zeros(len(response), np.float32)
    observation = Observation(text, "leave", ("a", "b"))
    return Turn(observation, np.array(prompt), np.array(response), none, none, stop, action, action, True, 0.0)


def test_the_full_prompt_shows_the_last_turns_and_says_how_many_there_were():
    past = [turn(f"room {i}", f"go {i}") for i in range(4)]
    assert in_full(past[2:], 4, Observation("a door", "leave", ("open", "wait"))) == (
        "You act in a world of text. Your task: leave\n"
        "You have taken 4 steps. The last 2 of them:\n"
        "You saw: room 2\nYou did: go 2\n"
        "You saw: room 3\nYou did: go 3\n"
        "You now see: a door\n"
        "You can: open; wait\n"
        "Think about what to do inside <think> </think>, then give one of these actions inside <action> </action>."
    )


@pytest.mark.parametrize(("history", "seen"), [(0, []), (2, ["c", "d"]), (9, ["a", "b", "c", "d"])])
def test_history_is_as_long_as_asked_for(history, seen):
    got = []
    form = rebuilt(lambda text: np.zeros(1), history=history, render=lambda shown, taken, _: got.append((shown, taken)))
    form([turn(x, x) for x in "abcd"], Observation("e", "leave"))
    assert [t.action for t in got[0][0]] == seen
    assert got[0][1] == 4


def test_a_chat_transcript_is_the_tokens_of_the_dialogue(tmp_path):
    """Prompt, sampled answer and what follows are, token for token, what the template writes of the whole dialogue."""
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, CHATML))
    form = chat_transcript(tokenizer, render=lambda shown, taken, observation: f"begin {observation.text}")
    first = form([], Observation("ab", "leave", ("x", "y")))
    answer = np.append(tokenizer.encode("abc"), np.int32(tokenizer.eos_ids[0]))
    second = form([turn("ab", "abc", first, answer)], Observation("cab", "leave", ("x",)))
    talk = [
        {"role": "user", "content": "begin ab"},
        {"role": "assistant", "content": "abc"},
        {"role": "user", "content": "You now see: cab\nYou can: x"},
    ]
    np.testing.assert_array_equal(second, tokenizer.chat(talk))
    cut = form([turn("ab", "abc", first, answer[:-1], stop=1)], Observation("cab", "leave", ("x",)))
    np.testing.assert_array_equal(cut, second)


def test_a_template_that_forgets_cannot_be_continued(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, FORGETS))
    assert tokenizer.between("2", "next").size  # this answer has nothing to forget
    with pytest.raises(ValueError, match="writes earlier turns otherwise once later ones follow: use `rebuilt`"):
        tokenizer.between("<think>hm</think>2", "next")


KNOWN = ("go to fridge 1", "look")


@pytest.mark.parametrize(
    ("answer", "ours", "official"),
    [
        ("<think>x</think><action>go to fridge 1</action>", ("go to fridge 1", True), True),
        ("<think>x</think><action> Go  to fridge 1 </action>", ("go to fridge 1", True), True),
        ("<think>x</think><action>fly</action>", ("fly", False), True),
        ("<action>look</action>", ("look", True), False),
        ("<think>冰箱</think><action>look</action>", ("look", True), False),
        ("<think>x</think><action>fly</action> no, <action>look</action>", ("look", True), True),
        ("look", ("", False), False),
        ("<think>x</think><action></action>", ("", False), True),
        ("<action>look", ("", False), False),
        ("<think>x</think><action>look<</action>", ("look<", False), True),
        ("<action>" * 5000 + "look</action>", ("look", True), False),
    ],
)
def test_tagged_answers(answer, ours, official):
    assert tagged(answer, KNOWN) == ours
    assert tagged(answer, KNOWN, official=True) == (ours[0], official)


def test_without_admissible_actions_the_environment_says_what_is_valid():
    assert tagged("<action>fly</action>", ()) == ("fly", None)
    assert tagged("fly", ()) == ("", False)
    assert tagged("<think>up</think><action>fly</action>", (), official=True) == ("fly", True)
    assert bare(" fly  home ", ()) == ("fly home", None)
    assert bare("", ()) == ("", False)
    assert bare("fly", KNOWN) == ("fly", False)


def test_words_are_tokens():
    words = Words(["search", "red", "shirt", "[", "]", "click", "buy", "now", "4", "."])
    for text in ("search[red shirt]", "click[buy now]", "shirt 4."):
        assert words.decode([*words.encode(text), EOS, 0]) == text
    with pytest.raises(ValueError, match=r"'blue' in 'a? ?blue shirt' is not in the vocabulary of 10 words"):
        words.encode("blue shirt")
    with pytest.raises(ValueError, match="holds a word twice"):
        Words(["a", "a"])


def test_phrases_are_tokens_where_they_are_whole():
    words = Words(["go to", "go to the", "go", "to", "the", "shelf", "shelf 1", "1", "12", ","])
    tokens = lambda text: [words.decode([i]) for i in words.encode(text)]
    assert tokens("Go  to the shelf 1, go") == ["go to the", "shelf 1", ",", "go"]  # the longest, spaces as they may
    assert tokens("go to shelf 12") == ["go to", "shelf", "12"]  # no part of a word
    assert tokens("to go to go") == ["to", "go to", "go"]  # from the left
    text = "go to the shelf 1, shelf 12"
    assert words.decode(words.encode(text)) == text
    with pytest.raises(ValueError, match="holds a word twice, 'go to'"):
        Words(["go to", "Go  to"])
    for wrong in ("abc", ["a", " "]):
        with pytest.raises(ValueError, match="must be a list of words, none of them empty"):
            Words(wrong)
    with pytest.raises(ValueError, match="read-only"):
        words.encode("go")[0] = 3


class Knowing(Corridor):
    """A corridor with an expert, who gives up after two steps where told to."""

    def __init__(self, gives_up=False):
        super().__init__()
        self.gives_up = gives_up

    def expert(self):
        return None if self.gives_up and self.taken == 2 else "right"


def test_demonstrations_of_an_expert():
    form = rebuilt(lambda text: np.array([len(text)]), history=1, render=lambda shown, taken, seen: "x" * (taken + 1))
    how = {"form": form, "encode": lambda action: np.array([{"left": 1, "right": 2}[action]])}
    shown = shown_by_expert(Knowing(), [0, 1], **how)
    assert [(s.prompt.example["task"], s.prompt.example["step"]) for s in shown] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]
    assert [int(s.prompt.tokens[0]) for s in shown] == [1, 2, 3, 1, 2]
    assert all(s.response.tolist() == [2] for s in shown)
    whole = shown_by_expert(Knowing(), [0, 1], **how, learn="all")
    assert [w.response.tolist() for w in whole] == [[2]] * 5, "prompts of one token"
    longer = shown_by_expert(Knowing(), [0], **(how | {"form": lambda *_: np.array([7, 8])}), learn="all")
    assert (longer[0].prompt.tokens.tolist(), longer[0].response.tolist()) == ([7], [8, 2])
    noisy = shown_by_expert(Knowing(), range(50), **how, noise=0.5)
    share = np.mean([s.response[0] == 1 for s in noisy])
    assert 0.15 < share < 0.35, "half of half of them"
    again = shown_by_expert(Knowing(), range(50), **how, noise=0.5)
    assert [s.response.tolist() for s in again] == [s.response.tolist() for s in noisy]
    with pytest.raises(ValueError, match="the expert has nothing to do in task 0 after 2 steps"):
        shown_by_expert(Knowing(gives_up=True), [0], **how)
    with pytest.raises(ValueError, match=r"Corridor has no expert\(\)"):
        shown_by_expert(Corridor(), [0], **how)
    with pytest.raises(ValueError, match=r"noise is 2, must lie in \[0, 1\]"):
        shown_by_expert(Knowing(), [0], **how, noise=2)
