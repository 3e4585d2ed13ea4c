"""What a rank reads of a checkpoint: its rows and columns of a matrix, fused with others, kept in FP8 or not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.model.checkpoint import EVERYTHING, Checkpoint
from cluster.model.config import ModelConfig
from cluster.model.norm import RmsNorm
from cluster.model.shards import shard
from comms.topology import Topology
from experts.float8 import BlockScaled, line_up, stacked

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """Of one tensor of the checkpoint: the rows and columns that this rank computes with."""

    name: str
    shape: tuple[int, ...]
    rows: slice = EVERYTHING
    columns: slice = EVERYTHING


@dataclass(frozen=True, kw_only=True)
class RankReader:
    """keep_float8: large matrices that are e4m3 in the checkpoint stay so (`BlockScaled`), byte by byte,
    where modules take them: all of attention but `kv_b_proj`, and all MLPs. Otherwise all is in `dtype`.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    topology: Topology
    rank: int
    dtype: torch.dtype
    keep_float8: bool = False

    def __post_init__(self) -> None:
        heads, tp_size = self.config.attention.num_heads, self.topology.tensor_parallel_size
        if heads % tp_size:
            raise ValueError(
                f"tensor_parallel_size must divide num_attention_heads, got {heads} % {tp_size} = "
                f"{heads % tp_size}"
            )

    def norm(self, name: str, size: int | None = None, eps: float | None = None) -> RmsNorm:
        weight = self._read(f"model.{name}.weight", (size or self.config.hidden_size,))
        return RmsNorm(weight, self.config.rms_norm_eps if eps is None else eps)

    def _heads(self, size: int) -> slice:
        """Our part of a dimension that all heads share equally."""
        return shard(size, self.topology.tensor_parallel_size, self._tp_rank)

    def _matrix(self, *parts: Part) -> Tensor:
        """The parts below each other."""
        found = [
            self.checkpoint.read(
                part.name,
                part.shape,
                self.dtype,
                rows=part.rows,
                columns=part.columns,
                keep_float8=self.keep_float8,
            )
            for part in parts
        ]
        if any(isinstance(part, BlockScaled) for part in found) and not line_up(found):
            names = ", ".join(part.name for part in parts)
            logger.warning("%s: blocks do not line up; together they are quantised again", names)
        return stacked(found)

    def _read(self, name: str, shape: tuple[int, ...], *, rows: slice = EVERYTHING) -> Tensor:
        return self.checkpoint.read(name, shape, self.dtype, rows=rows)

    @property
    def _tp_rank(self) -> int:
        return self.topology.tp_rank_of(self.rank)
