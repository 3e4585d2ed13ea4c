"""Ranks that do not come: named by those who wait, on a rail, in a node, and when they meet."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from comms.group import CommTimeout
from comms.store import connect_store, host_store

pytest.importorskip("triton", reason="needs triton (the extra gpu)")

from comms.kernels.signals import LATE, ROWS_BITS
from comms.meeting import meet
from comms.rail_watch import Progress, RailWatch
from comms.symmetric_report import Report
from comms.where import Where


def _watch(progress: Progress, store, idx: int, aborted: list[int]) -> RailWatch:
    return RailWatch(
        progress, store, idx, (4, 5, 6), Where(step=12, layer=3), name="rail1", timeout_s=0.4,
        abort=lambda: aborted.append(idx),
    )  # fmt: skip


def test_whoever_is_late_on_a_rail_is_named_by_all_that_wait() -> None:
    store, _ = host_store()
    told: list[Progress] = [Progress(torch.device("cpu")) for _ in range(3)]
    aborted: list[int] = []
    watches = [_watch(progress, store, idx, aborted) for idx, progress in enumerate(told)]
    told[0].told[0] = 7  # in the dispatch of the third exchange
    time.sleep(0.1)
    told[2].told[0] = 7
    told[1].told[0] = 6  # between two exchanges, for as long as it likes
    deadline = time.monotonic() + 5
    while len(aborted) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for idx, rank in ((0, 4), (2, 6)):
        with pytest.raises(
            CommTimeout,
            match=rf"step 12, layer 3.*rank {rank} waited 0.4 s in dispatch \(exchange 3\) for rank 5$",
        ):
            watches[idx].check()
    watches[1].check()
    assert sorted(aborted) == [0, 2]
    for watch in watches:
        watch.close()


def test_an_exchange_that_goes_on_is_not_late() -> None:
    store, _ = host_store()
    progress, aborted = Progress(torch.device("cpu")), []
    watch = _watch(progress, store, 0, aborted)
    for kernels in (1, 2, 4, 5, 7, 8):
        progress.told[0] = kernels
        time.sleep(0.2)
    watch.check()
    watch.close()
    assert not aborted


def test_late_ranks_of_a_node_have_their_names_in_the_world() -> None:
    report = Report(1, (4, 5), torch.device("cpu"), Where(), 1.0)
    report.check(8)
    report.lines[0, 0] = torch.tensor([LATE, 7, 6 << ROWS_BITS, 0])
    with pytest.raises(CommTimeout, match=r"rank 5 waited 1 s in dispatch .signal 7.* for rank 4$"):
        report.check(8)


def test_members_that_do_not_come_are_named() -> None:
    store, address = host_store()
    with pytest.raises(CommTimeout, match=r"rank 5 waited 0.2 s in connect for rank 4, rank 6$"):
        meet(store, 5, (4, 5, 6), name="rail1", timeout_s=0.2)

    def words(rank: int) -> list[str]:
        return meet(connect_store(address), rank, (0, 1), f"{rank}", name="rail0", timeout_s=5)

    with ThreadPoolExecutor() as threads:
        assert list(threads.map(words, (0, 1))) == [["0", "1"]] * 2
