"""What can be wrong with a checkpoint directory."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A file of the checkpoint is missing, damaged or holds something else than it should."""

    def __init__(self, path: Path, problem: str, *, tensor: str | None = None) -> None:
        where = f"{path}: tensor {tensor!r}" if tensor else str(path)
        super().__init__(f"{where}: {problem}")
        self.path = path
        self.tensor = tensor
        self.problem = problem

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.path, self.problem, self.tensor)


def _rebuild(path: Path, problem: str, tensor: str | None) -> CheckpointError:
    return CheckpointError(path, problem, tensor=tensor)


class UnsupportedModelError(ValueError):
    """The checkpoint is sound, but asks for something that is not implemented; says what."""
