"""Renders one chat template in a process of its own; run by `template_process.py`, never imported.

Needs nothing but jinja2, and starts quickly for that. The arguments are the number of an open
connection, the memory that the process may take in MiB, and the most characters of an answer. The
first message is the template, each further one the values of a rendering as JSON; each answer is
JSON: {"text": ...}, or {"error": ...} with what was wrong.
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


def render(template: jinja2.Template, values: dict[str, Any], max_chars: int) -> dict[str, str]:
    pieces: list[str] = []
    num_chars = 0
    try:
        for piece in template.generate(values):
            num_chars += len(piece)
            if num_chars > max_chars:
                return {"error": f"makes more than {max_chars} characters of them"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": "needs too much memory for them"}
    except jinja2.TemplateError as error:
        return {"error": f"refuses them: {error.message or type(error).__name__}"}
    except Exception as error:  # noqa: BLE001 - templates can raise anything
        return {"error": f"fails on them: {type(error).__name__}: {error}"}


def main(connection_fd: int, memory_mib: int, max_chars: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    with Connection(connection_fd) as connection:
        template = environment().from_string(connection.recv_bytes().decode())
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:  # the server has ended or does not need us any more
                return
            answer = render(template, json.loads(request), max_chars)
            connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
