"""Processes that were shown one GPU each, as Ray does, reach each other's memory."""

import multiprocessing
import os

import pytest
import torch

from comms.store import connect_store, host_store


def meet(rank: int, address: str, answers) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    from cluster.gpus import see_gpus
    from comms.symmetric_memory import SymmetricMemory

    see_gpus([str(rank), str(1 - rank)])
    assert (torch.cuda.current_device(), torch.cuda.device_count()) == (rank, 2)
    device = torch.device("cuda", rank)
    store = connect_store(address)
    memory = SymmetricMemory.connect(store, rank, 2, 1 << 16, device)
    theirs = memory.handle.get_buffer(1 - rank, (16,), torch.uint8)
    theirs.fill_(10 + rank)
    torch.cuda.synchronize()
    store.set(f"written{rank}", "")
    store.wait([f"written{1 - rank}"])
    answers.put((rank, memory.bytes[:16].tolist()))
    store.wait([f"written{rank}", "over"])


@pytest.mark.usefixtures("both_gpus")
def test_each_process_numbers_them_alike():
    store, address = host_store()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=meet, args=(rank, address, answers)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    found = dict(answers.get(timeout=60) for _ in ranks)
    store.set("over", "")
    for rank in ranks:
        rank.join(30)
    assert found == {0: [11] * 16, 1: [10] * 16}
