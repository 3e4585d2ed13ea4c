"""A Ray to work on: where there is none, one line says so and what to do."""

import re
import socket
from typing import Any

import ray

_HOST_PORT = re.compile(r"\[?([^/\[\]]+?)\]?:(\d{1,5})")
_PATIENCE_S = 10.0


class NoRayError(RuntimeError):
    """There is no Ray, or it does not let us in; the message, of one line, says what to do."""


def connect_to_ray(address: str, fix: str, **options: Any) -> None:
    """`ray.init` of a cluster that runs already; `fix` ends the message of NoRayError."""
    try:
        _knock(address)
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise no_ray(f"no Ray cluster at {address!r}", error, fix) from error


def no_ray(what: str, error: Exception, fix: str) -> NoRayError:
    """Of Ray's own message, which may go on for a page, the first line."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return NoRayError(f"{what}: {reason}; {fix}")


def _knock(address: str) -> None:
    """Ray itself tries for two minutes where nobody listens, and fills the terminal meanwhile."""
    if found := _HOST_PORT.fullmatch(address):
        socket.create_connection((found[1], int(found[2])), _PATIENCE_S).close()
