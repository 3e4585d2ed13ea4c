"""A recorded run's batches again, from its requests: the served scheduler, fed with what arrived."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from cluster.engine.plan import StepPlan
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence as EngineSequence
from cluster.model.shards import shard_sizes
from simulations.twin.recording import Recording


def replay_batches(recording: Recording) -> Iterator[list[StepPlan]]:
    """The replicas' plans of every iteration, as the scheduler makes them.

    Raises ValueError, KeyError or RuntimeError once what was recorded does not fit to them.
    """
    num_replicas = recording.config.parallel.topology.num_replicas
    schedulers = [Scheduler(recording.scheduler) for _ in range(num_replicas)]
    arriving = defaultdict(list)
    for request in recording.requests:
        arriving[request.iteration, request.replica].append(request)
    sampled: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for iteration, replica, seq_id, token in recording.arrays["sampled"].tolist():
        sampled[iteration, replica][seq_id] = token
    for iteration, step in enumerate(recording.arrays["steps"].tolist()):
        plans = []
        for replica, scheduler in enumerate(schedulers):
            for request in arriving[iteration, replica]:
                scheduler.add(EngineSequence(request.request_id, request.token_ids, request.params))
            plans.append(scheduler.schedule())
        yield plans
        if step >= 0:
            for replica, (scheduler, plan) in enumerate(zip(schedulers, plans, strict=True)):
                scheduler.update(plan, sampled[iteration, replica])


def recorded_plans(recording: Recording) -> Iterator[list[StepPlan]]:
    """The same as the leaders made them. Raises ValueError for what is no plan."""
    num_replicas = recording.config.parallel.topology.num_replicas
    data, ends = recording.arrays["plans"].tobytes(), recording.arrays["plan_ends"].tolist()
    encoded = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    plans = [StepPlan.decode(plan) for plan in encoded]
    for first in range(0, len(plans), num_replicas):
        yield plans[first : first + num_replicas]


def chunks_of(
    step: int, plans: Sequence[StepPlan], tensor_parallel_size: int, micro_batches: int
) -> list[tuple[int, int, int, int]]:
    """(step, micro-batch, rank, tokens) of a step: how its tokens divide over micro-batches and ranks."""
    chunks = []
    for micro_batch in range(micro_batches):
        rank = 0
        for plan in plans:
            tokens = shard_sizes(plan.num_tokens, micro_batches)[micro_batch]
            for own in shard_sizes(tokens, tensor_parallel_size):
                chunks.append((step, micro_batch, rank, own))
                rank += 1
    return chunks
