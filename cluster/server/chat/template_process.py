"""A chat template in a process of its own, which can be ended: threads cannot.

Templates come with checkpoints and messages from clients. jinja2's sandbox keeps a template from
the rest of the world, but not from running for ever or filling the memory, and no thread can be
stopped at that.
"""

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("template_worker.py")
_START_TIMEOUT_S = 30.0
_MEMORY_MIB = 1024
_MAX_BYTES_PER_CHAR = 12
"""Of JSON: a character outside the basic plane is two escapes."""


class TemplateError(ValueError):
    """The template cannot be used, or not with these values; the message goes on after "the template"."""


class TemplateProcess:
    """Renders from any thread, one at a time; starts by itself, again after it was ended, too."""

    def __init__(self, template: str, *, time_limit_s: float, max_chars: int) -> None:
        self._template = template
        self._time_limit_s = time_limit_s
        self._max_chars = max_chars
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def start(self) -> None:
        """Start now, not with the first rendering; raises TemplateError for a template with errors."""
        with self._lock:
            self._connect()

    def render(self, values: Mapping[str, Any]) -> str:
        """Raises TemplateError, also when it takes too long, grows too large or the process ends."""
        try:
            request = json.dumps(values).encode()
        except RecursionError:
            raise TemplateError("cannot take values nested so deeply") from None
        with self._lock:
            text = self._ask(self._connect(), request)
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise TemplateError("writes lone surrogates, which are no characters")
        return text

    def close(self) -> None:
        """End the process, if it runs."""
        if self._end:
            self._end()
        self._connection = None

    def _ask(self, connection: Connection, message: bytes) -> str:
        with contextlib.suppress(OSError):  # it has ended: that is what the answer will be
            connection.send_bytes(message)
        return self._answer(connection, self._time_limit_s)

    def _answer(self, connection: Connection, time_limit_s: float) -> str:
        try:
            if not connection.poll(time_limit_s):
                self.close()
                raise TemplateError(f"takes longer than {time_limit_s:g} s")
            answer = json.loads(connection.recv_bytes(self._max_chars * _MAX_BYTES_PER_CHAR + 64))
        except (OSError, EOFError):
            self.close()
            raise TemplateError("has ended its process") from None
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    def _connect(self) -> Connection:
        if self._connection is None:
            self.close()  # the one before, whose template had errors
            connection = self._start_process()
            self._answer(connection, _START_TIMEOUT_S)
            self._ask(connection, self._template.encode())
            self._connection = connection
        return self._connection

    def _start_process(self) -> Connection:
        ours, theirs = Pipe()
        arguments = [theirs.fileno(), _MEMORY_MIB, self._max_chars]
        with theirs:
            process = subprocess.Popen(
                # -I: neither the environment nor the working directory decides what is imported.
                [sys.executable, "-I", str(_WORKER), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._end = weakref.finalize(self, _end, process, ours)
        return ours


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()
