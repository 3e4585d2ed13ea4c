"""Finds stop strings in text that arrives in pieces, and holds back what may become one.

Works character by character, so how the text is cut into pieces changes nothing: the stop string
that is complete first wins, and the longest of those complete at the same character.
"""

from collections.abc import Iterable


class StopStrings:
    """`feed` returns what is certain to come before any stop string; `matched` ends it all.

    With `include`, the stop string that was found is shown too.
    """

    def __init__(self, stop: Iterable[str] = (), *, include: bool = False) -> None:
        self.matched: str | None = None
        self._include = include
        self._prefixes = [_Prefix(text) for text in stop]
        self._held = ""

    def feed(self, text: str) -> str:
        """Take in more text; returns what may be shown. Nothing after a match."""
        if self.matched is not None or not self._prefixes:
            return text if self.matched is None else ""
        text = self._held + text
        for end in range(len(self._held), len(text)):
            for prefix in self._prefixes:
                prefix.advance(text[end])
            complete = [prefix.text for prefix in self._prefixes if prefix.is_complete]
            if complete:
                self.matched = max(complete, key=len)
                self._held = ""
                return text[: end + 1 - (0 if self._include else len(self.matched))]
        shown = len(text) - max(prefix.length for prefix in self._prefixes)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text still held back, when no more comes."""
        held, self._held = self._held, ""
        return held


class _Prefix:
    """The longest prefix of one stop string that the text so far ends with.

    Knuth, Morris, Pratt 1977: constant time per character, on average, whatever the stop string.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders = [0]  # of each prefix: its longest proper prefix that is its suffix as well
        for char in text[1:]:
            border = self._extend(self._borders[-1], char)
            self._borders.append(border)

    @property
    def is_complete(self) -> bool:
        return self.length == len(self.text)

    def advance(self, char: str) -> None:
        self.length = self._extend(self.length, char)

    def _extend(self, length: int, char: str) -> int:
        while length and self.text[length] != char:
            length = self._borders[length - 1]
        return length + (self.text[length] == char)
