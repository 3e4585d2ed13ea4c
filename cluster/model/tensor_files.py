"""The safetensors files of a Hugging Face checkpoint directory: which of them holds a tensor, and its shape.

Files are memory-mapped, and at most two stay open.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.model.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_OPEN_FILES = 2
FLOAT_TYPES = ("BF16", "F16", "F32")
FLOAT8_TYPE = "F8_E4M3"


class TensorFiles:
    """The tensors of one directory by name. CheckpointError for an index or a file that cannot be used."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._files = self._locate()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file_of(self, name: str) -> Path:
        return self._files[name]

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(
            self._files.get(name, self.directory / self._listing), problem, tensor=name
        )

    def close(self) -> None:
        self._open.clear()

    def slice_of(self, name: str, shape: Sequence[int], types: Sequence[str]) -> Any:
        """A tensor to be cut, of that shape and one of those types; else CheckpointError names it."""
        file = self._files.get(name)
        if file is None:
            raise self.error(name, "missing from the checkpoint")
        try:
            part = self._handle(file).get_slice(name)
        except SafetensorError as error:
            raise self.error(
                name, f"listed in {INDEX_FILE} but not in the file ({error})"
            ) from error
        if list(part.get_shape()) != list(shape):
            raise self.error(name, f"has shape {part.get_shape()}, expected {list(shape)}")
        if part.get_dtype() not in types:
            scales = f" without {name}_scale_inv" if part.get_dtype() == FLOAT8_TYPE else ""
            expected = ", ".join(types)
            raise self.error(name, f"has type {part.get_dtype()}{scales}, expected {expected}")
        return part

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = _open(file)
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]

    def _locate(self) -> dict[str, Path]:
        """The file of each tensor, from the index if there is one."""
        index = self.directory / INDEX_FILE
        self._listing = INDEX_FILE if index.exists() else SINGLE_FILE
        if not index.exists():
            single = self.directory / SINGLE_FILE
            return dict.fromkeys(self._handle(single).keys(), single)
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(index, f"not a safetensors index: {error!r}") from error
        for name, file in files.items():
            if Path(file).name != file:
                raise CheckpointError(index, f"points outside its directory: {file}", tensor=name)
        return {name: self.directory / file for name, file in files.items()}


def _open(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(file, "no such file")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(file, f"corrupt or truncated: {error}") from error
