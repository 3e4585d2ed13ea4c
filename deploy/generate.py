"""`expertmesh generate`: one streamed completion in the terminal."""

import sys
from typing import Any

from cluster.server.client import ClientError
from deploy.server_options import Server


def generate_command(prompt: str, *, server: Server, **sampling: Any) -> int:
    """Print the completion as it arrives; exit code 1 with the server's reason when refused."""
    try:
        with server.client() as client:
            given = {name: value for name, value in sampling.items() if value is not None}
            for chunk in client.generate_stream(prompt, **given):
                print(chunk.text, end="", flush=True)
    except ClientError as error:
        print(f"{server.endpoint}: {error}", file=sys.stderr)
        return 1
    print()
    return 0
