"""Ranks that share a process and a device, exchange tokens, and are compared with the reference, bitwise.

Legend: T tokens of a rank, K top-k, H hidden, R received rows, P pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from comms.codecs import CODECS
from comms.reference import RankInput, reference_combine, reference_dispatch
from comms.symmetric import PendingSums, Received, SymmetricDispatcher
from comms.symmetric_layout import SymmetricLayout
from comms.symmetric_memory import SymmetricMemory
from comms.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Case:
    """tokens: of each rank; capacity and `expected` (rows per source) may be more.

    exact: numbers whose sums need no rounding, since the interpreter cuts off where a GPU rounds.
    """

    tokens: tuple[int, ...]
    hidden: int = 256
    slots_per_rank: int = 4
    num_topk: int = 3
    dispatch_dtype: str = "bfloat16"
    combine: str = "node"
    expected: int | None = None
    steps: int = 3
    exact: bool = False

    @property
    def layout(self) -> SymmetricLayout:
        return SymmetricLayout(
            world_size=len(self.tokens),
            slots_per_rank=self.slots_per_rank,
            hidden=self.hidden,
            num_topk=self.num_topk,
            capacity=max(*self.tokens, self.expected or 1) + 1,
            dispatch_dtype=self.dispatch_dtype,
            combine=self.combine,
        )


def inputs_of(case: Case, step: int) -> list[RankInput]:
    """Distinct slots per token, some of them -1 and some tokens without any; NaN, Inf and zeros."""
    make = torch.Generator().manual_seed(1000 + step)
    inputs = []
    num_slots = len(case.tokens) * case.slots_per_rank
    for num_tokens in case.tokens:
        x_TH = torch.randn(num_tokens, case.hidden, generator=make).bfloat16()
        if case.exact:
            x_TH = (x_TH * 100).to(torch.float8_e4m3fn).bfloat16()
            x_TH[:, ::128] = 448  # scales are one
        keys = torch.rand(num_tokens, num_slots, generator=make)
        slots_TK = keys.argsort(1)[:, : case.num_topk].contiguous()
        slots_TK[torch.rand(slots_TK.shape, generator=make) < 0.2] = -1
        if num_tokens > 3:
            slots_TK[1] = -1
            x_TH[2, :128] = 0
            x_TH[3, 5] = float("nan") if step % 2 else float("-inf")
        weights_TK = torch.rand(slots_TK.shape, generator=make)
        # Ranges from far too small (32-bit sums, refused pairs) to far too large.
        exponent_T = torch.randint(-16, 6, (num_tokens,), generator=make)
        range_T = (1 + torch.rand(num_tokens, generator=make)) * 2.0**exponent_T
        if case.exact:
            weights_TK, range_T = (weights_TK * 3).floor().exp2() / 2, 2.0**exponent_T
        if num_tokens > 5:
            range_T[4], range_T[5] = float("inf"), 1e-12
        inputs.append(
            RankInput(x_TH=x_TH, slots_TK=slots_TK, weights_TK=weights_TK, range_T=range_T)
        )
    return inputs


def outputs_of(received: Received, seed: int, exact: bool) -> tuple[Tensor, Tensor]:
    """(y_PH, place_RK): random outputs, in an order that has nothing to do with that of the rows."""
    make = torch.Generator().manual_seed(seed)
    local_RK = received.local_slots_RK.cpu()
    hidden = received.x_RH.shape[1]
    y_PH = (torch.randn(local_RK.numel() + 1, hidden, generator=make) * 3).bfloat16()
    if exact:
        y_PH = y_PH.clamp(-4, 4).round()
    order = torch.randperm(local_RK.numel(), generator=make).int()
    place_RK = torch.full_like(local_RK, -1)
    valid_RK = local_RK >= 0
    place_RK[valid_RK] = order[: int(valid_RK.sum())]
    return y_PH, place_RK


def run_case(case: Case, device: torch.device, programs: int | None = None) -> None:
    """Raises AssertionError where a bit differs from the reference."""
    ranks = dispatchers_in_one_process(case.layout, device, programs)
    for step in range(case.steps):
        for dispatcher in ranks:
            dispatcher.expect(case.expected or max(1, *case.tokens))
        check_step(case, ranks, inputs_of(case, step), device, step)


def dispatchers_in_one_process(
    layout: SymmetricLayout, device: torch.device, programs: int | None = None
) -> list[SymmetricDispatcher]:
    memories = SymmetricMemory.in_one_process(layout.world_size, layout.num_bytes, device)
    return [
        SymmetricDispatcher(layout, memory, timeout_s=10.0, programs=programs)
        for memory in memories
    ]


def check_step(
    case: Case,
    ranks: list[SymmetricDispatcher],
    inputs: list[RankInput],
    device: torch.device,
    step: int,
) -> list[Tensor]:
    """Dispatch and combine on all ranks; returns the sums."""
    fixed = case.combine == "fixed"
    before = [dispatcher.bytes_sent["intra_node"] for dispatcher in ranks]
    pending = [
        dispatcher.start_dispatch(
            source.x_TH.to(device),
            source.slots_TK.to(device),
            source.weights_TK.to(device),
            source.range_T.to(device) if fixed and source.range_T is not None else None,
        )
        for dispatcher, source in zip(ranks, inputs, strict=True)
    ]
    received = [part.wait() for part in pending]
    expected = reference_dispatch(inputs, case.slots_per_rank, case.dispatch_dtype)
    for rank, (found, wanted) in enumerate(zip(received, expected, strict=True)):
        x_RH, slots_RK = sent_rows(found)
        assert torch.equal(slots_RK.long(), wanted.local_slots_RK), f"slots of rank {rank}"
        assert same_bits(x_RH, wanted.x_RH), f"rows of rank {rank}"
    outputs = [
        outputs_of(found, 10 * step + rank, case.exact) for rank, found in enumerate(received)
    ]
    home: list[PendingSums] = [
        dispatcher.start_combine(y_PH.to(device), place_RK.to(device), part.handle)
        for dispatcher, (y_PH, place_RK), part in zip(ranks, outputs, pending, strict=True)
    ]
    sums = [part.wait() for part in home]
    in_order = [y_PH[place_RK[place_RK >= 0].long()] for y_PH, place_RK in outputs]
    wanted_sums = reference_combine(
        in_order, inputs, one_rank_nodes(len(ranks)), case.slots_per_rank, case.combine
    )
    for rank, (out_TH, wanted_TH) in enumerate(zip(sums, wanted_sums, strict=True)):
        assert same_bits(out_TH, wanted_TH), f"sums of rank {rank}"
    for dispatcher in ranks:
        dispatcher.check()
    check_bytes(case, ranks, inputs, before)
    return sums


def check_bytes(
    case: Case, ranks: list[SymmetricDispatcher], inputs: list[RankInput], before: list[int]
) -> None:
    """What was counted: a row once to each other rank that has a slot of it, and a sum back."""
    needs = [_ranks_with_slots(source.slots_TK, case) for source in inputs]  # [T, W] of each rank
    to_peers = (len(ranks) - 1) * ranks[0].num_rows
    row_bytes = CODECS[case.dispatch_dtype].row_bytes(case.hidden, torch.bfloat16)
    row_bytes += 4 * case.num_topk + 4 * (case.combine == "fixed")  # weights, range
    for rank, (dispatcher, sent) in enumerate(zip(ranks, before, strict=True)):
        rows = int(needs[rank].sum() - needs[rank][:, rank].sum())
        sums = sum(int(mine[:, rank].sum()) for i, mine in enumerate(needs) if i != rank)
        sent += rows * row_bytes + to_peers * case.num_topk * 4
        back = dispatcher.bytes_sent["intra_node"] - sent
        if case.combine == "node":
            assert back == sums * case.hidden * 2, f"bytes of rank {rank}"
        else:  # in 16 bits, in 32, or refused
            assert 0 <= back - 4 * sums <= sums * case.hidden * 4
            assert (back - 4 * sums) % (2 * case.hidden) == 0


def _ranks_with_slots(slots_TK: Tensor, case: Case) -> Tensor:
    rank_TK = slots_TK.div(case.slots_per_rank, rounding_mode="floor")
    return (rank_TK[:, :, None] == torch.arange(len(case.tokens))).any(1)


def one_rank_nodes(world_size: int) -> Topology:
    return Topology(num_nodes=world_size, ranks_per_node=1)


def sent_rows(received: Received) -> tuple[Tensor, Tensor]:
    """Rows that somebody sent, decoded on the CPU, and their slots."""
    slots_RK = received.local_slots_RK.cpu()
    is_sent_R = (slots_RK >= 0).any(1)
    x_RH = received.x_RH.cpu()[is_sent_R]
    if received.scale_RB is not None:
        scales = received.scale_RB.cpu()[is_sent_R].contiguous().view(torch.uint8)
        packed = torch.cat([x_RH.view(torch.uint8), scales], 1)
        x_RH = CODECS["float8"].decode(packed, x_RH.shape[1], torch.bfloat16)
    return x_RH, slots_RK[is_sent_R]


def same_bits(a_TH: Tensor, b_TH: Tensor) -> bool:
    """Equal bits, but for those of a NaN, which arithmetic may choose."""
    a_TH, b_TH = a_TH.cpu(), b_TH.cpu()
    nan_TH = a_TH.isnan()
    if a_TH.shape != b_TH.shape or not torch.equal(nan_TH, b_TH.isnan()):
        return False
    bits = [x_TH.masked_fill(nan_TH, 0).view(torch.int16) for x_TH in (a_TH, b_TH)]
    return torch.equal(*bits)


def interpreted_cases() -> None:
    """The arithmetic of the kernels, on a CPU."""
    cpu = torch.device("cpu")
    run_case(Case(exact=True, tokens=(7, 5)), cpu)
    run_case(
        Case(exact=True, tokens=(7, 5), expected=9, hidden=384, num_topk=4, combine="fixed"), cpu
    )
    run_case(Case(exact=True, tokens=(6, 0, 8), dispatch_dtype="float8", steps=2), cpu, programs=3)
    run_case(Case(exact=True, tokens=(7,), dispatch_dtype="float8", steps=2, combine="fixed"), cpu)
