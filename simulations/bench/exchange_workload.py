"""What a bench of the exchange between GPUs sends: how much of it there is, and the tensors themselves.

Legend: T tokens of a rank, E experts, K top-k, H hidden, R received rows, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comms.reference import RankInput
from comms.symmetric_layout import DispatchDtype, SumMode, SymmetricLayout


@dataclass(frozen=True, kw_only=True)
class GpuWorkload:
    """One layer's exchange; each token chooses `num_topk` of `num_experts` at random.

    programs: of a kernel at most (None: what is fastest). rail: also with each GPU as a node of its own.
    """

    ranks: int = 2
    tokens: tuple[int, ...] = (128, 1024, 4096)
    hidden: int = 7168
    num_experts: int = 256
    num_topk: int = 8
    programs: int | None = None
    rail: bool = False

    def __post_init__(self) -> None:
        if self.num_experts % self.ranks:
            raise ValueError(
                f"experts must divide over ranks, got {self.num_experts} % {self.ranks} = "
                f"{self.num_experts % self.ranks}"
            )
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"need at least one token, got {self.tokens}")

    def layout(self, dtype: DispatchDtype, combine: SumMode) -> SymmetricLayout:
        return SymmetricLayout(
            world_size=self.ranks,
            slots_per_rank=self.num_experts // self.ranks,
            hidden=self.hidden,
            num_topk=self.num_topk,
            capacity=max(self.tokens),
            dispatch_dtype=dtype,
            combine=combine,
        )

    def input(self, rank: int, tokens: int) -> RankInput:
        """Of any rank, the same wherever it is made; on the CPU."""
        make = torch.Generator().manual_seed(1_000 * rank)
        x_TH = torch.randn(tokens, self.hidden, generator=make).bfloat16()
        scores_TE = torch.rand(tokens, self.num_experts, generator=make)
        slots_TK = scores_TE.topk(self.num_topk).indices
        weights_TK = torch.rand(tokens, self.num_topk, generator=make)
        range_T = 8 + torch.rand(tokens, generator=make)
        return RankInput(x_TH=x_TH, slots_TK=slots_TK, weights_TK=weights_TK, range_T=range_T)

    def rows_to_peers(self, rank: int, slots_TK: Tensor) -> int:
        """Rows that leave a rank, once for each other rank that hosts one of their slots."""
        ranks_TK = slots_TK // (self.num_experts // self.ranks)
        peers = [peer for peer in range(self.ranks) if peer != rank]
        return sum(int((ranks_TK == peer).any(1).sum()) for peer in peers)


@dataclass(frozen=True, kw_only=True)
class RankTensors:
    """A rank's tensors on its device."""

    workload: GpuWorkload
    rank: int
    device: torch.device

    def arguments(self, x: RankInput, mode: SumMode) -> list[Tensor]:
        """Of a dispatch whose combine is of that mode."""
        parts = [x.x_TH, x.slots_TK, x.weights_TK]
        if mode == "fixed" and x.range_T is not None:
            parts.append(x.range_T)
        return [part.to(self.device) for part in parts]

    def copies(self, tokens: int) -> list[RankInput]:
        """Inputs, together larger than the L2 cache, an even number of them; the choices are the same."""
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        number = int(np.clip(np.ceil(2.5 * cache / (2.0 * tokens * self.workload.hidden)), 2, 64))
        x_TH, slots_TK, weights_TK, range_T = self.arguments(
            self.workload.input(self.rank, tokens), "fixed"
        )
        make = torch.Generator(self.device).manual_seed(self.rank)
        return [
            RankInput(
                x_TH=torch.randn(x_TH.shape, device=self.device, generator=make).bfloat16(),
                slots_TK=slots_TK,
                weights_TK=weights_TK,
                range_T=range_T,
            )
            for _ in range(number + number % 2)
        ]

    def outputs(self, local_slots_RK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(place_RK, y_PH) of the experts of any rank: row-major places; y as random as it is repeatable."""
        valid_R = local_slots_RK.flatten() >= 0
        places = torch.where(valid_R, valid_R.int().cumsum(0) - 1, -1).int()
        make = torch.Generator(self.device).manual_seed(77 + rank)
        shape = (int(valid_R.sum()) + 1, self.workload.hidden)
        y_PH = torch.randn(shape, device=self.device, generator=make).bfloat16()
        return places.view(local_slots_RK.shape), y_PH
