"""Signals reach a drawing program between drawings only."""

import signal

import pytest

from deploy.leaving import Leaving


def draw(leaving, number, then=None):
    """One drawing, in the middle of which a signal comes; what was done of it."""
    done = []
    with pytest.raises(then or KeyboardInterrupt), leaving.drawing():  # noqa: PT012
        signal.raise_signal(number)
        done.append("the rest")
        if then is not None:
            raise then
    return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_drawing(number):
    leaving, before = Leaving(), signal.getsignal(number)
    with leaving.handled():
        assert draw(leaving, number) == ["the rest"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_without_a_signal_nothing_is_raised():
    leaving = Leaving()
    with leaving.handled(), leaving.drawing():
        pass


def test_an_error_in_the_drawing_is_not_hidden():
    leaving = Leaving()
    with leaving.handled():
        assert draw(leaving, signal.SIGINT, then=ZeroDivisionError) == ["the rest"]
