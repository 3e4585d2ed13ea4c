"""Stop strings are found wherever the text is cut, and nothing of them is shown."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.stop_strings import StopStrings


def expected(text: str, stop: list[str]) -> tuple[str, str | None]:
    """By trying every prefix: the first that ends with a stop string, the longest such string."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            match = max(matches, key=len)
            return text[: end - len(match)], match
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_any_cut_gives_what_a_search_of_the_whole_text_gives(pieces, stop):
    stops = StopStrings(stop)
    shown, seen = "", ""
    for piece in pieces:
        shown += stops.feed(piece)
        seen += piece
        # What is held back is a beginning of a stop string, no more than that.
        text, match = expected(seen, stop)
        assert text.startswith(shown)
        assert stops.matched == match
        if match is None:
            held = seen[len(shown) :]
            assert held == "" or any(s.startswith(held) and s != held for s in stop)
        else:
            assert shown == text
    if stops.matched is None:
        shown += stops.finish()
    assert (shown, stops.matched) == expected("".join(pieces), stop)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("xabcdx", ["abcd", "bc"], "xa"),
        ("xabcx", ["bc", "abc", "c"], "x"),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("abababac", ["ababac"], "ab"),
        ("零一二三", ["二"], "零一"),
        ("ab", ["abc"], "ab"),
    ],
)
def test_examples(text, stop, shown):
    stops = StopStrings(stop)
    got = "".join(stops.feed(char) for char in text)
    assert got + stops.finish() == shown


def test_text_without_stop_strings_is_never_held():
    assert StopStrings().feed("anything") == "anything"


def test_nothing_is_shown_after_a_match():
    stops = StopStrings(["x"])
    assert stops.feed("abxcd") == "ab"
    assert stops.feed("more") + stops.finish() == ""
