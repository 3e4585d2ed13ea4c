"""Small clusters without a cost model: every step takes the time that a test says."""

from collections.abc import Callable, Iterable, Sequence

from cluster.engine.scheduler import SchedulerConfig
from comms.topology import Topology
from simulations.serving.arrivals import Arrival
from simulations.serving.faults import Fault
from simulations.serving.front_end import FrontEnd
from simulations.serving.record import Event
from simulations.serving.replica import Replica, Work
from simulations.serving.simulation import Simulation, Step


class FixedStepper:
    """`seconds` of a step's work; experts on ranks of `needed` have no other copy."""

    def __init__(
        self, seconds: Callable[[Sequence[Work]], float], needed: Iterable[int] = ()
    ) -> None:
        self.events: list[Event] = []
        self.work: list[tuple[float, list[Work]]] = []
        self._seconds, self._needed = seconds, set(needed)

    def step(self, now_s: float, work: Sequence[Work]) -> Step:
        self.work.append((now_s, list(work)))
        return Step(self._seconds(work))

    def set_lost(self, ranks: Iterable[int]) -> bool:
        return not self._needed & set(ranks)


def limits(**changes: int) -> SchedulerConfig:
    values = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": 16,
        "num_blocks": 64,
        "max_model_len": 512,
    }
    return SchedulerConfig(**{**values, **changes})


def simulation(
    arrivals: Sequence[Arrival],
    *,
    num_replicas: int = 1,
    config: SchedulerConfig | None = None,
    stepper: FixedStepper | None = None,
    faults: Iterable[Fault] = (),
    concurrency: int | None = None,
    max_num_queued_reqs: int = 1_000_000,
) -> Simulation:
    config = config or limits()
    replicas = [Replica(idx, config) for idx in range(num_replicas)]
    front_end = FrontEnd(
        replicas, max_model_len=config.max_model_len, max_num_queued_reqs=max_num_queued_reqs
    )
    return Simulation(
        topology=Topology(num_nodes=1, ranks_per_node=num_replicas, tensor_parallel_size=1),
        replicas=replicas,
        front_end=front_end,
        stepper=stepper or FixedStepper(lambda work: 0.01),
        arrivals=arrivals,
        faults=faults,
        concurrency=concurrency,
    )
