"""A cluster that serves: requests come, replicas step together, ranks fail and return.

    gateway (admission, choice of replica) -> schedulers plan -> one step of all -> tokens

All that decides is the production code: the gateway's table and choice, the scheduler with its KV
blocks. The MoE layers join all replicas, so a step lasts as long as its slowest rank, and requests
that come meanwhile wait for its end. Only time is computed: by `Stepper`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from comms.topology import Topology
from simulations.serving.arrivals import Arrival
from simulations.serving.faults import REGROUP_S, Fault
from simulations.serving.front_end import FrontEnd
from simulations.serving.record import Event, Record, Sample
from simulations.serving.replica import IDLE, Replica, Work


class Step(NamedTuple):
    """`balancedness`: mean over layers of mean / max over ranks of the tokens of experts."""

    seconds: float
    balancedness: float = 1.0


class Stepper(Protocol):
    """How long steps take, and where the experts are."""

    @property
    def events(self) -> list[Event]:
        """Of rebalances; the simulation takes them out."""

    def step(self, now_s: float, work: Sequence[Work]) -> Step:
        """One step of all replicas that starts now; also called again for a step that was lost."""

    def set_lost(self, ranks: Iterable[int]) -> bool:
        """These ranks are lost, all others live: whether each expert has a copy that lives."""


class Simulation:
    """`run` until all requests have ended. `concurrency`: users of a closed loop, None for an open one."""

    def __init__(
        self,
        *,
        topology: Topology,
        replicas: Sequence[Replica],
        front_end: FrontEnd,
        stepper: Stepper,
        arrivals: Iterable[Arrival],
        faults: Iterable[Fault] = (),
        concurrency: int | None = None,
    ) -> None:
        self.now_s = 0.0
        self.record = Record()
        self.front_end = front_end
        self.replicas = replicas
        self._topology = topology
        self._stepper = stepper
        self._arrivals = deque(arrivals)
        self._later: deque[Arrival] = deque()
        self._concurrency = concurrency
        if concurrency is not None:
            self._arrivals, self._later = self._later, self._arrivals
        self._faults = deque(faults)
        self._lost: dict[int, float] = {}
        """When each lost rank is back."""
        self._covered = True
        self._paused_until_s = 0.0
        self._balancedness = 1.0

    def run(
        self, stop: Callable[[], bool] = lambda: False, progress: Callable[[], None] = lambda: None
    ) -> None:
        """Raises nothing of its own; `stop` is asked before each step, `progress` called after it."""
        while not stop():
            self._take_in()
            if self.now_s < self._paused_until_s:
                self.now_s = min(
                    self._paused_until_s, self._next_change_s(), self._next_arrival_s()
                )
                self._note()
                continue
            work = [r.plan() if r.scheduler.has_work else IDLE for r in self.replicas]
            if any(w.tokens for w in work):
                self._step(work)
                progress()
            elif self.front_end.requests or self._arrivals:
                self.now_s = min(self._next_change_s(), self._next_arrival_s())
            else:
                return

    # Steps --------------------------------------------------------------------------------------

    def _step(self, work: Sequence[Work]) -> None:
        start_s = self.now_s
        step = self._stepper.step(start_s, work)
        self.record.events += self._stepper.events
        self._stepper.events.clear()
        end_s = start_s + step.seconds
        if self._faults and self._faults[0].time_s < end_s:
            self.now_s = self._faults[0].time_s  # the step is lost, and planned again
            return
        while self._next_arrival_s() < end_s:
            self._submit()
        self.now_s = end_s
        self.record.count(end_s, len(self.front_end.requests))
        output = 0
        for replica, its in zip(self.replicas, work, strict=True):
            if its.tokens:
                output += its.logits
                self.front_end.take(replica, replica.finish(), end_s)
        self._balancedness = step.balancedness
        self._note(output, sum(w.tokens for w in work))

    def _note(self, output_tokens: int = 0, input_tokens: int = 0) -> None:
        waiting = sum(len(r.scheduler.waiting) for r in self.replicas)
        self.record.add(
            Sample(
                end_s=self.now_s,
                output_tokens=output_tokens,
                input_tokens=input_tokens,
                running=sum(len(r.scheduler.running) for r in self.replicas),
                waiting=waiting + self.front_end.num_waiting_for_a_replica,
                kv_usage=self._kv_usage(),
                balancedness=self._balancedness,
            )
        )

    def _kv_usage(self) -> float:
        living = [r.scheduler.blocks for r in self.replicas if not r.suspect]
        return sum(b.num_used for b in living) / max(1, sum(b.num_blocks for b in living))

    # Requests -----------------------------------------------------------------------------------

    def _next_arrival_s(self) -> float:
        return self._arrivals[0].time_s if self._arrivals else math.inf

    def _submit(self) -> None:
        arrival = self._arrivals.popleft()
        self.record.count(arrival.time_s, len(self.front_end.requests))
        self.front_end.submit(arrival)

    def _users_send(self) -> None:
        """In a closed loop whoever has an answer, or a refusal, sends the next request at once."""
        if self._concurrency is None:
            return
        idle = self._concurrency - len(self.front_end.requests) - len(self._arrivals)
        for _ in range(min(idle, len(self._later))):
            self._arrivals.append(self._later.popleft()._replace(time_s=self.now_s))

    # Ranks --------------------------------------------------------------------------------------

    def _take_in(self) -> None:
        """Arrivals, losses and returns up to now, in order of time."""
        while True:
            self._users_send()
            change_s, arrival_s = self._next_change_s(), self._next_arrival_s()
            if min(change_s, arrival_s) > self.now_s:
                return
            if arrival_s < change_s:
                self._submit()
            elif self._faults and self._faults[0].time_s == change_s:
                self._lose(self._faults.popleft())
            else:
                self._return(change_s)

    def _next_change_s(self) -> float:
        """Of a rank; infinity if none will be."""
        fault_s = self._faults[0].time_s if self._faults else math.inf
        return min(fault_s, min(self._lost.values(), default=math.inf))

    def _lose(self, fault: Fault) -> None:
        self._lost[fault.rank] = fault.back_s
        replica = self.replicas[self._topology.replica_of(fault.rank)]
        moved = 0
        if not replica.suspect:
            replica.suspect = True
            replica.lose()
            moved = self.front_end.resubmit(replica)
        self._regroup(fault.time_s)
        served = (
            "each of its experts has another copy"
            if self._covered
            else f"experts without another copy: all wait until {self._paused_until_s:.1f} s"
        )
        what = f"rank {fault.rank} lost with replica {replica.idx}, requests sent again: {moved}; {served}"
        self.record.events.append(Event(fault.time_s, "failure", what))

    def _return(self, now_s: float) -> None:
        rank = min(rank for rank, back_s in self._lost.items() if back_s == now_s)
        del self._lost[rank]
        replica = self.replicas[self._topology.replica_of(rank)]
        if not any(self._topology.replica_of(other) == replica.idx for other in self._lost):
            replica.suspect = False
            self.front_end.house()
        self._regroup(now_s)
        self.record.events.append(Event(now_s, "recovery", f"rank {rank} is back"))

    def _regroup(self, now_s: float) -> None:
        """Nobody steps until the groups are built, nor while an expert has no copy that lives."""
        self._covered = self._stepper.set_lost(self._lost)
        until_s = now_s + REGROUP_S
        if not self._covered:
            until_s = max(until_s, min(self._lost.values()))
        self._paused_until_s = max(self._paused_until_s, until_s)
