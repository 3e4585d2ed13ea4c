"""Renders one chat template in a process of its own; run by `template_process.py`, never imported.

Needs nothing but jinja2, and starts quickly for that. The arguments are the number of an open
connection, the memory that the process may take in MiB, and the most characters of an answer. The
first message is the template, each further one the values of a rendering as JSON. The start and each of
them is answered by JSON: {"text": ...}, or {"error": ...} with what was wrong.
"""

import json
import resource
import sys
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    """How a template refuses messages."""
    raise jinja2.TemplateError(message)


def to_json(value: Any, **options: Any) -> str:
    """Unlike jinja2's own, this neither sorts nor escapes for HTML: models have seen plain JSON."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to chat templates."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


class Worker:
    """Takes a template, then renders it as often as asked."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._template: jinja2.Template | None = None

    def answer(self, message: bytes) -> dict[str, str]:
        try:
            if self._template is None:
                # What is constant in a template is computed now, so this takes as much as rendering.
                self._template = environment().from_string(message.decode())
                return {"text": ""}
            return self._render(self._template, json.loads(message))
        except MemoryError:
            return {"error": "needs too much memory"}
        except jinja2.TemplateSyntaxError as error:
            return {"error": f"has an error in line {error.lineno}: {error.message}"}
        except jinja2.TemplateError as error:
            return {"error": f"refuses: {error.message or type(error).__name__}"}
        except Exception as error:  # noqa: BLE001 - templates can raise anything
            return {"error": f"fails: {type(error).__name__}: {error}"}

    def _render(self, template: jinja2.Template, values: dict[str, Any]) -> dict[str, str]:
        pieces: list[str] = []
        num_chars = 0
        for piece in template.generate(values):
            num_chars += len(piece)
            if num_chars > self._max_chars:
                return {"error": f"makes more than {self._max_chars} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}


def main(connection_fd: int, memory_mib: int, max_chars: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    worker = Worker(max_chars)
    with Connection(connection_fd) as connection:
        connection.send_bytes(b'{"text": ""}')
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:  # the server has ended or does not need us any more
                return
            connection.send_bytes(json.dumps(worker.answer(message)).encode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
