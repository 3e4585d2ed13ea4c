"""Meeting through the store: who did not come is named, and nobody outlives the pool's owner."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from comms.diagnosis import Diagnosis
from comms.groups import CommError, CommTimeout, ParallelGroups
from comms.shm import ShmGroup
from comms.store import connect_store, host_store
from comms.topology import Topology
from comms.where import Where
from tests.comms.test_collectives import TRANSPORTS

TWO = Topology(num_nodes=1, ranks_per_node=2)


def expect_a_third(groups: ParallelGroups, address: str, transport: str):
    """Ranks 0 and 1 connect a topology whose rank 2 never comes."""
    start = time.monotonic()
    try:
        ParallelGroups.connect(
            Topology(num_nodes=1, ranks_per_node=3),
            groups.rank,
            connect_store(address),
            epoch=7,
            **TRANSPORTS[transport],
            timeout_s=1.0,
        )
    except CommTimeout as error:
        return error, time.monotonic() - start
    raise AssertionError("connected without rank 2")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_who_does_not_connect_is_named(rank_pool, transport) -> None:
    store, address = host_store()
    for error, seconds in rank_pool.run(expect_a_third, TWO, address, transport):
        assert error.silent == (2,)
        assert "connect" in str(error)
        assert seconds >= 1.0
    del store


def two_epochs(groups: ParallelGroups, address: str, transport: str) -> list[float]:
    """The next epoch connects over the same store after the last one was aborted."""
    store = connect_store(address)
    sums = []
    for epoch in (1, 2, 3):
        mine = ParallelGroups.connect(
            groups.topology, groups.rank, store, epoch=epoch, **TRANSPORTS[transport]
        )
        sums.append(float(mine.world.all_reduce(torch.tensor([float(epoch)]))))
        groups.world.barrier()
        mine.abort()
        with pytest.raises(CommError, match="aborted by rank"):
            mine.world.barrier()
        mine.close()
    return sums


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_epochs_follow_each_other_on_one_store(rank_pool, transport) -> None:
    store, address = host_store()
    assert rank_pool.run(two_epochs, TWO, address, transport) == [[2.0, 4.0, 6.0]] * 2
    del store


def test_unknown_backend_is_refused() -> None:
    store, _ = host_store()
    with pytest.raises(ValueError, match="node_backend must be 'shm' or 'gloo', got 'rdma'"):
        ParallelGroups.connect(TWO, 0, store, node_backend="rdma")
    with pytest.raises(ValueError, match="inter_node_backend must be 'tcp' or 'gloo', got 'x'"):
        ParallelGroups.connect(TWO, 0, store, inter_node_backend="x")


def test_memory_that_cannot_be_mapped_names_the_rank_and_the_way_out() -> None:
    store, _ = host_store()
    store.set("far/1", f"{2**22 + 1} 5 99")  # no such process here
    mine = {"rank": 4, "store": store, "diagnosis": Diagnosis(store, 4, Where())}
    with pytest.raises(CommError, match=r"memory of rank 9 \(pid \d+\).*node_backend: gloo"):
        ShmGroup(name="far", ranks=(4, 9), timeout_s=1.0, **mine)
    with pytest.raises(ValueError, match="multiple of 64 bytes, got 100"):
        ShmGroup(name="odd", ranks=(4, 9), capacity=100, **mine)


def test_store_addresses() -> None:
    with pytest.raises(ValueError, match="\"host:port\", got 'nowhere'"):
        connect_store("nowhere")


def running(pid: str) -> bool:
    """Whether the process does anything: an ended one may wait for a busy parent to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


OWNER = """
import time
from comms.launch import RankPool
if __name__ == "__main__":
    pool = RankPool(2)
    print(*pool.pids, flush=True)
    time.sleep(60)
"""


def test_ranks_end_with_their_owner(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    ) as owner:
        pids = owner.stdout.readline().split()
        assert len(pids) == 2
        owner.kill()
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(running(pid) for pid in pids)


def test_the_store_listens_on_its_own_address_only() -> None:
    store, address = host_store("127.0.0.1")
    port = int(address.rpartition(":")[2])
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
    assert [a.ip for a in listening if a.port == port] == ["127.0.0.1"]
    del store


def links_of(groups: ParallelGroups, address: str):
    """The links of a second set of groups; a measured exchange; the whole world's numbers."""
    mine = ParallelGroups.connect(
        groups.topology, groups.rank, connect_store(address), epoch=1, with_links=True
    )
    mine.world.barrier()
    mine.close()
    return groups.links, mine.links


def test_all_ranks_agree_on_the_speed_of_the_links(rank_pool) -> None:
    store, address = host_store()
    two_nodes = Topology(num_nodes=2, ranks_per_node=2)
    answers = rank_pool.run(links_of, two_nodes, address)
    assert {not_asked for not_asked, _ in answers} == {None}
    (links,) = {links for _, links in answers}
    assert 1e-6 < links.latency_s < 10
    assert 1e3 < links.bytes_per_s < 1e12
    assert links.seconds(10**6) == pytest.approx(links.latency_s + 1e6 / links.bytes_per_s)
    store, address = host_store()
    assert rank_pool.run(links_of, TWO, address) == [(None, None)] * 2
    del store
