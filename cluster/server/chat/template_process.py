"""A chat template in a process of its own.

Templates come with checkpoints and messages from clients. jinja2's sandbox keeps a template from
the rest of the world, but not from running for ever or filling the memory.
"""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.server.child_process import ChildError, ChildProcess

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
        self._process: ChildProcess | None = None

    def start(self) -> None:
        """Start now, not with the first rendering; raises TemplateError for a template with errors."""
        with self._lock:
            try:
                self._running()
            except ChildError as error:
                raise TemplateError(str(error)) from None

    def render(self, values: Mapping[str, Any]) -> str:
        """Raises TemplateError, also when it takes too long, grows too large or the process ends."""
        try:
            request = json.dumps(values).encode()
        except RecursionError:
            raise TemplateError("cannot take values nested so deeply") from None
        with self._lock:
            try:
                text = str(self._running().ask(request, self._time_limit_s)["text"])
            except ChildError as error:
                raise TemplateError(str(error)) from None
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise TemplateError("writes lone surrogates, which are no characters")
        return text

    def close(self) -> None:
        """End the process, if it runs."""
        if self._process:
            self._process.close()

    def _running(self) -> ChildProcess:
        """A process that has the template; raises ChildError."""
        if self._process is None or self._process.ended:
            process = ChildProcess(
                _WORKER,
                _MEMORY_MIB,
                self._max_chars,
                start_timeout_s=_START_TIMEOUT_S,
                max_answer_bytes=self._max_chars * _MAX_BYTES_PER_CHAR + 64,
            )
            try:
                process.ask(self._template.encode(), self._time_limit_s)
            except ChildError:
                process.close()
                raise
            self._process = process
        return self._process
