"""A program in a process of its own that answers one message at a time, and can be ended: threads cannot.

It is for what clients and checkpoints bring, which may run for ever, fill the memory or crash.
"""

import contextlib
import json
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any


class ChildError(Exception):
    """There is no good answer; the message goes on after the name of what was asked."""


class TooSlowError(ChildError):
    """No answer in time; the process has been ended."""


class EndedError(ChildError):
    """The process ended instead of answering, or said what is no answer."""


class ChildProcess:
    """Runs the file `program` until `close`, or until it does not answer a message.

    The program is given the number of its end of a connection, then `arguments`. It answers once when
    it is ready and once to each message, by a JSON object of at most `max_answer_bytes` (None: of any
    size), which has a text `error` where it is no good. Raises ChildError if it is not ready within
    `start_timeout_s`, OSError if there can be no process.
    """

    def __init__(
        self,
        program: Path,
        *arguments: object,
        start_timeout_s: float,
        max_answer_bytes: int | None = None,
    ) -> None:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                # -I: neither the environment nor the working directory decides what is imported.
                [sys.executable, "-I", str(program), *map(str, (theirs.fileno(), *arguments))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._connection = ours
        self._max_answer_bytes = max_answer_bytes
        self._end = weakref.finalize(self, _end, process, ours)
        try:
            self._answer(start_timeout_s)
        except ChildError:
            self.close()
            raise

    @property
    def ended(self) -> bool:
        """Whether it was closed or failed to answer."""
        return not self._end.alive

    def ask(self, message: bytes, time_limit_s: float) -> dict[str, Any]:
        """Its answer; raises ChildError."""
        with contextlib.suppress(OSError):  # it has ended: that is what the answer will be
            self._connection.send_bytes(message)
        return self._answer(time_limit_s)

    def close(self) -> None:
        """End the process, if it runs."""
        self._end()

    def _answer(self, time_limit_s: float) -> dict[str, Any]:
        try:
            if not self._connection.poll(time_limit_s):
                self.close()
                raise TooSlowError(f"takes longer than {time_limit_s:g} s")
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes(self._max_answer_bytes))
        except (OSError, EOFError):
            self.close()
            raise EndedError("has ended its process") from None
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()
