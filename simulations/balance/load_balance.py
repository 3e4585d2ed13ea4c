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
from functools import partial
from typing import Any

from comms.topology import Topology
from router.policy import PolicyOptions
from simulations.balance.divisions import Division, EvenDivision, ResplitDivision, StaticDivision
from simulations.balance.expert_loads import ExpertLoads, SyntheticLoads
from simulations.balance.load_shares import LoadShape
from simulations.balance.load_sources import recorded_loads
from simulations.balance.policies import Eplb, Fixed, Ours, Plans
from simulations.balance.result import balance_result
from simulations.balance.run import Clock, PolicyRun, run_unit
from simulations.balance.run_record import Recorder, UnitRecord
from simulations.balance.spec import BalanceSpec, Trace, spare_slot_each
from simulations.cost import CostModel, StepWork
from simulations.processes import each_finished

__all__ = ["BalanceSpec", "Trace", "make_loads", "simulate", "spare_slot_each"]


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
    result = balance_result(spec, records, warnings, command)
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
