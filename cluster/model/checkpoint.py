"""Reading slices of tensors out of a Hugging Face safetensors directory, and nothing else.

Only the asked-for rows and columns are copied; files are memory-mapped and at most two stay open,
so a 700 GB checkpoint costs a rank its own share. Everything read is checked for shape, type and
finite values, and its name is recorded, so that a test can tell what a rank has read.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.model.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_OPEN_FILES = 2
EVERYTHING = slice(None)

_FLOAT_TYPES = {"BF16", "F16", "F32"}


class Checkpoint:
    """The tensors of one directory by name. `names_read` grows with every read."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.names_read: set[str] = set()
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._files = self._locate()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        rows: slice = EVERYTHING,
        columns: slice = EVERYTHING,
    ) -> Tensor:
        """A copy of `tensor[rows, columns]` as `dtype`; `shape` is what the file must hold.

        Raises CheckpointError naming file and tensor if it is missing, misshaped, not bf16 / fp16 /
        fp32, unreadable or holds a NaN or infinity.
        """
        part = self._slice(name, shape)
        where = (rows,) if len(shape) == 1 else (rows, columns)
        return self._finished(name, name, part[where], dtype)

    def read_item(self, name: str, idx: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`tensor[idx]` of a stack of matrices; recorded as `name[idx]`."""
        part = self._slice(name, shape)
        return self._finished(name, f"{name}[{idx}]", part[idx : idx + 1], dtype)[0]

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(
            self._files.get(name, self.directory / self._listing), problem, tensor=name
        )

    def close(self) -> None:
        self._open.clear()

    def _finished(self, name: str, record: str, part: Tensor, dtype: torch.dtype) -> Tensor:
        copy = part.to(dtype, copy=True).contiguous()
        if not bool(torch.isfinite(copy).all()):
            raise self.error(name, "holds NaN or infinite values")
        self.names_read.add(record)
        return copy

    def _slice(self, name: str, shape: Sequence[int]) -> Any:
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
        if part.get_dtype() not in _FLOAT_TYPES:
            expected = ", ".join(sorted(_FLOAT_TYPES))
            raise self.error(name, f"has type {part.get_dtype()}, expected one of {expected}")
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
