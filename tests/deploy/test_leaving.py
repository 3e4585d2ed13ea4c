"""Signals reach a drawing program between drawings only."""

import signal

import pytest

from deploy.leaving import Leaving


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_drawing(number):
    leaving, drawn = Leaving(), []
    before = signal.getsignal(number)
    with leaving.handled():
        with pytest.raises(KeyboardInterrupt), leaving.drawing():
            signal.raise_signal(number)
            drawn.append("all of it")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert drawn == ["all of it"]
    assert signal.getsignal(number) is before


def test_without_a_signal_nothing_is_raised():
    leaving = Leaving()
    with leaving.handled(), leaving.drawing():
        pass


def test_an_error_in_the_drawing_is_not_hidden():
    leaving = Leaving()
    with leaving.handled(), pytest.raises(ZeroDivisionError), leaving.drawing():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError
