"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, data: str | bytes) -> None:
    """Write beside `path`, then exchange; what was there stays if that fails. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if isinstance(data, bytes):
            beside.write_bytes(data)
        else:
            beside.write_text(data, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
