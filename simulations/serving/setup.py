"""Builds a simulated cluster that serves: memory, replicas, placement, policy, cost of steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from cluster.engine.scheduler import SchedulerConfig
from router.load import ExpertLoad
from router.placement import Placement
from router.planner import plan
from simulations.balance.divisions import Division, EvenDivision, ResplitDivision, StaticDivision
from simulations.balance.load_shares import LoadShape, Workload
from simulations.cost import CostModel
from simulations.deployment import Deployment
from simulations.eplb import eplb
from simulations.hardware.calibration import Calibration
from simulations.memory import DoesNotFit, MemoryPlan, kv_capacity_tokens, rank_memory
from simulations.serving.arrivals import Arrival
from simulations.serving.cluster_steps import ClusterSteps
from simulations.serving.demand import Demand
from simulations.serving.experts import ServedExperts
from simulations.serving.faults import Fault, check_faults
from simulations.serving.front_end import FrontEnd
from simulations.serving.rebalance import Eplb, Ours, Rebalancing, Stay
from simulations.serving.replica import Replica
from simulations.serving.simulation import Simulation

PolicyName = Literal["ours", "eplb", "none"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What serves. `cold_start`: experts start as they are loaded, and not where the policy would
    have put them for the load at the start. `max_model_len` None: the model's own limit.
    """

    deployment: Deployment
    calibration: Calibration
    workload: Workload
    policy: PolicyName = "ours"
    cold_start: bool = False
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 512
    block_size: int = 64
    max_num_queued_reqs: int = 65_536
    max_model_len: int | None = None
    seed: int = 0
    model_name: str = ""
    """As results show it; the architecture if empty."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}: choose from {', '.join(POLICIES)}")
        if self.max_num_queued_reqs < 1:
            raise ValueError(
                f"max_num_queued_reqs must be at least 1, got {self.max_num_queued_reqs}"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")

    def limits(self) -> SchedulerConfig:
        """Of one replica: what its memory has room for. Raises DoesNotFit."""
        room = kv_capacity_tokens(
            self.deployment, self.calibration, max_tokens=self.max_num_batched_tokens
        )
        if room < self.block_size:
            raise DoesNotFit(
                f"{room} tokens of KV cache fit a replica beside the weights, one block has "
                f"{self.block_size}; use more ranks, or fewer redundant experts"
            )
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            num_blocks=room // self.block_size,
            max_model_len=self.max_model_len or self.deployment.model.max_position_embeddings,
        )

    def memory(self) -> MemoryPlan:
        """Of the fullest rank. Raises DoesNotFit."""
        limits = self.limits()
        return rank_memory(
            self.deployment,
            self.calibration,
            max_tokens=self.max_num_batched_tokens,
            kv_tokens=limits.num_blocks * limits.block_size,
        )


def build(
    served: Served,
    cost: CostModel,
    arrivals: Iterable[Arrival],
    *,
    concurrency: int | None = None,
    faults: Iterable[Fault] = (),
) -> Simulation:
    """A simulation ready to run. `cost` of the same deployment. Raises ValueError."""
    limits, topology = served.limits(), served.deployment.topology
    model = served.deployment.model
    shape = LoadShape(
        num_layers=model.num_moe_layers,
        num_experts=model.num_experts,
        num_nodes=topology.num_nodes,
    )
    demand = Demand(served.workload, shape, model.gate, served.seed)
    rebalancing, division = _policy(served, _first_placement(served, demand))
    experts = ServedExperts(demand, rebalancing, division, model.gate.num_experts_per_token)
    replicas = [Replica(idx, limits) for idx in range(topology.num_replicas)]
    return Simulation(
        topology=topology,
        replicas=replicas,
        front_end=FrontEnd(
            replicas,
            max_model_len=limits.max_model_len,
            max_num_queued_reqs=served.max_num_queued_reqs,
        ),
        stepper=ClusterSteps(cost, experts),
        arrivals=arrivals,
        faults=check_faults(list(faults), topology.world_size),
        concurrency=concurrency,
    )


def _first_placement(served: Served, demand: Demand) -> Placement:
    deployment, topology = served.deployment, served.deployment.topology
    loaded = Placement.contiguous(
        demand.num_layers,
        demand.num_experts,
        topology.world_size,
        deployment.num_redundant_experts,
        ranks_per_node=topology.ranks_per_node,
    )
    if served.cold_start or served.policy == "none":
        return loaded
    if served.policy == "eplb":
        rows_LS = eplb(demand.mean_LE, deployment.num_slots, 1, 1, topology.world_size)
        return loaded.with_layers(dict(enumerate(rows_LS)), epoch=0)
    return plan(
        ExpertLoad(mean_LE=demand.mean_LE),
        num_ranks=topology.world_size,
        slots_per_rank=deployment.slots_per_rank,
        ranks_per_node=topology.ranks_per_node,
    ).placement


def _policy(served: Served, placement: Placement) -> tuple[Rebalancing, Division]:
    if served.policy == "none":
        return Stay(placement), StaticDivision(1, served.deployment.topology)
    if served.policy == "eplb":
        return Eplb(placement, served.deployment, served.calibration), EvenDivision(1)
    return Ours(placement, served.deployment), ResplitDivision()
