"""JSON results on disk: whole, or not at all."""

import json
import os
from pathlib import Path

import pytest

from deploy.json_file import write_json


def test_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"name": "ü", "values": [1, 2.5]})
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "ü", "values": [1, 2.5]}
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"old": True})

    def breaks_off(self: Path, text: str, encoding: str) -> int:
        with self.open("w", encoding=encoding) as file:
            file.write(text[:3])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", breaks_off)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"new": True})
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": True}
    assert os.listdir(tmp_path) == ["result.json"]
