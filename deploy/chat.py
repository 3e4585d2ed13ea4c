"""`expertmesh chat`: a conversation in the terminal, answers as they come."""

import contextlib
import sys
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from cluster.server.client import ClientError
from cluster.server.errors import Code
from deploy.server_options import Server

if TYPE_CHECKING:
    from cluster.server.client import Client

HELP = """\
/reset          begin anew
/preset NAME    take another of the server's presets; without NAME show them
/system TEXT    set the system message; without TEXT take it away
/help           show this
Ctrl-C ends an answer, Ctrl-D the chat."""

# Codes after which the same server can still answer the next message.
_PASSING = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.RESOURCE_EXHAUSTED, Code.ABORTED}


class Conversation:
    """Messages so far. What failed leaves no message behind."""

    def __init__(
        self, client: "Client", preset: str | None, system: str | None, sampling: dict[str, Any]
    ) -> None:
        self.preset = preset
        self.system = system
        self._client = client
        self._sampling = sampling
        self._messages: list[dict[str, str]] = []

    def reset(self) -> None:
        self._messages.clear()

    def say(self, text: str) -> Generator[str, None, None]:
        """The answer in pieces; closing the iterator ends it, and keeps what has come of it."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = [*self._messages, {"role": "user", "content": text}]
        answer = ""
        try:
            for chunk in self._client.generate_stream(
                [*first, *asked], preset=self.preset, **self._sampling
            ):
                answer += chunk.text
                yield chunk.text
        finally:
            if answer:
                self._messages = [*asked, {"role": "assistant", "content": answer.strip()}]


def chat_command(*, server: Server, preset: str | None, system: str | None, **sampling: Any) -> int:
    """Exit code 1 when the server is gone or has no chat template."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its editing and history
    try:
        with server.client() as client:
            info = client.server_info()
            if sys.stdin.isatty():
                print(f"{info.model} on {server.endpoint}. /help shows what else you can type.")
            _converse(Conversation(client, preset, system, sampling), list(info.presets))
    except ClientError as error:
        print(f"{server.endpoint}: {error}", file=sys.stderr)
        return 1
    return 0


def _converse(conversation: Conversation, presets: list[str]) -> None:
    """Until the input ends."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            continue  # as in a shell: only the line is given up
        if line.startswith("/"):
            _obey(line, conversation, presets)
        elif line:
            _answer(conversation, line)


def _answer(conversation: Conversation, line: str) -> None:
    try:
        with closing(conversation.say(line)) as pieces:
            begun = False
            for piece in pieces:
                shown = piece if begun else piece.lstrip()
                begun = begun or shown != ""
                print(shown, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except ClientError as error:
        if error.code not in _PASSING:
            raise
        print(f"{error} (/reset begins anew)", file=sys.stderr, end="")
    print(flush=True)


def _obey(line: str, conversation: Conversation, presets: list[str]) -> None:
    command, _, value = line.partition(" ")
    value = value.strip()
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = value or None
    elif command == "/preset" and value in presets:
        conversation.preset = value
    elif command == "/preset":
        print(", ".join(presets) or "this server has no presets")
    else:
        print(HELP)
