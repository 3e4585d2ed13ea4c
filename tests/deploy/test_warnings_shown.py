"""Warnings of a simulation as the terminal shows them."""

from deploy.simulate.warnings_shown import shown_warnings


def test_extrapolations_take_one_line_and_others_one_each() -> None:
    warnings = ["extrapolated: a", "requests refused: 7", "extrapolated: b", "extrapolated: c"]
    assert list(shown_warnings(warnings)) == [
        "warning: requests refused: 7",
        "warning: extrapolated: a and 2 more, see --json",
    ]
    assert list(shown_warnings(["extrapolated: a"])) == ["warning: extrapolated: a"]
    assert list(shown_warnings([])) == []
