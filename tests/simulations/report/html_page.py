"""A page as a browser would take it apart, by the standard library's parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "hr", "img", "input", "link"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Every element below with this tag and these attributes; `class_` holds one of several."""
        found = []
        for child in self.children:
            if (not tag or child.tag == tag) and child.has(attributes):
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    def one(self, tag: str = "", **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    def has(self, attributes: dict[str, str]) -> bool:
        for name, value in attributes.items():
            have = self.attributes.get(name.rstrip("_")) or ""
            if (value not in have.split()) if name == "class_" else (value != have):
                return False
        return True

    def words(self) -> str:
        """All text below, with single spaces."""
        return " ".join(" ".join([self.text, *(c.words() for c in self.children)]).split())


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.here = Element("", {})

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, dict(attrs), self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag, attrs):
        self.here.children.append(Element(tag, dict(attrs), self.here))

    def handle_endtag(self, tag):
        assert self.here.tag == tag, f"</{tag}> where <{self.here.tag}> is open"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.text += f" {data}"


def parsed(page: Path | str) -> Element:
    """The page's root; AssertionError where elements are not closed in order."""
    parser = _Parser()
    parser.feed(page if isinstance(page, str) else page.read_text(encoding="utf-8"))
    parser.close()
    assert parser.here is parser.root, f"<{parser.here.tag}> is not closed"
    return parser.root
