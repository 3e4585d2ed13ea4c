"""What one rank of a RankPool does: wait for a task, connect its groups, run it, answer.

Tasks and answers are pickled by value and only ever pass between a pool and its own children.
"""

import faulthandler
import os
import pickle
import select
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from comms.group import CommError
from comms.groups import InterNodeBackend, NodeBackend, ParallelGroups
from comms.store import TCPStore, connect_store
from comms.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call of `fn(groups, *args)` on one rank."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    topology: Topology
    rank: int
    epoch: int
    node_backend: NodeBackend
    inter_node_backend: InterNodeBackend
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An exception on its way back, with its traceback as text."""

    error: BaseException
    text: str


def serve_rank(
    tasks: Connection,
    stacks: Connection,
    store_address: str,
    owner_pid: int,
    place: Callable[[], None] | None = None,
) -> None:
    """Main function of a rank process: ends when the pool closes its end of the pipe, or dies."""
    if place is not None:
        place()  # before threads and sockets, which stay where they were made
    threading.Thread(target=_end_with, args=(owner_pid,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pool, which ends us
    faulthandler.register(signal.SIGUSR2, file=stacks.fileno(), all_threads=True)
    torch.set_num_threads(1)
    store = connect_store(store_address)
    while True:
        try:
            task = pickle.loads(tasks.recv_bytes())
        except EOFError:
            return
        if task is None:
            return
        answer = _run(task, store) if isinstance(task, Task) else task
        try:
            tasks.send_bytes(_pickled(answer))
        except BrokenPipeError:  # the pool closed meanwhile: nobody waits for the answer
            return


def _end_with(owner_pid: int) -> None:
    """Whatever this rank is stuck in, it does not outlive the process that owns the pool."""
    with suppress(ProcessLookupError):  # gone already
        select.select([os.pidfd_open(owner_pid)], [], [])
    os._exit(1)


def _run(task: Task, store: TCPStore) -> Any:
    groups = None
    try:
        groups = ParallelGroups.connect(
            task.topology,
            task.rank,
            store,
            epoch=task.epoch,
            node_backend=task.node_backend,
            inter_node_backend=task.inter_node_backend,
            timeout_s=task.timeout_s,
        )
        result = task.fn(groups, *task.args)
        with suppress(CommError):  # whoever broke the world reports it itself
            groups.world.barrier()  # nobody closes while a peer still needs what it sent
        return result
    except BaseException as error:  # noqa: BLE001  (whatever it is belongs to the caller)
        if groups is not None and not isinstance(error, CommError):
            groups.abort()  # peers need not wait for their deadline
        return Failure(error=error, text=traceback.format_exc())
    finally:
        if groups is not None:
            groups.close()


def _pickled(answer: Any) -> bytes:
    try:
        return pickle.dumps(answer)
    except Exception as error:  # noqa: BLE001  (pickle raises what it likes)
        what = answer.text if isinstance(answer, Failure) else f"a {type(answer).__name__}"
        text = f"process {os.getpid()} cannot send back {what}: {error!r}"
        return pickle.dumps(Failure(error=TypeError(text), text=text))
