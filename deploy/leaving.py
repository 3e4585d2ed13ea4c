"""Ctrl-C and SIGTERM for programs that draw on the terminal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Leaving:
    """While `handled`, both signals raise KeyboardInterrupt, but never inside `drawing`.

    An exception in the middle of drawing leaves the drawing library unable to put the terminal
    back, so there the signal waits until the drawing is done.
    """

    def __init__(self) -> None:
        self._drawing = False
        self._asked = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        self._drawing = True
        try:
            yield
        finally:
            self._drawing = False
        if self._asked:
            raise KeyboardInterrupt

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True
        if not self._drawing:
            raise KeyboardInterrupt
