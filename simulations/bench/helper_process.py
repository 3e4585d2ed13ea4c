"""A process of its own beside a measurement, which is asked and answers over a pipe."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self


class HelperError(RuntimeError):
    """The helper failed, died or took too long; the message says which of them.

    A helper that fails sends one of these in place of an answer.
    """


class HelperProcess:
    """Runs `work(pipe, *arguments)` in a fresh interpreter until its pipe ends; use it as a context.

    name: as messages call it. patience_s: how long it may take to end by itself.
    """

    def __init__(
        self, name: str, work: Callable[..., None], *arguments: Any, patience_s: float = 0.0
    ) -> None:
        self._name = name
        self._patience_s = patience_s
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(work, theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that a process that dies ends its pipe

    def send(self, message: Any) -> None:
        with suppress(BrokenPipeError):  # it died; its answer, which is none, will tell
            self._pipe.send(message)

    def receive(self, timeout_s: float | None = None) -> Any:
        """Its next answer; raises HelperError."""
        if timeout_s is not None and not self._pipe.poll(timeout_s):
            raise HelperError(f"{self._name} did not answer within {timeout_s:g} s")
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise HelperError(f"{self._name} died") from None
        if isinstance(answer, HelperError):
            raise answer
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(self._patience_s)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _run(work: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole process group, but only the parent knows what to keep.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError):
        work(pipe, *arguments)
