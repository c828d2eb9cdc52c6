"""Demonstrations and preferences from JSON Lines files, and the encodings that make tokens of them.

    {"prompt": "2 + 2 = ", "response": "4"}                                           a demonstration
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}                            a preference
    {"chosen": [..., {"role": "assistant", "content": "4"}], "rejected": [..., {"role": "assistant", "content": "5"}]}

A response is encoded behind its prompt as the policy would write it there: what is learnt is what could be sampled.
"""

import os
from typing import Any, Literal, NamedTuple

import numpy as np

from rlalign.io.records import BadRecord, Examples, check_length, check_utf8, kind, member, read, token_ids
from rlalign.models.tokenizer import Tokenizer
from rlalign.types import Conversation, Demonstration, Encoding, Preference, Prompt

BEYOND = ("tool_calls", "reasoning_content", "thinking")  # parts of an answer that its content leaves out


def chat_encoding(tokenizer: Tokenizer) -> Encoding:
    """Encoding by the tokenizer's chat template, the same on both sides; a text is one message of the user's.

    Prompt and response together are the tokens of the dialogue up to the assistant's end token; what the template
    writes behind that is left out.

    Raises:
      ValueError: no chat template. Called: a conversation that the template refuses, or an answer that writes the end
        token itself.
    """
    if tokenizer.inner.chat_template is None:
        raise ValueError("the tokenizer has no chat template: use plain_encoding, or set tokenizer.inner.chat_template")

    def response(prompt: Conversation, text: str) -> np.ndarray:
        _check_end(tokenizer, text)
        dialogue = [*_messages(prompt), {"role": "assistant", "content": text}]
        tokens, learnt = tokenizer.dialogue(dialogue, learn="last")
        return tokens[learnt]

    return Encoding(lambda prompt: tokenizer.chat(_messages(prompt)), response)


def plain_encoding(tokenizer: Tokenizer) -> Encoding:
    """Encoding for a base model: the texts as they are, and the end token behind a response.

    Raises:
      ValueError: called: messages, which need a chat template; an answer that writes the end token itself.
    """

    def prompt(value: Conversation) -> np.ndarray:
        if not isinstance(value, str):
            raise ValueError("messages need a chat template: use chat_encoding, or write the prompt as one text")
        return tokenizer.encode(value)

    def response(_: Conversation, text: str) -> np.ndarray:
        _check_end(tokenizer, text)
        return np.append(tokenizer.encode(text), np.int32(tokenizer.eos_ids[0]))

    return Encoding(prompt, response)


def read_demonstrations(
    path: str | os.PathLike[str],
    encode: Encoding,
    *,
    max_tokens: int,
    max_response: int | None = None,
    prompt_field: str = "prompt",
    response_field: str = "response",
    messages_field: str = "messages",
    id_field: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Examples[Demonstration]:
    """Reads responses to imitate from a JSON Lines file: UTF-8, one object a line, blank lines ignored.

    A record has a prompt (a text, or messages) and a response (a text, or a list of one message of the assistant's), or
    else messages, of which the last is the assistant's and is the response, and those before it are the prompt.

    Args:
      path: the file.
      encode: chat_encoding(tokenizer), plain_encoding(tokenizer), or two functions of your own.
      max_tokens: of prompt and response; longer ones are left out and counted, which is no error. Nothing is cut.
      max_response: of the response alone; None for no such bound.
      prompt_field, response_field, messages_field: where a record keeps them. A prompt beside messages must be in them.
      id_field: as for read_prompts.
      on_error: "raise" at the first bad record, or "skip" all of them and count.
    Returns:
      Examples of Demonstration; `prompt.example` is the whole record.
    Raises:
      FileNotFoundError: no such file.
      ValueError: as read_prompts; a record of another form, with two responses or an empty one, or that `encode`
        refuses by a ValueError.
      TypeError: encode is no Encoding, or returns no list of token ids.
    """
    _check_encoding(encode)

    def make(record: dict[str, Any], number: int) -> Demonstration:
        if response_field in record and messages_field in record:
            detail = f"both {response_field!r} and {messages_field!r}: two responses"
            raise BadRecord("two responses", detail, "remove one or name another field")
        if messages_field in record:
            answer = _answer(record[messages_field], messages_field)
            if answer.before is None:
                detail = f"field {messages_field!r} holds no message that is answered"
                raise BadRecord("no prompt", detail, "put the prompt before the answer")
        else:
            answer = _answer(member(record, response_field), response_field)
            if answer.before is not None:
                detail = f"field {response_field!r} is a whole conversation"
                raise BadRecord("not a response", detail, f"name it {messages_field!r}")
        asked = _prompt(record, prompt_field, answer, messages_field)
        prompt = _encoded_prompt(encode, asked, record, number)
        response = _encoded_response(encode, asked, answer)
        _check_lengths(prompt, max_tokens, max_response, response)
        return Demonstration(prompt, response)

    return read(path, make, max_tokens=max_tokens, id_field=id_field, on_error=on_error, noun="demonstrations")


def read_preferences(
    path: str | os.PathLike[str],
    encode: Encoding,
    *,
    max_tokens: int,
    max_response: int | None = None,
    prompt_field: str = "prompt",
    chosen_field: str = "chosen",
    rejected_field: str = "rejected",
    id_field: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Examples[Preference]:
    """Reads pairs of a better and a worse response from a JSON Lines file: UTF-8, one object a line.

    A record has a prompt (a text, or messages) and two responses (texts, or lists of one message of the assistant's);
    or the two are whole conversations that differ in the last message, the assistant's, and need no prompt beside them.

    Args:
      path: the file.
      encode: chat_encoding(tokenizer), plain_encoding(tokenizer), or two functions of your own.
      max_tokens: of the prompt and the longer response; longer ones are left out and counted, which is no error.
      max_response: of the longer response alone; None for no such bound.
      prompt_field, chosen_field, rejected_field: where a record keeps them.
      id_field: as for read_prompts.
      on_error: "raise" at the first bad record, or "skip" all of them and count.
    Returns:
      Examples of Preference; `prompt.example` is the whole record.
    Raises:
      FileNotFoundError, TypeError: as read_demonstrations.
      ValueError: the same, and for responses that are equal, or conversations that begin differently.
    """
    _check_encoding(encode)

    def make(record: dict[str, Any], number: int) -> Preference:
        chosen, rejected = (_answer(member(record, field), field) for field in (chosen_field, rejected_field))
        if chosen.before != rejected.before:
            detail = f"fields {chosen_field!r} and {rejected_field!r} answer different conversations"
            raise BadRecord("different prompts", detail, "let them differ in the last message alone")
        asked = _prompt(record, prompt_field, chosen, chosen_field)
        prompt = _encoded_prompt(encode, asked, record, number)
        better, worse = (_encoded_response(encode, asked, answer) for answer in (chosen, rejected))
        if np.array_equal(better, worse):
            detail = f"fields {chosen_field!r} and {rejected_field!r} are the same response"
            raise BadRecord("equal responses", detail, "remove the record")
        _check_lengths(prompt, max_tokens, max_response, better, worse)
        return Preference(prompt, better, worse)

    return read(path, make, max_tokens=max_tokens, id_field=id_field, on_error=on_error, noun="preferences")


def _check_encoding(encode: Any) -> None:
    if not isinstance(encode, Encoding):
        raise TypeError(
            f"encode is {type(encode).__name__}, must be Encoding(prompt, response): chat_encoding(tokenizer), "
            "plain_encoding(tokenizer), or two functions of your own"
        )


class _Answer(NamedTuple):
    """What a field says the assistant answered; `before` are the messages that the same field holds before it."""

    field: str
    text: str
    before: list[dict[str, Any]] | None


def _answer(value: Any, field: str) -> _Answer:
    if isinstance(value, str):
        check_utf8(value, f"field {field!r}")
        before, text = None, value
    elif isinstance(value, list):
        *before, last = _conversation(value, field)
        if last["role"] != "assistant":
            detail = f"field {field!r} ends with a message of role {last['role']!r}"
            raise BadRecord("no answer", detail, "end it with the assistant's")
        lost = [name for name in BEYOND if last.get(name)]
        if lost:
            detail = f"the answer in field {field!r} has {lost[0]!r} beside its content"
            raise BadRecord("more than content", detail, "write that into the content, as the model is to write it")
        before, text = before or None, last["content"]
    else:
        remedy = "write a text, or a list of messages"
        raise BadRecord("not a response", f"field {field!r} is {kind(value)}, not a response", remedy)
    if not text.strip():
        raise BadRecord("empty response", f"the response in field {field!r} is empty or blank", "remove the record")
    return _Answer(field, text, before)


def _prompt(record: dict[str, Any], field: str, answer: _Answer, whole: str) -> Conversation:
    """What is answered: the record's prompt, or the conversation before the answer, which must hold that prompt."""
    if answer.before is not None and field not in record:
        return _question(answer.before, whole)
    asked = _question(member(record, field), field)
    if answer.before is None or asked == answer.before:
        return asked
    if isinstance(asked, str) and asked.strip() in [message["content"].strip() for message in answer.before]:
        return _question(answer.before, whole)
    detail = f"field {field!r} is not what field {whole!r} answers"
    raise BadRecord("different prompts", detail, "correct one, or name another field")


def _question(value: Any, field: str) -> Conversation:
    """A text, or messages of which the last waits for the assistant; not blank."""
    if isinstance(value, str):
        check_utf8(value, f"field {field!r}")
        last = value
    elif isinstance(value, list):
        message = _conversation(value, field)[-1]
        if message["role"] == "assistant":
            detail = f"field {field!r} asks for an answer to the assistant's own message"
            raise BadRecord("no question", detail, "end the prompt before it")
        last = message["content"]
    else:
        remedy = "write a text, or a list of messages"
        raise BadRecord("not a prompt", f"field {field!r} is {kind(value)}, not a prompt", remedy)
    if not last.strip():
        raise BadRecord("empty prompt", f"the prompt in field {field!r} is empty or blank", "remove the record")
    return value


def _conversation(value: list, field: str) -> list[dict[str, Any]]:
    """Messages, checked one by one."""
    if not value:
        raise BadRecord("no messages", f"field {field!r} is an empty list", "remove the record")
    for number, message in enumerate(value):
        place = f"message {number} of field {field!r}"
        if not isinstance(message, dict):
            remedy = 'write {"role": ..., "content": ...}'
            raise BadRecord("not a message", f"{place} is {kind(message)}, not an object", remedy)
        for name in ("role", "content"):
            part = message.get(name)
            if not isinstance(part, str):
                was = f"{kind(part)} as" if name in message else "no"
                raise BadRecord("not a message", f"{place} has {was} {name}", f"give it a text as {name}")
            check_utf8(part, place)
    return value


def _encoded_prompt(encode: Encoding, asked: Conversation, record: dict[str, Any], number: int) -> Prompt:
    tokens = _encoded(encode.prompt, "encode.prompt", asked)
    if not tokens.size:
        raise BadRecord("no tokens", "the prompt gives no tokens", "remove the record")
    return Prompt(number, tokens, _written(asked), record)


def _encoded_response(encode: Encoding, asked: Conversation, answer: _Answer) -> np.ndarray:
    tokens = _encoded(encode.response, "encode.response", asked, answer.text)
    if not tokens.size:
        detail = f"the response in field {answer.field!r} gives no tokens"
        raise BadRecord("no tokens", detail, "let encode.response end it with the end token")
    return tokens


def _encoded(function: Any, name: str, *given: Any) -> np.ndarray:
    """What one function of an Encoding makes of a record; what it refuses is a bad record."""
    try:
        tokens = function(*given)
    except ValueError as error:
        raise BadRecord("refused by encode", f"{name} refuses it: {error}", "correct the record") from error
    return token_ids(tokens, given[-1], name, "use chat_encoding or plain_encoding of a Tokenizer")


def _check_lengths(prompt: Prompt, max_tokens: int, max_response: int | None, *responses: np.ndarray) -> None:
    longest = max(response.size for response in responses)
    check_length(prompt.tokens.size + longest, max_tokens)
    if max_response is not None:
        check_length(longest, max_response, "max_response")


def _written(asked: Conversation) -> str:
    """A prompt as a person reads it."""
    if isinstance(asked, str):
        return asked
    return asked[0]["content"] if len(asked) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in asked)


def _messages(prompt: Conversation) -> list[Any]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _check_end(tokenizer: Tokenizer, text: str) -> None:
    """Refuses an answer inside which sampling would have stopped."""
    ends = np.isin(tokenizer.encode(text), tokenizer.eos_ids)
    if ends.any():
        end = tokenizer.decode([tokenizer.encode(text)[ends.argmax()]], special=True)
        raise ValueError(f"the answer writes the end token {end!r} itself, and nothing is sampled behind that")
