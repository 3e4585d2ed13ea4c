"""Finished points of a sweep in a file, so that an interrupted sweep goes on where it was.

A line of JSON for each point, after one that says what the file is. Whoever is killed while writing
leaves a torn last line, which the next run drops; anything else that is not ours is refused.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

HEADER = '{"kind": "expertmesh sweep points", "version": 1}\n'


class PointStoreError(ValueError):
    """The file is not one of finished points, or cannot be written."""


def key_of(*parts: Any) -> str:
    """The name of a result: a hash of everything that it depends on, as JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()[:24]


class PointStore:
    """Results by key, each on disk before `add` returns. Without a path, in memory only.

    Raises PointStoreError for a file that is something else, or that cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._results: dict[str, dict[str, Any]] = {}
        if path is not None:
            try:
                self._open(path)
            except OSError as error:
                raise PointStoreError(f"{path}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._results.get(key)

    def add(self, key: str, result: dict[str, Any]) -> None:
        line = _line(key, result)
        self._results[key] = json.loads(line)["result"]  # what a later run reads, and no more
        if self.path is not None:
            self._append(self.path, line)

    def save(self, path: Path) -> None:
        """Add everything to a file, new or of points, which later runs can be given."""
        file = PointStore(path)
        for key, result in self._results.items():
            if file.get(key) is None:
                file.add(key, result)

    def _open(self, path: Path) -> None:
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        ours = HEADER.encode()
        if not (whole.startswith(ours) or (not whole and ours.startswith(data))):
            raise PointStoreError(f"{path}: not a file of sweep points; name a new one")
        for number, line in enumerate(whole.splitlines()[1:], start=2):
            try:
                record = json.loads(line)
                self._results[str(record["key"])] = dict(record["result"])
            except (ValueError, KeyError, TypeError) as error:
                raise PointStoreError(
                    f"{path}: line {number} is not a finished point; delete the line or the file"
                ) from error
        if not whole:
            path.write_text(HEADER, encoding="utf-8")
        elif len(whole) < len(data):
            os.truncate(path, len(whole))

    def _append(self, path: Path, line: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise PointStoreError(f"{path}: {error.strerror or error}") from error


def _line(key: str, result: dict[str, Any]) -> str:
    return json.dumps({"key": key, "result": result}, ensure_ascii=False) + "\n"
