"""`simulate balance`: what is asked for, and what came out of it, as one result.

Everything is computed by what serves: the gate's group rule, placements, splits, policy and planner of
`router/`, drafts of `cluster/`, row formats of `comms/`; times are the cost model's.

T steps, L layers, E experts, R ranks, N nodes, U units: groups of the same shape, each with a load of
its own, that share nothing but the calibration.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.model.config import ModelConfig
from comms.topology import Topology
from router.policy import PolicyOptions
from simulations.balance_record import Recorder, UnitRecord
from simulations.balance_result import policy_result, shares_of
from simulations.balance_run import Clock, PolicyRun, run_unit
from simulations.cost import CostModel, StepWork
from simulations.deployment import Deployment
from simulations.divisions import Division, EvenDivision, ResplitDivision, StaticDivision
from simulations.expert_loads import ExpertLoads, SyntheticLoads
from simulations.hardware.calibration import Calibration
from simulations.load_shares import LoadShape, Workload
from simulations.load_sources import Order, recorded_loads
from simulations.memory import rank_memory
from simulations.policies import POLICIES, Eplb, Fixed, Ours, Plans
from simulations.processes import each_finished

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A file of recorded loads; `order` and `shift_every` as in `load_sources.py`."""

    path: Path
    order: Order = "mixed"
    shift_every: int = 500
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class BalanceSpec:
    """A run. Raises ValueError for what cannot be, naming it.

    tokens_per_rank: of a step; in "decode" sequences with `context` keys each, in "prefill" prompts of
    `context` tokens. interval: steps between two looks of our policy; window: steps that it
    remembers (EplbConfig's 64 looks of 1 s); eplb_interval: between EPLB's plans (SGLang's usual 1,000). bandwidth: bytes/s of weights that a rank of ours may receive.
    resplit_s: what counting and dividing a batch adds to each layer of `ours`; 0: all of it is hidden.
    """

    model_name: str
    deployment: Deployment
    calibration: Calibration
    load: Workload | Trace
    policies: tuple[str, ...] = POLICIES
    steps: int = 2000
    tokens_per_rank: int = 128
    context: int = 4096
    phase: Phase = "decode"
    interval: int = 50
    window: int = 1000
    eplb_interval: int = 1000
    bandwidth: float = 1e9
    resplit_s: float = 0.0
    units: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in POLICIES:
                raise ValueError(f"unknown policy {name!r}: choose from {', '.join(POLICIES)}")
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies must be different ones of {', '.join(POLICIES)}")
        if self.phase not in get_args(Phase):
            raise ValueError(f"unknown phase {self.phase!r}: decode or prefill")
        for name in (
            "steps",
            "tokens_per_rank",
            "context",
            "interval",
            "window",
            "eplb_interval",
            "units",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.bandwidth > 0 or not self.resplit_s >= 0 or self.seed < 0:
            raise ValueError(
                f"bandwidth({self.bandwidth:g}) must be > 0, resplit_s({self.resplit_s:g}) and "
                f"seed({self.seed}) >= 0"
            )
        gate, topology = self.deployment.model.gate, self.deployment.topology
        if gate.num_experts > 2**14:
            raise ValueError(f"num_experts({gate.num_experts}) must be at most {2**14}")
        replica_tokens = self.tokens_per_rank * topology.tensor_parallel_size
        rank_memory(
            self.deployment,
            self.calibration,
            max_tokens=replica_tokens,
            kv_tokens=replica_tokens * (self.context if self.phase == "decode" else 1),
        )

    @property
    def tokens(self) -> int:
        """Of a step of one unit."""
        return self.tokens_per_rank * self.deployment.num_ranks


def spare_slot_each(model: ModelConfig, topology: Topology) -> int:
    """Redundant experts that give every rank one slot more than experts need."""
    ranks = topology.world_size
    return ranks * (-(-model.num_experts // ranks) + 1) - model.num_experts


def simulate(
    spec: BalanceSpec,
    *,
    command: tuple[str, ...] = (),
    num_processes: int = 1,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda part: None,
) -> dict[str, Any]:
    """The result of a run; deterministic but for "steps_per_s".

    `stop` is asked between blocks of steps (of one unit) or ends what has not begun (of several, with
    KeyboardInterrupt); then the result is of what was done, with "interrupted". `progress` hears the
    part that is done. Raises LoadFileError, ValueError, KeyboardInterrupt if nothing was done.
    """
    began = time.monotonic()
    units: dict[int, UnitRecord] = {}
    warnings: list[str] = []
    interrupted = False
    if spec.units == 1:
        done = lambda steps: progress(steps / spec.steps)  # noqa: E731
        units[0], warnings = _unit(spec, 0, stop=stop, done=done)
        interrupted = units[0].num_steps < spec.steps
    else:
        try:
            finished = each_finished(partial(_unit, spec), range(spec.units), num_processes)
            with closing(finished) as results:
                for unit, (record, found) in results:
                    units[unit], warnings = record, found
                    progress(len(units) / spec.units)
        except KeyboardInterrupt:
            interrupted = True
    if not any(record.num_steps for record in units.values()):
        raise KeyboardInterrupt
    records = [units[unit] for unit in sorted(units)]
    seconds = time.monotonic() - began
    result = _result(spec, records, warnings, command)
    result["steps_per_s"] = round(len(units) / spec.units * records[0].num_steps / seconds, 3)
    if interrupted:
        result["interrupted"] = True
    return result


def make_loads(spec: BalanceSpec, unit: int) -> ExpertLoads:
    """The batches of a unit; ValueError for what does not fit the model or the cluster."""
    model, topology = spec.deployment.model, spec.deployment.topology
    shape = LoadShape(
        num_layers=model.num_moe_layers,
        num_experts=model.num_experts,
        num_nodes=topology.num_nodes,
    )
    seed, load = [spec.seed, unit], spec.load
    if isinstance(load, Trace):
        return recorded_loads(
            load.path,
            shape,
            model.gate,
            tokens=spec.tokens,
            order=load.order,
            shift_every=load.shift_every,
            jitter=load.jitter,
            seed=seed,
        )
    return SyntheticLoads(load, shape, model.gate, tokens=spec.tokens, seed=seed)


def _unit(
    spec: BalanceSpec,
    unit: int,
    *,
    stop: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda steps: None,
) -> tuple[UnitRecord, list[str]]:
    """One group under all policies, and what the cost model warned of."""
    deployment, topology = spec.deployment, spec.deployment.topology
    loads = make_loads(spec, unit)
    clock = Clock(steps=spec.steps, interval=spec.interval)
    options = PolicyOptions(bytes_per_expert=deployment.expert_bytes, bandwidth=spec.bandwidth)
    warm_up = clock.warm_up_counts(loads)
    cost = CostModel(deployment, spec.calibration)
    runs = {}
    for name in spec.policies:
        recorder = Recorder(
            spec.steps, deployment.model.num_moe_layers, topology.world_size, topology.num_nodes
        )
        runs[name] = PolicyRun(
            plans=_plans(name, spec, warm_up, options),
            division=_division(name, loads.num_origins, topology),
            cost=cost,
            work=_work(spec),
            slowdown=options.slowdown,
            extra_s=spec.resplit_s if name == "ours" else 0.0,
            recorder=recorder,
        )
    record = run_unit(loads, runs, clock, topology.world_size, stop=stop, done=done)
    return record, cost.warnings


def _plans(name: str, spec: BalanceSpec, warm_up: list[Any], options: PolicyOptions) -> Plans:
    topology, slots = spec.deployment.topology, spec.deployment.slots_per_rank
    if name in ("static", "ours"):
        looks = max(1.0, spec.window / spec.interval)
        return Ours(warm_up, topology, slots, options, horizon=looks)
    load_LE = sum(warm_up) / len(warm_up)
    if name == "none":
        return Fixed(load_LE, topology, slots)
    return Eplb(
        load_LE,
        topology,
        slots,
        every=spec.eplb_interval,
        expert_bytes=spec.deployment.expert_bytes,
        link_beta=spec.calibration.links["network" if topology.num_nodes > 1 else "node"].beta,
        relabel=name == "eplb_relabel",
    )


def _division(name: str, num_origins: int, topology: Topology) -> Division:
    if name == "ours":
        return ResplitDivision()
    return StaticDivision(num_origins, topology) if name == "static" else EvenDivision(num_origins)


def _work(spec: BalanceSpec) -> StepWork:
    tokens = spec.tokens_per_rank * spec.deployment.topology.tensor_parallel_size
    if spec.phase == "prefill":
        return StepWork.prefill(tokens, spec.context)
    return StepWork.decode(tokens, spec.context)


def _result(
    spec: BalanceSpec, units: list[UnitRecord], warnings: list[str], command: tuple[str, ...]
) -> dict[str, Any]:
    """In the order of keys in which people read it."""
    deployment, model = spec.deployment, spec.deployment.model
    topology = deployment.topology
    load = spec.load
    workload = (
        {**asdict(load), "name": "trace", "path": load.path.name}
        if isinstance(load, Trace)
        else asdict(load)
    )
    return {
        "kind": "balance",
        "version": version("expertmesh"),
        "seed": spec.seed,
        "command": list(command),
        "calibration": {"name": spec.calibration.name, "hash": spec.calibration.hash},
        "model": {
            "name": spec.model_name,
            "num_experts": model.num_experts,
            "num_moe_layers": model.num_moe_layers,
            "top_k": model.gate.num_experts_per_token,
        },
        "cluster": {
            "num_nodes": topology.num_nodes,
            "ranks_per_node": topology.ranks_per_node,
            "tensor_parallel_size": topology.tensor_parallel_size,
            "slots_per_rank": deployment.slots_per_rank,
            "num_redundant_experts": deployment.num_redundant_experts,
            "weights": deployment.weights,
            "dispatch_dtype": deployment.dispatch_dtype,
            "combine_dtype": deployment.combine_dtype,
            "dispatcher": deployment.dispatcher,
            "overlap": deployment.overlap,
            "units": len(units),
        },
        "workload": workload,
        "steps": units[0].num_steps,
        "tokens_per_rank": spec.tokens_per_rank,
        "context": spec.context,
        "phase": spec.phase,
        "interval": spec.interval,
        "window": spec.window,
        "eplb_interval": spec.eplb_interval,
        "steps_per_s": 0.0,
        "warnings": list(warnings),
        "expert_load_LE": shares_of(units),
        "policies": {
            name: policy_result([unit.policies[name] for unit in units], spec.tokens)
            for name in spec.policies
        },
    }
