"""What a WebShop page shows and where it leads, with the standard library's parser."""

import html.parser
import urllib.parse
from typing import NamedTuple

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
UNSEEN = {"head", "script", "style", "title", "iframe"}


class Link(NamedTuple):
    """Where something leads: by GET, or by POST of the fields of a form."""

    url: str
    form: dict[str, str] | None = None


class Page:
    """A page.

    Attributes:
      url: its own.
      texts: what can be read on it, without the instruction; of the last page only the thanks and the score, as the
        rest is for the people who run a study, and hidden.
      task: the instruction; "" where there is none.
      search: the address and the field of the search form; None where there is none.
      clickable: text in small letters -> where it leads: buttons (class btn), products (class product-link), and the
        options (radio inputs, by their data-url).
      reward: of the last page, in [0, 1]; None of another.
    """

    def __init__(self, url: str, source: str):
        self.url = url
        parser = _Parser()
        parser.feed(source)
        parser.close()
        self.task = " ".join(parser.instruction).removeprefix("Instruction:").strip()
        self.search = None
        if parser.search is not None:
            self.search = urllib.parse.urljoin(url, parser.search[0]), parser.search[1]
        self.clickable = {what: Link(urllib.parse.urljoin(url, to), form) for what, to, form in parser.links if what}
        self.texts, self.reward = parser.texts, None
        if parser.reward:
            try:
                self.reward = float(parser.reward[-1])
            except ValueError:
                raise RuntimeError(f"{url:.200} gives the score {parser.reward[-1]!r:.40}, not a number") from None
            self.texts = parser.thanks + parser.reward


class _Tag(NamedTuple):
    name: str
    id: str
    classes: tuple[str, ...]
    unseen: bool
    to: str  # an address: a form's, a link's


class _Parser(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open: list[_Tag] = []
        self.texts: list[str] = []
        self.instruction: list[str] = []
        self.thanks: list[str] = []
        self.reward: list[str] = []
        self.links: list[tuple[str, str, dict[str, str] | None]] = []
        self.search: tuple[str, str] | None = None

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        if tag == "input":
            self._input(given)
        if tag in VOID:
            return
        hidden = "hidden" in given or "display:none" in given.get("style", "").replace(" ", "")
        to = given.get("href" if tag == "a" else "action", "")
        classes = tuple(given.get("class", "").split())
        self.open.append(_Tag(tag, given.get("id", ""), classes, hidden or tag in UNSEEN, to))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        for place in reversed(range(len(self.open))):
            if self.open[place].name == tag:  # with what was left open inside; an end of nothing is ignored
                del self.open[place:]
                return

    def handle_data(self, data):
        text = " ".join(data.split())
        if not text or any(tag.unseen for tag in self.open):
            return
        within = {tag.id for tag in self.open}
        if "instruction-text" in within and "Current Query:" not in text:
            self.instruction.append(text)
            return
        for inside, texts in (("thankyou", self.thanks), ("reward", self.reward)):
            if inside in within:
                texts.append(text)
        self.texts.append(text)
        self._click(text)

    def _click(self, text: str) -> None:
        """Note what the text is of: a button leads where its form does."""
        form = next((tag for tag in reversed(self.open) if tag.name == "form"), None)
        for tag in reversed(self.open):
            if "product-link" in tag.classes:
                self.links.append((text.lower(), tag.to, None))
            elif "btn" in tag.classes and form is not None and (self.search is None or form.to != self.search[0]):
                self.links.append((text.lower(), form.to, {}))

    def _input(self, given: dict[str, str]) -> None:
        if given.get("type") == "radio":
            self.links.append((given.get("value", "").lower(), given.get("data-url", ""), None))
        elif given.get("id") == "search_input":
            form = next((tag.to for tag in reversed(self.open) if tag.name == "form"), "")
            self.search = form, given.get("name", "search_query")
