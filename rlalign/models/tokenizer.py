"""Text to tokens and back: a Hugging Face tokenizer and its chat template, the same for sampling and training.

A policy must be trained on the very tokens that it sampled. Decoding them and encoding the text again may give others
("re-tokenisation drift"), whose log-probs the sampler never computed. So a conversation is encoded turn by turn, each
turn once: what `chat` gives for sampling is, token for token, the beginning of what `dialogue` gives for training.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

SPARE = 8  # ids of a tokenizer that may lie beyond the model's vocabulary
Message = Mapping[str, str]  # {"role": "user", "content": "..."}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers, with what alignment needs of it.

    Attributes:
      inner: the tokenizer of transformers, for all that is not here.
      eos_ids: tokens that end a response: for SampleConfig.
    """

    inner: Any
    eos_ids: tuple[int, ...]

    def __len__(self) -> int:
        """Tokens of the vocabulary, the added ones too."""
        return len(self.inner)

    def sha256(self) -> str:
        """Hash of its vocabulary, its merges and its chat template: a run is continued with no other tokenizer."""
        whole = getattr(self.inner, "backend_tokenizer", None)
        known = [sorted(self.inner.get_vocab().items()), whole.to_str() if whole else None]
        known += [getattr(self.inner, "chat_template", None), list(self.eos_ids)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """i32[P] of a text, no special token added."""
        return np.asarray(self.inner.encode(text, add_special_tokens=False), np.int32)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids; with special=True the names of special tokens stay in it."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=not special)

    def chat(self, messages: Sequence[Message]) -> np.ndarray:
        """i32[P]: a conversation up to where the assistant begins to answer.

        Raises:
          ValueError: no chat template, no message, an assistant's message at the end, or one that the template refuses.
        """
        return np.concatenate([tokens for tokens, _ in self._turns(messages)])

    def dialogue(
        self, messages: Sequence[Message], *, learn: Literal["all", "last"] = "all"
    ) -> tuple[np.ndarray, np.ndarray]:
        """A conversation to imitate: tokens i32[P], and b[P] which of them to learn.

        Learnt are the assistant's words and the token that ends its turn; what the template puts behind that, and the
        turns of others, are not. For `pack`: sequences, with loss_mask.

        Args:
          messages: at least one of the assistant's.
          learn: every turn of the assistant, or the last alone.

        Raises:
          ValueError: as chat; no message of the assistant's, or one that the template ends with no end token; with
            learn="all", a template that writes an earlier turn otherwise once later ones follow, so that the model
            would learn what it never sees when it samples.
        """
        if learn not in ("all", "last"):
            raise ValueError(f"learn must be 'all' or 'last', got {learn!r}")
        _check_roles(messages)
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("a dialogue to learn from needs a message with role 'assistant'")
        turns = self._turns(messages, learn=learn)
        masks = [self._words(tokens) if learnt else np.zeros(len(tokens), bool) for tokens, learnt in turns]
        return np.concatenate([tokens for tokens, _ in turns]), np.concatenate(masks)

    def between(self, answer: str, message: str, *, ended: bool = True) -> np.ndarray:
        """i32[P]: what a dialogue has between the assistant's end token and its next turn, for a message of the user's.

        For transcripts that are continued token by token: prompt, sampled tokens, and this.

        Args:
          answer: some text of the assistant's, of which nothing is in the result.
          message: the user's.
          ended: whether the sampled tokens hold their end token; without it, it comes first.

        Raises:
          ValueError: as dialogue.
        """
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": answer}]
        turns = self._turns([*before, {"role": "user", "content": message}])
        if len(turns) < 3:
            raise ValueError("the chat template writes earlier turns otherwise once later ones follow: use `rebuilt`")
        said = turns[-2][0]
        words = self._words(said)
        end = said[:0] if ended else said[words][-1:]
        return np.concatenate([end, said[~words], turns[-1][0]])

    def drifted(self, responses: Iterable[Sequence[int]]) -> list[int]:
        """Which responses become other tokens when their text is encoded again.

        >>> drifted = tokenizer.drifted([tokenizer.encode("a text"), ...])    # doctest: +SKIP
        """
        out = []
        for number, ids in enumerate(responses):
            ids = np.asarray(ids, np.int32)
            if not np.array_equal(self.encode(self.decode(ids, special=True)), ids):
                out.append(number)
        return out

    def _words(self, tokens: np.ndarray) -> np.ndarray:
        """b[P], True up to the first end token."""
        ends = np.flatnonzero(np.isin(tokens, self.eos_ids))
        if not ends.size:
            raise ValueError(
                f"the chat template ends the assistant's turn {self.decode(tokens, special=True)!r:.80} with none of "
                f"eos_ids={self.eos_ids}: a model that learns it never stops; give Tokenizer(inner, eos_ids) its end"
            )
        return np.arange(len(tokens)) <= ends[0]

    def _turns(self, messages: Sequence[Message], *, learn: str | None = None) -> list[tuple[np.ndarray, bool]]:
        """(tokens, whether they are to be learnt) of each stretch of a conversation, encoded by itself.

        A stretch ends where the assistant begins or ends a turn; learn=None is a prompt, which ends with a beginning.
        """
        if not messages:
            raise ValueError("a conversation needs at least one message")
        _check_roles(messages)
        if learn is None and messages[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's and waits for no answer: drop it, or use dialogue")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        ends = [
            text for i in turns for text in (self._render(messages[:i]), self._render(messages[: i + 1], ask=False))
        ]
        ends.append(self._render(messages, ask=learn is None))
        if not _grows(ends) and learn != "all":
            ends = ends[-1:] if learn is None else ends[-3:]  # earlier turns were sampled elsewhere, or never
        if not _grows(ends):
            raise ValueError(
                "the chat template does not write a turn of the assistant's as it asks for it, or otherwise once "
                "later ones follow (as templates that drop earlier reasoning do), so that no model samples what this "
                "dialogue shows: try learn='last', with one dialogue for each turn"
            )
        texts = [end[len(start) :] for start, end in itertools.pairwise(["", *ends])]
        learnt = range(1, len(texts), 2) if learn == "all" else [len(texts) - 2] if learn == "last" else []
        return [(self.encode(text), number in learnt) for number, text in enumerate(texts)]

    def _render(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        import jinja2

        if self.inner.chat_template is None:
            raise ValueError(
                "no chat template in the folder: a base model, for encode; or set tokenizer.inner.chat_template"
            )
        try:
            text = self.inner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"the chat template refuses {[m.get('role') for m in messages]}: {error}") from error
        return str(text)


def _check_roles(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages):
        if "role" not in message or "content" not in message:
            raise ValueError(f"message {number} has {', '.join(message) or 'nothing'}: it needs role and content")


def _grows(texts: Sequence[str]) -> bool:
    return all(longer.startswith(text) for text, longer in itertools.pairwise(texts))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; imports transformers, which takes two seconds.

    Args:
      folder: with tokenizer.json (or what the tokenizer's class reads) and tokenizer_config.json. A response ends with
        generation_config.json's eos_token_id, else config.json's, else the tokenizer's own.

    Raises:
      FileNotFoundError: no folder.
      ValueError: code of the folder's own (auto_map), no end token, an end token or a tokenizer beyond the model's
        vocabulary.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; download the model first: rlalign.models.download(NAME, FOLDER)"
        )
    settings = _json(folder / "tokenizer_config.json")
    if settings.get("auto_map"):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} asks for code of its own (auto_map={settings['auto_map']}), which is "
            "never run: use a folder whose tokenizer transformers knows"
        )
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers reads: {error}") from error
    config = _json(folder / "config.json")
    eos = _json(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    eos = inner.eos_token_id if eos is None else eos
    if eos is None:
        raise ValueError(
            f"{folder} names no eos_token_id: no response would ever end; add it to generation_config.json"
        )
    eos_ids = tuple(eos) if isinstance(eos, list) else (int(eos),)
    # Models pad their vocabulary beyond the tokenizer's, not the other way round.
    vocab = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or len(inner)
    # But for a few added tokens that a model of text never sees (Gemma 3's image token); sampling checks each prompt.
    highest = max(*eos_ids, len(inner) - 1)
    if max(*eos_ids, len(inner) - 1 - SPARE) >= vocab:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {highest}, config.json's vocab_size is {vocab}: the two do not "
            "belong together, or tokens were added without widening the model"
        )
    return Tokenizer(inner, eos_ids)


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download the folder again") from error
