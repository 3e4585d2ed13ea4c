"""A checkpoint directory, read straight to a device.

A tensor's bytes go through pinned memory as they are; casts, checks and the cutting of columns happen on
the device. So whole rows are read where the host's reader would take some columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cluster.model.checkpoint import Checkpoint, Where
from cluster.model.cuda.staging import Staging
from cluster.model.errors import CheckpointError

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
_CHECKS = 512  # looked at together: each look waits for the device


class DeviceCheckpoint(Checkpoint):
    """What is read lies on `device`. Values are checked some tensors later, at the latest on leaving:

        with DeviceCheckpoint(directory, device) as checkpoint: ...

    CheckpointError names the tensor all the same.
    """

    def __init__(self, directory: str | Path, device: torch.device) -> None:
        super().__init__(directory)
        self._device = device
        self._staging = Staging(device)
        self._file: tuple[Path, int, dict[str, tuple[int, int]]] | None = None
        self._ahead: dict[str, Tensor] = {}
        self._checks: list[tuple[Tensor, str, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._staging.close()
        self._leave_file()
        self.close()
        if error is None:
            self._look()

    def expect(self, names: Sequence[str]) -> None:
        """They go to the device together, with their scales: fewer waits than one after the other."""
        self._ahead.clear()
        every = [n for name in names for n in (name, f"{name}_scale_inv") if n in self]
        files = {self.file_of(name) for name in every}
        if len(files) == 1:
            _, places = self._at(files.pop())
            there = [name for name in every if name in places]  # the others are missed when read
            found = self._read_spans(there, {}) if there else []
            self._ahead.update(zip(there, found, strict=True))

    def _copied(self, name: str, part: Any, where: Where, dtype: torch.dtype | None) -> Tensor:
        shape, own = part.get_shape(), _DTYPES[part.get_dtype()]
        first, *rest = where
        rows = range(shape[0])[first]
        row_bytes = prod(shape[1:]) * own.itemsize
        data = self._ahead.pop(name, None)
        if data is None or len(data) != len(rows) * row_bytes:
            span = rows.start * row_bytes, len(rows) * row_bytes
            (data,) = self._read_spans([name], {name: span})
        whole = data.view(own).view(len(rows), *shape[1:])
        return whole[(slice(None), *rest)].to(dtype or own).contiguous()

    def _read_spans(
        self, names: Sequence[str], spans: Mapping[str, tuple[int, int]]
    ) -> list[Tensor]:
        """Of tensors of one file, whole but for those of which a (start, size) is asked for."""
        file, places = self._at(self.file_of(names[0]))
        wanted = []
        for name in names:
            begin, size = places[name]
            start, length = spans.get(name, (0, size))
            wanted.append((begin + start, length))
        try:
            return self._staging.read(file, wanted)
        except (OSError, EOFError) as error:
            raise self.error(names[0], f"cannot be read: {error}") from error

    def _require(self, good: Tensor, name: str, problem: str) -> None:
        self._checks.append((good, name, problem))
        if len(self._checks) >= _CHECKS:
            self._look()

    def _look(self) -> None:
        """CheckpointError for the first of the tensors since the last look that is not as it must be."""
        checks, self._checks = self._checks, []
        good = torch.stack([good for good, _, _ in checks]).tolist() if checks else []
        for (_, name, problem), fine in zip(checks, good, strict=True):
            if not fine:
                raise self.error(name, problem)

    def _at(self, path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
        """The open file, and where in it each tensor's bytes begin, and how many they are."""
        if self._file is None or self._file[0] != path:
            self._leave_file()
            try:
                file = os.open(path, os.O_RDONLY)
                size = int.from_bytes(os.pread(file, 8, 0), "little")
                header = json.loads(os.pread(file, size, 8))
            except (OSError, ValueError) as error:
                raise CheckpointError(path, f"corrupt or truncated: {error}") from error
            header.pop("__metadata__", None)
            spans = {name: found["data_offsets"] for name, found in header.items()}
            places = {name: (8 + size + begin, end - begin) for name, (begin, end) in spans.items()}
            self._file = path, file, places
        return self._file[1:]

    def _leave_file(self) -> None:
        if self._file is not None:
            os.close(self._file[1])
            self._file = None
