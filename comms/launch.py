"""RankPool: ranks on this host without Ray, for tests, verification and benchmarks.

Ranks are forked from one server process that has imported torch already, so a rank costs
milliseconds instead of seconds, and they live on between runs. Every run gets fresh groups.
A run that hangs is killed, and the error shows where every rank was.
"""

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypedDict, Unpack, cast

from comms.groups import CommError, InterNodeBackend, NodeBackend
from comms.rank_process import Failure, Task, serve_rank
from comms.store import TCPStore, host_store
from comms.topology import Topology

_GRACE_S = 5.0  # for the other ranks to end, once one has failed


class RankError(RuntimeError):
    """A rank of the pool failed. `rank` says which; the message holds its traceback."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


class RankDied(RankError):  # noqa: N818  (named by what happened)
    """The process of a rank ended without an answer."""


class RankTimeout(RankError):  # noqa: N818  (named by what happened)
    """Ranks did not answer in time; the message holds the stacks of all threads of all ranks."""


@dataclass(frozen=True, kw_only=True)
class _Rank:
    process: BaseProcess
    tasks: Connection
    stacks: Connection


class RunOptions(TypedDict, total=False):
    """How a run is made: its deadline (60 s), that of each collective (30 s), and the backends."""

    timeout_s: float
    comm_timeout_s: float
    node_backend: NodeBackend
    inter_node_backend: InterNodeBackend


class RankPool:
    """Rank processes, started on demand and reused. Use as a context manager or call close().

    place: called with the rank, first thing in its process, e.g. to move it to a network of its own
    (picklable). store: the rendezvous and its "host:port", where loopback does not reach the ranks.
    """

    def __init__(
        self,
        num_ranks: int = 0,
        *,
        place: Callable[[int], None] | None = None,
        store: tuple[TCPStore, str] | None = None,
    ) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed", "comms.rank_process"])
        self._place = place
        self._store, self._address = store or host_store("127.0.0.1")
        self._epoch = 0
        self._ranks: list[_Rank] = []
        self._grow(num_ranks)

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid or 0 for rank in self._ranks]

    def run(
        self, fn: Callable[..., Any], topology: Topology, *args: Any, **options: Unpack[RunOptions]
    ) -> list[Any]:
        """fn(groups, *args) on every rank of `topology`; results in rank order.

        `fn` must be importable (a module-level function); arguments and results are pickled.
        Raises RankError with the first rank that failed of its own accord, RankTimeout after
        `timeout_s`.
        """
        outcomes = self.outcomes(fn, topology, *args, **options)
        failures = [(i, x) for i, x in enumerate(outcomes) if isinstance(x, BaseException)]
        if failures:
            rank, error = min(failures, key=lambda failure: _severity(failure[1]))
            if isinstance(error, RankError):
                raise error
            text = "".join(getattr(error, "__notes__", []))
            raise RankError(rank, f"rank {rank} failed: {error!r}\n{text}") from error
        return outcomes

    def outcomes(
        self, fn: Callable[..., Any], topology: Topology, *args: Any, **options: Unpack[RunOptions]
    ) -> list[Any]:
        """Like run, but a rank's exception takes the place of its result."""
        self._grow(topology.world_size)
        self._epoch += 1
        for rank in range(topology.world_size):
            task = Task(
                fn=fn,
                args=args,
                topology=topology,
                rank=rank,
                epoch=self._epoch,
                node_backend=options.get("node_backend", "shm"),
                inter_node_backend=options.get("inter_node_backend", "tcp"),
                timeout_s=options.get("comm_timeout_s", 30.0),
            )
            self._ranks[rank].tasks.send_bytes(pickle.dumps(task))
        return self._collect(topology.world_size, options.get("timeout_s", 60.0))

    def close(self) -> None:
        for rank in self._ranks:
            rank.tasks.close()
        for rank in self._ranks:
            rank.process.join(2.0)
        self._kill_all()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _grow(self, num_ranks: int) -> None:
        while len(self._ranks) < num_ranks:
            rank = len(self._ranks)
            tasks, their_tasks = self._context.Pipe()
            stacks, their_stacks = self._context.Pipe(duplex=False)
            process = self._context.Process(
                target=serve_rank,
                args=(
                    their_tasks,
                    their_stacks,
                    self._address,
                    os.getpid(),
                    partial(self._place, rank) if self._place else None,
                ),
                name=f"expertmesh-rank-{rank}",
                daemon=True,
            )
            process.start()
            their_tasks.close()
            their_stacks.close()
            self._ranks.append(_Rank(process=process, tasks=tasks, stacks=stacks))

    def _collect(self, world_size: int, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        failing = False
        answers: dict[int, Any] = {}
        pipes = {self._ranks[rank].tasks: rank for rank in range(world_size)}
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._give_up(answers, list(pipes.values()), timeout_s, failing)
                break
            for pipe in ready:
                rank = pipes.pop(cast(Connection, pipe))
                answers[rank] = self._answer(rank)
                if isinstance(answers[rank], BaseException) and not failing:
                    failing = True
                    if not isinstance(answers[rank], CommError):
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
        if any(isinstance(answer, RankError) for answer in answers.values()):
            self._kill_all()
        return [answers[rank] for rank in range(world_size)]

    def _answer(self, rank: int) -> Any:
        try:
            answer = pickle.loads(self._ranks[rank].tasks.recv_bytes())
        except (EOFError, ConnectionError):
            process = self._ranks[rank].process
            process.join(2.0)
            return RankDied(rank, f"rank {rank} died with exit code {process.exitcode}")
        if isinstance(answer, Failure):
            answer.error.add_note(answer.text)
            return answer.error
        return answer

    def _give_up(
        self, answers: dict[int, Any], missing: list[int], timeout_s: float, failing: bool
    ) -> None:
        stacks = self._all_stacks()
        why = "another rank failed" if failing else f"no answer within {timeout_s:g} s"
        for rank in missing:
            answers[rank] = RankTimeout(rank, f"rank {rank} was killed: {why}\n{stacks}")

    def _all_stacks(self) -> str:
        for rank in self._ranks:
            if rank.process.pid and rank.process.is_alive():
                os.kill(rank.process.pid, signal.SIGUSR2)
        time.sleep(0.3)
        parts = []
        for i, rank in enumerate(self._ranks):
            text = b""
            while rank.stacks.poll(0):
                chunk = os.read(rank.stacks.fileno(), 1 << 16)
                if not chunk:
                    break
                text += chunk
            parts.append(f"--- rank {i} ---\n{text.decode(errors='replace')}")
        return "\n".join(parts)

    def _kill_all(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join(5.0)
            rank.process.close()
            rank.tasks.close()
            rank.stacks.close()
        self._ranks = []


def _severity(error: BaseException) -> int:
    """Own failures first, then deaths, then what only followed from another rank."""
    if isinstance(error, RankTimeout):
        return 2
    if isinstance(error, CommError):
        return 3
    return 1 if isinstance(error, RankError) else 0
