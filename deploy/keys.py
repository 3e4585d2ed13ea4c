"""Single key presses from the terminal, while waiting."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def pressed_keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds at most and returns the key pressed, "" for none.

    Keys are neither echoed nor need Enter; Ctrl-C interrupts as ever. Where stdin is no terminal
    the function only waits.
    """
    if not sys.stdin.isatty():
        yield _wait
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield lambda timeout_s: _key(terminal, timeout_s)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _wait(timeout_s: float) -> str:
    time.sleep(timeout_s)
    return ""


def _key(terminal: int, timeout_s: float) -> str:
    readable, _, _ = select.select([terminal], [], [], timeout_s)
    return os.read(terminal, 1).decode(errors="replace") if readable else ""
