"""Attention divided over GPUs: rows and sums are those of plain torch, and models give what one GPU gives."""

import time

import pytest
import torch

from comms.group import CommError, CommTimeout

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from comms.symmetric_memory import SymmetricMemory
from comms.symmetric_rows import SymmetricRows
from comms.symmetric_rows_layout import Norm, RowsLayout
from tests.gpu.tensor_parallel_cases import Case, at_once, ranks_in_one_process, run_case


def test_interpreted_kernels_do_as_plain_torch(interpreted) -> None:
    interpreted("tests.gpu.tensor_parallel_cases:interpreted_cases")


@pytest.mark.parametrize(
    "case",
    [
        Case(num_rows=1, hidden=256, vocab=64),
        Case(num_rows=33, hidden=7168, vocab=256),
        Case(num_rows=10, world_size=4, hidden=1408, vocab=256),
    ],
    ids=str,
)
def test_rows_and_sums_are_those_of_plain_torch(cuda, case) -> None:
    run_case(case, cuda)


def test_more_rows_than_programs(cuda) -> None:
    """Each takes several, and what a row gets is what it gets among few."""
    layout = RowsLayout(world_size=2, hidden=256, vocab_size=64, capacity=700)
    make = torch.Generator().manual_seed(0)
    parts = torch.randn(2, 700, 256, generator=make).bfloat16().to(cuda)
    found = []
    for programs, num_rows in ((16, 700), (64, 10)):
        ranks = ranks_in_one_process(layout, cuda)
        for rank in ranks:
            rank.expect(num_rows)
            rank.most_programs = programs
        sums = at_once(ranks, "scatter", parts[:, :num_rows])
        found.append(torch.cat([sum_OH for _, sum_OH in sums])[:num_rows])
        ranks[0].check()
    assert torch.equal(found[0][:10], found[1])
    assert torch.equal(found[0], (parts[0].float() + parts[1].float()).bfloat16())


def test_a_rank_that_does_not_come_is_named(cuda) -> None:
    layout = RowsLayout(world_size=2, hidden=256, vocab_size=64, capacity=8)
    x_OH = torch.randn(4, 256, device=cuda).bfloat16()
    for _ in range(2):  # the first time kernels are compiled
        memory = SymmetricMemory.in_one_process(2, layout.num_bytes, cuda)[0]
        alone = SymmetricRows(layout, memory, ranks=(4, 5), timeout_s=0.2)
        torch.cuda.synchronize()
        start = time.monotonic()
        for _ in range(3):
            rows_TH, _ = alone.gather(x_OH)
            alone.scatter(rows_TH)
        torch.cuda.synchronize()
        seconds = time.monotonic() - start
    assert 0.2 <= seconds < 0.6  # after the first failure nobody waits
    with pytest.raises(CommTimeout, match=r"rank 4 waited 0.2 s in gather.*rank 5"):
        alone.check()


def test_ranks_that_expect_different_numbers_of_rows_are_told(cuda) -> None:
    layout = RowsLayout(world_size=2, hidden=256, vocab_size=64, capacity=8)
    ranks = ranks_in_one_process(layout, cuda)
    ranks[1].expect(6)
    x_OH = torch.randn(4, 256, device=cuda).bfloat16()
    at_once(ranks, "gather", [x_OH, x_OH[:3]])
    with pytest.raises(CommError, match="expected 4 rows of rank 1 in gather, which sent 3"):
        ranks[0].check()


def test_arguments_that_cannot_be() -> None:
    layout = RowsLayout(world_size=2, hidden=256, vocab_size=64, capacity=8)
    ranks = ranks_in_one_process(layout, torch.device("cpu"))
    with pytest.raises(ValueError, match="room for 8 rows, expected 9"):
        ranks[0].expect(9)
    ranks[0].expect(3)
    with pytest.raises(ValueError, match=r"x_OH must be contiguous bfloat16 \[2, 256\]"):
        ranks[0].gather(torch.zeros(3, 256, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"parts_TH must be contiguous bfloat16 \[3, 256\]"):
        ranks[0].scatter(torch.zeros(3, 256), None, Norm(torch.zeros(256), 0.0))
    with pytest.raises(ValueError, match="sizes of at least 1"):
        RowsLayout(world_size=2, hidden=256, vocab_size=64, capacity=0)
    memory = SymmetricMemory.in_one_process(1, layout.num_bytes, torch.device("cpu"))[0]
    with pytest.raises(ValueError, match="does not fit memory of 1 ranks"):
        SymmetricRows(layout, memory)
