"""What becomes of calls that fail, in terminal commands that steer a running cluster.

Exit codes of these commands: 0 done or nothing to do; 1 the server refused or failed; 2 options
that cannot be, a token that is missing or wrong, or no server that answers.
"""

import sys
from pathlib import Path
from typing import Any

from cluster.server.client import ClientError
from cluster.server.errors import Code

TIMEOUT_S = 10.0
"""Of calls that the server answers from what it knows."""

_NO_ANSWER = {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED}
_USAGE = {
    Code.INVALID_ARGUMENT,
    Code.UNAUTHENTICATED,
    Code.PERMISSION_DENIED,
    Code.UNIMPLEMENTED,
}


def read_token(option: str, path: Path | None) -> str | None:
    """The token in a file that an option names; raises ValueError, which names the file, if there is none."""
    if path is None:
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} {path}: cannot be read: {error}") from None
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"{option} {path}: holds no token of printable ASCII characters")
    return token


def report(endpoint: str, error: ClientError) -> int:
    """Say why a call failed, and what to do; returns the exit code."""
    advice: dict[Any, str] = {
        Code.UNAVAILABLE: "no server there, or one that speaks TLS? see `--endpoint` and `--ca-file`",
        Code.DEADLINE_EXCEEDED: "connected, but the server does not answer",
        Code.UNAUTHENTICATED: "`--token-file` or `--admin-token-file` names the file with the token",
        Code.UNIMPLEMENTED: "the server is older than this command",
    }
    hint = f" ({advice[error.code]})" if error.code in advice else ""
    print(f"{endpoint}: {error}{hint}", file=sys.stderr)
    return 2 if error.code in _NO_ANSWER | _USAGE else 1
