"""Episodes to write a page of, and the page as the tree that a browser makes of it."""

import html.parser
import json

from rlalign.io.trajectories import write_trajectories

VOID = ("meta", "br", "img", "link", "input", "path", "rect")


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.inside = tag, attributes, parent, []

    def __getitem__(self, name):
        return self.attributes.get(name)

    @property
    def classes(self):
        return (self["class"] or "").split()

    @property
    def text(self):
        parts = [one if isinstance(one, str) else one.text for one in self.inside]
        return " ".join("".join(parts if self.tag in ("pre", "code") else [f" {part} " for part in parts]).split())

    def all(self, tag=None, kind=None, **attributes):
        """Elements below, in the page's order."""
        for one in self.inside:
            if isinstance(one, Node):
                if (
                    tag in (None, one.tag)
                    and (kind is None or kind in one.classes)
                    and all(one[k] == v for k, v in attributes.items())
                ):
                    yield one
                yield from one.all(tag, kind, **attributes)

    def one(self, tag=None, kind=None, **attributes):
        (found,) = self.all(tag, kind, **attributes)
        return found


class Page(html.parser.HTMLParser):
    """The tree of a page; a tag that is not closed in order is an error."""

    def __init__(self, text):
        super().__init__()
        self.root = self.here = Node("", {}, None)
        self.feed(text)
        assert self.here is self.root

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        node = Node(tag, dict(attrs), self.here)
        self.here.inside.append(node)
        if tag not in VOID:
            self.here = node

    def handle_startendtag(self, tag, attrs):
        self.here.inside.append(Node(tag, dict(attrs), self.here))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.here.tag == tag
            self.here = self.here.parent

    def handle_data(self, data):
        self.here.inside.append(data)


def turn(action="go to fridge 1", anchor=0, advantage=0.5, episode=0.2, step=0.3, **more):
    return {
        "observation": f"you see state {anchor}.",
        "admissible": ["go to fridge 1", "go to sinkbasin 1"],
        "answer": f"<think>well</think><action>{action}</action>",
        "action": action,
        "valid": True,
        "reward": 0.0,
        "anchor": anchor,
        "advantage": advantage,
        "episode": episode,
        "step": step,
        "tokens": 87,
    } | more


def episode(turns=(), **more):
    return {
        "step": 40,
        "split": "train",
        "group": 0,
        "seed": 12,
        "copy": 0,
        "end": "WON",
        "reason": "",
        "score": 1.0,
        "return": 10.0,
        "task": "put a clean apple in the fridge",
        "last": "you put it there.",
        "turns": list(turns),
    } | more


def write(folder, episodes, more=""):
    (folder / "episodes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in episodes) + more)
    return folder


def page_of(folder, episodes, more="", **limits):
    return Page(write_trajectories(write(folder, episodes, more), **limits).read_text(encoding="utf-8")).root


def turns_of(page):
    return list(page.all("li", "turn"))


def three_copies():
    """State 5 is seen four times, in three copies; two actions were taken there."""
    other = "go to sinkbasin 1"
    return [
        episode([turn(anchor=5, advantage=0.61), turn(anchor=7), turn(anchor=5, advantage=0.41)]),
        episode([turn(other, anchor=5, advantage=-0.4, step=-0.6)], copy=1, end="TRUNCATED", score=0.0),
        episode([turn(anchor=5, advantage=9.0)], copy=2, end="DIED", reason="exit code 9", last=None),
        episode([turn(anchor=5, advantage=None, episode=None, step=None)], split="held-out"),
    ]


def without(record, name):
    return {key: value for key, value in record.items() if key != name}
