"""WebShop over HTTP: a copy is a browser without pictures on a server of princeton-nlp/WebShop that runs beside it.

    world = WebShop("http://127.0.0.1:3000", first=500, goals=6410)  # its server: python -m web_agent_site.app
    world.reset(7).task  # "Find me machine wash men's shorts ..."
    world.step("search[machine wash shorts]"); world.step("click[b09q37jqzc]"); world.step("click[buy now]")

Pages are followed as they are served: forms, product links and options lead where they say, so another version of the
site works as long as it marks them alike (see Page). A query's session is `fixed_N`, which WebShop gives its N-th goal;
what it then shows follows from the address alone, so copies share sessions. A server draws some prices when it starts:
equal seeds and actions give equal texts from one server, but a restarted one may score them differently.
"""

import ast
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request

from rlalign.envs.adapters import Clock
from rlalign.envs.page import Link, Page
from rlalign.envs.protocol import Info, Observation, Transition

ACTION = re.compile(r"\s*(search|click)\[(.+)\]\s*", re.IGNORECASE)
SECRET_SEARCH = re.compile(
    r"\s*<\w>"
)  # WebShop's own: <r> random products, <c>, <q>, <a> by category, query, attribute
QUERY_LENGTH = 200  # characters; longer ones can be refused by the search engine
PAGE_BYTES = 1 << 22
REWARD = 10.0
HOW = "Search with search[words]."


class WebShop:
    """Find and buy what the task describes: `search[words]`, then `click[what is shown]` until `click[buy now]`.

    The reward is 10 where the score is 1, else 0; `info.score` is WebShop's own, in [0, 1]. Texts are WebShop's simple
    ones, with [SEP] between what a page shows, without the task, which observations have apart, and with the options
    chosen before them. Admissible are the clicks of the page; none where it searches, as any words will do there.

    Args:
      url: of the server.
      goals: how many of its goals are tasks.
      first: the first one's number: a seed s is goal first + s % goals. WebShop's own split has 0 to 499 for tests.
      session: how a session is called; WebShop reads the goal from the number behind the last `_`.
      seconds: a request may take, retries included.
      horizon: steps until an episode is truncated.
      attempts: how often a request is tried while the server does not answer or fails (status 5xx). WebShop can, when
        two copies buy in one session at once; its pages may be asked for again.

    Raises:
      ValueError: goals below 1, first below 0, an address that is not http, limits below 1 or not above 0.
      RuntimeError: no answer, or one that is not WebShop's; a step before `reset` or after the end.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:3000",
        *,
        goals: int = 500,
        first: int = 0,
        session: str = "fixed_{goal}",
        horizon: int = 15,
        seconds: float = 30.0,
        attempts: int = 3,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"url is {url!r}: give the server's address, such as http://127.0.0.1:3000")
        if goals < 1 or first < 0:
            raise ValueError(f"goals is {goals}, first is {first}: must be at least 1, and at least 0")
        if session.split("_")[-1] != "{goal}" or "fixed" not in session:
            raise ValueError(f"session is {session!r}: WebShop knows a goal by a name such as 'fixed_{{goal}}'")
        if attempts < 1 or not seconds > 0:
            raise ValueError(f"attempts is {attempts}, seconds is {seconds}: must be at least 1, and above 0")
        self._url, self._session, self._goals = url.rstrip("/"), session, range(first, first + goals)
        self._seconds, self._attempts = seconds, attempts
        # No proxy: it is a server of one's own. No redirect to another: nothing a page says leads elsewhere.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({}), _SameServer(parts.netloc)).open
        self._clock = Clock("WebShop", horizon)
        self._page, self._task = Page("", ""), ""

    def reset(self, seed: int) -> Observation:
        """Begin the task of goal first + seed % goals."""
        seed = self._clock.start(seed)
        session = self._session.format(goal=self._goals[seed % len(self._goals)])
        page = self._fetch(Link(f"{self._url}/{session}"))
        if not page.task:
            raise RuntimeError(f"{page.url} shows no instruction: is a WebShop server at {self._url}?")
        self._page, self._task = page, page.task
        self._clock.run()
        return self._observation()

    def step(self, action: str) -> Transition:
        """Search or click; anything else, and what the page does not offer, leaves the page as it is."""
        last, link = self._clock.tick(action), self._link(action)
        if link is None:
            return Transition(self._observation(), 0.0, False, last, Info(valid=False))
        try:
            self._page = self._fetch(link)
        except RuntimeError:
            self._clock.stop()
            raise
        reward = self._page.reward
        if reward is None:
            return Transition(self._observation(), 0.0, False, last, Info())
        self._clock.stop()
        info = Info(won=reward >= 1.0, score=min(max(reward, 0.0), 1.0))
        return Transition(self._observation(), REWARD * info.won, True, False, info)

    def close(self) -> None:
        """Nothing is left open between requests; an episode that goes on ends."""
        self._clock.stop()

    def _link(self, action: str) -> Link | None:
        match = ACTION.fullmatch(action)
        if match is None:
            return None
        kind, what = match[1].lower(), match[2].strip().lower()
        if kind == "click":
            return self._page.clickable.get(what)
        what = " ".join(what.replace("/", " ").split())  # the site's addresses cannot hold a slash
        if self._page.search is None or not what or len(what) > QUERY_LENGTH or SECRET_SEARCH.match(what):
            return None
        address, field = self._page.search
        return Link(address, {field: what})

    def _observation(self) -> Observation:
        page = self._page
        chosen, anchor = _place(page.url, self._url)
        clicked = [f"You have clicked {value}." for _, value in chosen] if page.reward is None else []
        text = " [SEP] ".join(clicked + page.texts + [HOW] * (page.search is not None))
        clicks = () if page.search else tuple(f"click[{what}]" for what in page.clickable)
        return Observation(text, self._task, clicks, anchor)

    def _fetch(self, link: Link) -> Page:
        """Follow a link; a page that is none, and an answer that does not come, are RuntimeErrors."""
        if not link.url.startswith(self._url + "/"):
            raise RuntimeError(f"{self._url} leads to {link.url:.200}, which is another server's: use a WebShop server")
        deadline = time.monotonic() + self._seconds
        data = None if link.form is None else urllib.parse.urlencode(link.form).encode()
        request = urllib.request.Request(urllib.parse.quote(link.url, safe="%/:?=&#+!$,;'()*[]~@"), data=data)
        failure = ""
        for attempt in range(self._attempts):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                with self._open(request, timeout=left) as answer:
                    return Page(answer.url, _read(answer, deadline))
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}"
                error.close()
                if error.code < 500:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                failure = str(getattr(error, "reason", error))
            time.sleep(min(0.05 * 2**attempt, max(deadline - time.monotonic(), 0.0)))
        raise RuntimeError(
            f"no page of {request.full_url:.200} in {self._seconds} s: {failure}; is WebShop running there?"
        )


def _place(url: str, base: str) -> tuple[list[tuple[str, str]], str]:
    """The options chosen, sorted, and the state: the address without the session, the same for any order of clicks."""
    parts = [urllib.parse.unquote(part) for part in url.removeprefix(base).strip("/").split("/")]
    kind, rest = (parts[0], parts[2:]) if len(parts) > 1 else ("start", [])
    chosen = []
    if rest and rest[-1].startswith("{"):
        try:
            chosen = sorted((str(name), str(value)) for name, value in ast.literal_eval(rest[-1]).items())
        except (ValueError, SyntaxError, AttributeError):
            raise RuntimeError(f"{url:.300} does not end in the options: use a WebShop server") from None
        rest[-1] = repr(chosen)
    return chosen, "/".join([kind, *rest])


def _read(answer, deadline: float) -> str:
    """A page's text; TimeoutError where it drips in until after the deadline."""
    chunks, size = [], 0
    while chunk := answer.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > PAGE_BYTES:
            raise ValueError(f"a page of more than {PAGE_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the page came too slowly")
    return b"".join(chunks).decode("utf-8", "replace")


class _SameServer(urllib.request.HTTPRedirectHandler):
    def __init__(self, netloc: str):
        self._netloc = netloc

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).netloc != self._netloc:
            raise OSError(f"it leads to another server, {newurl:.100}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
