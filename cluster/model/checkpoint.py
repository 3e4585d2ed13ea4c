"""Reading slices of tensors out of a Hugging Face safetensors directory, and nothing else.

Only the asked-for rows and columns are copied, so a 700 GB checkpoint costs a rank its own share.
Everything read is checked for shape, type and finite values, and its name is recorded, so that a test
can tell what a rank has read.

A matrix NAME in e4m3 comes with NAME_scale_inv, fp32, one for each block of 128 x 128: the number that
the block is multiplied with, whatever it is called.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.model.tensor_files import FLOAT8_TYPE, FLOAT_TYPES, TensorFiles
from experts.float8 import BlockScaled, dequantized, has_nan, quantize_blocks
from experts.kernels.types import BLOCK

logger = logging.getLogger(__name__)

EVERYTHING = slice(None)
Where = tuple[slice, ...]
"""The part of a tensor that is asked for, by dimension; no steps."""


class Checkpoint(TensorFiles):
    """The tensors of one directory by name. `names_read` grows with every read.

    `keep_float8`: a matrix in e4m3 stays as it is, bytes and scales; a part that begins amid a block is
    quantised again. Otherwise it is dequantised.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.names_read: set[str] = set()

    def read(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        rows: slice = EVERYTHING,
        columns: slice = EVERYTHING,
        keep_float8: bool = False,
    ) -> Tensor:
        """A copy of `tensor[rows, columns]` as `dtype`; `shape` is what the file must hold.

        Raises CheckpointError naming file and tensor if it is missing, misshaped, not bf16 / fp16 /
        fp32 / e4m3 with scales, unreadable or holds a NaN or infinity.
        """
        where = (rows,) if len(shape) == 1 else (rows, columns)
        found = self._read(name, shape, where, dtype, keep_float8)
        self.names_read.add(name)
        return found

    def read_item(
        self,
        name: str,
        idx: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        keep_float8: bool = False,
    ) -> Tensor:
        """`tensor[idx]` of a stack of matrices; recorded as `name[idx]`."""
        where = slice(idx, idx + 1), EVERYTHING, EVERYTHING
        found = self._read(name, shape, where, dtype, keep_float8)
        self.names_read.add(f"{name}[{idx}]")
        return found if isinstance(found, BlockScaled) else found[0]

    def expect(self, names: Sequence[str]) -> None:
        """These tensors will be read next, whole and in any order."""

    def _read(
        self, name: str, shape: Sequence[int], where: Where, dtype: torch.dtype, keep_float8: bool
    ) -> Tensor:
        if f"{name}_scale_inv" not in self:
            found = self._copied(name, self.slice_of(name, shape, FLOAT_TYPES), where, dtype)
        else:
            matrix, scale, first = self._blocks(name, shape, where)
            if keep_float8:
                return self._kept(name, matrix, scale, first)
            found = dequantized(matrix, scale, first).to(dtype)
        self._require(torch.isfinite(found).all(), name, "holds NaN or infinite values")
        return found

    def _kept(
        self, name: str, matrix: Tensor, scale: Tensor, first: tuple[int, int]
    ) -> BlockScaled:
        if matrix.dim() == 3:
            matrix, scale = matrix[0], scale[0]
        if first == (0, 0):
            return BlockScaled.of(matrix, scale)
        logger.warning("%s: this part begins amid a block of 128 and is quantised again", name)
        return BlockScaled.of(*quantize_blocks(dequantized(matrix, scale, first)))

    def _blocks(
        self, name: str, shape: Sequence[int], where: Where
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """e4m3 of a part, the scales of the blocks that it touches, and where in the first it begins."""
        *stack, rows, columns = (range(size)[part] for size, part in zip(shape, where, strict=True))
        scale_shape = [*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:])]
        touched = [slice(r.start // BLOCK, -(-r.stop // BLOCK)) for r in (rows, columns)]
        scale_name = f"{name}_scale_inv"
        scale = self._copied(
            scale_name,
            self.slice_of(scale_name, scale_shape, FLOAT_TYPES),
            (*where[: len(stack)], *touched),
            torch.float32,
        )
        matrix = self._copied(name, self.slice_of(name, shape, (FLOAT8_TYPE,)), where, None)
        self._require(torch.isfinite(scale).all(), scale_name, "holds NaN or infinite values")
        self._require(~has_nan(matrix), name, "holds NaN values")
        return matrix, scale, (rows.start % BLOCK, columns.start % BLOCK)

    def _copied(self, name: str, part: Any, where: Where, dtype: torch.dtype | None) -> Tensor:
        """New memory with that part of a tensor, as `dtype` (None: its own)."""
        found: Tensor = part[where]
        return found.to(dtype or found.dtype, copy=True).contiguous()

    def _require(self, good: Tensor, name: str, problem: str) -> None:
        """CheckpointError unless this one bool is true."""
        if not bool(good):
            raise self.error(name, problem)
