"""`expertmesh generate`: one streamed completion, or answer of a chat, in the terminal."""

import sys
from typing import Any

from cluster.server.client import ClientError
from deploy.server_options import Server


def generate_command(
    prompt: str,
    *,
    server: Server,
    chat: bool = False,
    preset: str | None = None,
    system: str | None = None,
    **sampling: Any,
) -> int:
    """Print the text as it arrives; exit code 1 with the server's reason when refused.

    A preset or a system message makes a chat of the prompt by itself.
    """
    asked: Any = prompt
    if chat or preset is not None or system is not None:
        first = [] if system is None else [{"role": "system", "content": system}]
        asked = [*first, {"role": "user", "content": prompt}]
    try:
        with server.client() as client:
            for chunk in client.generate_stream(asked, preset=preset, **sampling):
                print(chunk.text, end="", flush=True)
    except ClientError as error:
        print(f"{server.endpoint}: {error}", file=sys.stderr)
        return 1
    print()
    return 0
