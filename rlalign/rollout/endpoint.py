"""A server of OpenAI's protocol, and one request to it with the tries that it takes."""

import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.request

TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP codes that another try may not meet


@dataclasses.dataclass(frozen=True)
class Engine:
    """Where to ask.

    Args:
      url: of the API, such as http://localhost:8000/v1.
      model: the name under which the server serves it.
      key: the name of an environment variable with the API key; None for none.
      timeout: seconds for all samples of one prompt.
      retries: further tries of a request that found no server, or met a code of TRANSIENT; 1, 2, 4 ... seconds apart.

    Raises:
      ValueError: a URL that is none.
    """

    url: str
    model: str
    # What follows does not make it another engine: runs may be continued with others.
    key: str | None = dataclasses.field(default=None, compare=False)
    timeout: float = dataclasses.field(default=600.0, compare=False)
    retries: int = dataclasses.field(default=4, compare=False)

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"Engine.url={self.url!r} must begin with http:// or https://, and usually ends in /v1")
        if self.timeout <= 0 or self.retries < 0:
            raise ValueError(f"need timeout > 0 and retries >= 0, got {self.timeout} and {self.retries}")


class EngineError(RuntimeError):
    """The server did not give what was asked for; the text names it, the prompt and the remedy."""


def choices(engine: Engine, path: str, body: dict, what: str) -> list[dict]:
    """The choices that the server answers to POST url/path, after as many tries as it takes.

    Args:
      engine: the server.
      path: such as "completions".
      body: of the request.
      what: named in errors.

    Raises:
      EngineError: no server, no choices, or no API key.
    """
    headers = {"Content-Type": "application/json"}
    if engine.key is not None:
        if engine.key not in os.environ:
            raise EngineError(f"Engine.key={engine.key!r}: no such environment variable; set it to the API key")
        headers["Authorization"] = f"Bearer {os.environ[engine.key]}"
    url = f"{engine.url.rstrip('/')}/{path}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for attempt in range(engine.retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=engine.timeout) as answer:
                return list(json.loads(answer.read())["choices"])
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.read(2000).decode(errors='replace')[:300]}"
            again = error.code in TRANSIENT
        except (OSError, http.client.HTTPException) as error:  # no server, a broken line
            why, again = f"{type(error).__name__}: {error}", True
        except (ValueError, KeyError, TypeError) as error:  # no JSON, no choices
            why, again = f"{type(error).__name__}: {error}", False
        if not again or attempt == engine.retries:
            break
        time.sleep(2.0**attempt)
    raise EngineError(f"{url}, {what}, after {attempt + 1} tries: {why}")


def chat(engine: Engine, instruction: str, text: str, *, max_tokens: int, what: str) -> str:
    """What a chat model answers at temperature 0; "" where it thought for all its tokens.

    Args:
      engine: the server.
      instruction: the system's message.
      text: the user's.
      max_tokens: of the answer.
      what: named in errors.

    Raises:
      EngineError: as choices; an answer without a message.
    """
    messages = [{"role": "system", "content": instruction}, {"role": "user", "content": text}]
    body = {"model": engine.model, "messages": messages, "temperature": 0.0, "max_tokens": max_tokens}
    given = choices(engine, "chat/completions", body, what)
    try:
        said = given[0]["message"]["content"] or ""  # null: it thought for all its tokens
        if not isinstance(said, str):
            raise TypeError("its content is no text")
        return said
    except (IndexError, KeyError, TypeError) as error:
        raise EngineError(
            f"{engine.url}: the answer has no message ({type(error).__name__}: {error}): is this a chat model?"
        ) from None
