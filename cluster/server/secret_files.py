"""Files that an option of `server` names, read with the option's name in every complaint."""

import stat
from pathlib import Path

from cluster.config import ConfigError


def read_file(option: str, path: str) -> bytes:
    """Raises ConfigError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"server.{option} = {path!r}: cannot be read: {error.strerror or error}"
        ) from None


def read_secret(option: str, path: str) -> bytes:
    """Raises ConfigError also for a file that every user of this host can read: it keeps no secret."""
    content = read_file(option, path)
    if stat.S_IMODE(Path(path).stat().st_mode) & stat.S_IRWXO:
        raise ConfigError(
            f"server.{option} = {path!r}: every user of this host has access: `chmod o= {path}`"
        )
    return content
