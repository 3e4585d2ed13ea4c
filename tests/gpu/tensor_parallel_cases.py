"""Ranks of a replica that share a process and a device, beside plain torch.

Legend: T rows, O own rows of a rank, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comms.sizes import sum_in_order
from comms.symmetric_memory import SymmetricMemory
from comms.symmetric_rows import SymmetricRows
from comms.symmetric_rows_layout import LOGIT_ROWS, Norm, RowsLayout

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Case:
    """exact: numbers whose sums need no rounding, since the interpreter cuts off where a GPU rounds."""

    num_rows: int
    world_size: int = 2
    hidden: int = 256
    vocab: int = 131
    exact: bool = False


def ranks_in_one_process(
    layout: RowsLayout, device: torch.device, **options
) -> list[SymmetricRows]:
    memories = SymmetricMemory.in_one_process(layout.world_size, layout.num_bytes, device)
    return [SymmetricRows(layout, memory, **options) for memory in memories]


def at_once(ranks: list[SymmetricRows], move: str, *arguments: Sequence[Any]) -> list[Any]:
    """The move of all ranks, each with its own of every argument, on streams of their own: kernels wait
    for each other.

    It is made twice. The first time nobody waits: compiling, loading and allocating may need an idle GPU.
    """
    calls = [
        partial(getattr(rank, move), *mine) for rank, *mine in zip(ranks, *arguments, strict=True)
    ]
    if ranks[0].memory.device.type == "cpu":
        return [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in ranks]
    for has_failed in (1, 0):
        found = []
        for rank in ranks:
            rank.report.failed.fill_(has_failed)
        torch.cuda.synchronize()
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(call())
        torch.cuda.synchronize()
    return found


def run_case(case: Case, device: torch.device) -> None:
    """Raises AssertionError where anything differs from plain torch: bits, but for the norms' last one."""
    layout = RowsLayout(
        world_size=case.world_size,
        hidden=case.hidden,
        vocab_size=case.vocab,
        capacity=case.num_rows + 3,
    )
    ranks = ranks_in_one_process(layout, device, timeout_s=10.0)
    make = torch.Generator().manual_seed(case.num_rows)

    def random(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=make) * 3
        return (x.round() if case.exact else x).bfloat16().to(device)

    for _ in range(2):
        for rank in ranks:
            rank.expect(case.num_rows)
        own, size = ranks[0].num_own, case.num_rows
        assert own == -(-size // case.world_size)
        norm = Norm(random(case.hidden), EPS)
        x, added, residual = (random(case.world_size, own, case.hidden) for _ in range(3))
        gathered = at_once(ranks, "gather", x, added, [norm] * len(ranks))
        sums = x + added
        for i, (rows_TH, sum_OH) in enumerate(gathered):
            assert torch.equal(sum_OH, sums[i])
            close(rows_TH, normed(sums.flatten(0, 1)[:size], norm), case)
            assert torch.equal(rows_TH, gathered[0][0])
        parts = random(case.world_size, size, case.hidden)
        wanted = torch.zeros(case.world_size * own, case.hidden).bfloat16()
        flat = [part.cpu().flatten() for part in parts]
        sum_in_order(wanted[:size].flatten(), flat)
        wanted = wanted.to(device).view(case.world_size, own, case.hidden)
        for i, (out_OH, sum_OH) in enumerate(scattered(ranks, parts, residual, norm)):
            assert torch.equal(sum_OH, wanted[i] + residual[i]), f"sums of rank {i}"
            close(out_OH, normed(wanted[i] + residual[i], norm), case)
        plain = at_once(ranks, "gather", x)
        assert all(torch.equal(rows_TH, x.flatten(0, 1)[:size]) for rows_TH, _ in plain)
        for i, (out_OH, _) in enumerate(scattered(ranks, parts)):
            assert torch.equal(out_OH, wanted[i]), f"plain sums of rank {i}"
        check_logits(ranks, random(min(size, LOGIT_ROWS), case.vocab), case)
    for rank in ranks:
        rank.check()


def scattered(ranks, parts, residual=None, norm=None) -> list[tuple[Tensor, Tensor]]:
    rest = [None] * len(ranks) if residual is None else residual
    arguments = (parts, rest, [norm] * len(ranks))
    if ranks[0].memory.device.type == "cuda":
        return at_once(ranks, "scatter", *arguments)
    for half in ("sends", "receives"):
        found = [
            rank.scatter(*mine, half=half) for rank, *mine in zip(ranks, *arguments, strict=True)
        ]
    return found


def check_logits(ranks, logits: Tensor, case: Case) -> None:
    vocab, size = case.vocab, case.world_size
    starts = [vocab * i // size for i in range(size + 1)]
    for chunk in range(3):
        cut = [logits[:, starts[i] : starts[i + 1]].contiguous() + chunk for i in range(size)]
        found = at_once(ranks, "start_logits", cut, starts[:-1], [chunk] * size)
        assert all(torch.equal(whole, logits + chunk) for whole in found)


def normed(x: Tensor, norm: Norm) -> Tensor:
    values = x.double()
    scale = (values.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return values * scale * norm.weight.double()


def close(found: Tensor, wanted: Tensor, case: Case) -> None:
    """One rounding to bfloat16; the interpreter cuts off."""
    step = 2**-7 if case.exact else 2**-8
    assert (found.double() - wanted).abs().le(wanted.abs() * step * 1.01 + 1e-30).all()
    assert wanted.abs().max() > 1


def interpreted_cases() -> None:
    cpu = torch.device("cpu")
    run_case(Case(num_rows=5, exact=True), cpu)
    run_case(Case(num_rows=1, exact=True, hidden=96, vocab=64), cpu)
    run_case(Case(num_rows=7, exact=True, world_size=3), cpu)
