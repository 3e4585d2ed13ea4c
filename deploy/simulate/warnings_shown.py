"""A result's warnings on a terminal: what was extrapolated takes one line, however much it was."""

from collections.abc import Iterator, Sequence

_EXTRAPOLATED = "extrapolated: "


def shown_warnings(warnings: Sequence[str]) -> Iterator[str]:
    """Lines to print; extrapolations beyond the first are counted, --json has all of them."""
    extrapolated = [text for text in warnings if text.startswith(_EXTRAPOLATED)]
    yield from (f"warning: {text}" for text in warnings if text not in extrapolated)
    if extrapolated:
        more = f" and {len(extrapolated) - 1} more, see --json" if len(extrapolated) > 1 else ""
        yield f"warning: {extrapolated[0]}{more}"
