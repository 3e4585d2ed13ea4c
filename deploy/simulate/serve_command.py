"""What `expertmesh simulate serve` does with its options, and what it prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from comms.topology import Topology
from deploy.simulate.asked_to_stop import asked_to_stop
from deploy.simulate.outputs import INTERRUPTED, Outputs, command
from deploy.simulate.serve_summary import show
from simulations.balance.load_shares import Workload
from simulations.cost import CostModel
from simulations.deployment import Deployment
from simulations.hardware.calibration import Calibration
from simulations.presets import load_model, shown_name
from simulations.serving.arrivals import (
    BURSTINESS,
    Arrival,
    Lengths,
    closed_arrivals,
    open_arrivals,
)
from simulations.serving.faults import Fault
from simulations.serving.pareto import pareto_point, parse_concurrency
from simulations.serving.request_trace import read_trace
from simulations.serving.result import head, outcome
from simulations.serving.setup import Served, build
from simulations.serving.simulation import Simulation

ARRIVALS = ("poisson", "bursts", "closed")
NUM_REQUESTS = 2000
MAX_REQUESTS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """As given; see the command's help."""

    preset: str
    nodes: int
    ranks_per_node: int
    tp: int
    redundant_experts: int | None
    weights: str
    kv_dtype: str
    dispatcher: str
    overlap: str
    calibration: str
    arrivals: str
    rate: float
    concurrency: int
    requests: int | None
    duration: float | None
    prompt: str
    output: str
    trace: Path | None
    workload: str
    skew: float | None
    jitter: float
    shift_every: int
    policy: str
    cold_start: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    max_model_len: int | None
    max_num_queued_reqs: int
    fail: tuple[str, ...]
    pareto: str | None
    seed: int


def serve_command(options: Options, outputs: Outputs) -> int:
    """Simulate, print a summary, write what was asked for; the exit code."""
    try:
        run = _Run(options)
        outputs.check()
        with asked_to_stop() as stop:
            result = run.result(stop)
            interrupted = stop()
        if interrupted:
            result["interrupted"] = True
        show(result, run.seconds)
        outputs.write(result)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return INTERRUPTED if interrupted else 0


class _Run:
    """Everything read and checked; then `result`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.served = _served(options)
        self.cost = CostModel(self.served.deployment, self.served.calibration)
        self.prompt, self.output = Lengths.parse(options.prompt), Lengths.parse(options.output)
        self.users = parse_concurrency(options.pareto) if options.pareto else ()
        arrivals = self._arrivals()
        self.num_requests = len(arrivals)
        closed = options.arrivals == "closed" and options.trace is None
        self.simulation: Simulation = build(
            self.served,
            self.cost,
            arrivals,
            concurrency=options.concurrency if closed else None,
            faults=[Fault.parse(text) for text in options.fail],
        )
        self.seconds = 0.0

    def result(self, stop: Callable[[], bool]) -> dict[str, Any]:
        """Runs what `stop` leaves time for."""
        start = time.perf_counter()
        with _progress(self.num_requests, self.simulation) as tick:
            self.simulation.run(stop, tick)
        self.seconds = time.perf_counter() - start
        points = []
        for users in self.users:
            point = pareto_point(
                self.served, self.cost, users, prompt=self.prompt, output=self.output, stop=stop
            )
            if point is None:
                break
            points.append(point)
        return {
            "kind": "serve",
            "version": version("expertmesh"),
            "seed": self.options.seed,
            "command": command(),
            **head(self.served),
            "workload": self._workload(),
            "steps_per_s": self.simulation.record.num_steps / max(self.seconds, 1e-9),
            "warnings": [*_refusals(self.simulation), *self.cost.warnings],
            **outcome(self.simulation, self.served),
            "pareto": points,
        }

    def _arrivals(self) -> Sequence[Arrival]:
        options = self.options
        if options.arrivals not in ARRIVALS:
            raise ValueError(
                f"unknown arrivals {options.arrivals!r}: choose from {', '.join(ARRIVALS)}"
            )
        if options.requests is not None and options.duration is not None:
            raise ValueError("give --requests or --duration, not both")
        if options.requests is not None and not 1 <= options.requests <= MAX_REQUESTS:
            raise ValueError(
                f"--requests must be from 1 to {MAX_REQUESTS:,}, got {options.requests}"
            )
        if options.duration is not None and not 0 < options.duration <= 1e9:
            raise ValueError(f"--duration must be above 0 s, got {options.duration:g}")
        if options.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {options.seed}")
        if options.concurrency < 1:
            raise ValueError(f"--concurrency must be at least 1, got {options.concurrency}")
        if options.trace is not None:
            return self._part(read_trace(options.trace))
        if options.arrivals == "closed":
            if options.duration is not None:
                raise ValueError("--arrivals closed takes --requests, not --duration")
            return closed_arrivals(
                num_requests=options.requests or NUM_REQUESTS,
                prompt=self.prompt,
                output=self.output,
                seed=options.seed,
            )
        burstiness = BURSTINESS if options.arrivals == "bursts" else 1.0
        return self._part(
            open_arrivals(
                rate=options.rate,
                num_requests=self._most(),
                prompt=self.prompt,
                output=self.output,
                seed=options.seed,
                burstiness=burstiness,
            )
        )

    def _most(self) -> int:
        """Requests to draw: of a duration more than will ever come in it."""
        options = self.options
        if options.duration is None:
            return options.requests or NUM_REQUESTS
        expected = max(0.0, options.rate * options.duration)
        if expected > MAX_REQUESTS:
            raise ValueError(
                f"--rate x --duration = {expected:,.0f} requests; at most {MAX_REQUESTS:,}"
            )
        return int(expected + 20 * expected**0.5) + 20

    def _part(self, arrivals: Sequence[Arrival]) -> Sequence[Arrival]:
        """The first `requests`, or those of the first `duration` seconds."""
        until_s = self.options.duration
        if until_s is None:
            return arrivals[: self.options.requests]
        within = list(takewhile(lambda arrival: arrival.time_s <= until_s, arrivals))
        if not within:
            raise ValueError(f"no request comes within {until_s:g} s")
        return within

    def _workload(self) -> dict[str, Any]:
        options, workload = self.options, self.served.workload
        experts = {"name": workload.name, "skew": workload.skew, "jitter": workload.jitter}
        if options.trace is not None:
            return {**experts, "arrivals": "trace", "trace": options.trace.name}
        how = (
            {"concurrency": options.concurrency}
            if options.arrivals == "closed"
            else {"rate": options.rate}
        )
        lengths = {"prompt": options.prompt, "output": options.output}
        return {**experts, "arrivals": options.arrivals, **how, **lengths}


def _served(options: Options) -> Served:
    model = load_model(options.preset)
    topology = Topology(
        num_nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        tensor_parallel_size=options.tp,
    )
    redundant = options.redundant_experts
    if redundant is None:  # one spare slot a rank
        ranks = topology.world_size
        redundant = (-(-model.num_experts // ranks) + 1) * ranks - model.num_experts
    values: dict[str, Any] = {
        name: getattr(options, name) for name in ("weights", "kv_dtype", "dispatcher", "overlap")
    }
    return Served(
        deployment=Deployment(
            model=model, topology=topology, num_redundant_experts=redundant, **values
        ),
        calibration=Calibration.load(options.calibration),
        workload=Workload(
            name=options.workload,
            skew=options.skew,
            jitter=options.jitter,
            shift_every=options.shift_every,
        ),
        policy=options.policy,  # type: ignore[arg-type]  # Served checks it
        cold_start=options.cold_start,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=options.block_size,
        max_model_len=options.max_model_len,
        max_num_queued_reqs=options.max_num_queued_reqs,
        seed=options.seed,
        model_name=shown_name(options.preset),
    )


def _refusals(simulation: Simulation) -> list[str]:
    front = simulation.front_end
    if not (refused := front.num_rejected + front.num_failed):
        return []
    return [f"requests refused: {refused}; the first because {front.first_refusal}"]


@contextmanager
def _progress(num_requests: int, simulation: Simulation) -> Iterator[Callable[[], None]]:
    """A bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[at]}"), console=console) as progress:
        task = progress.add_task("requests", total=num_requests, at="")

        def tick() -> None:
            front = simulation.front_end
            ended = len(front.finished) + front.num_rejected + front.num_failed
            progress.update(task, completed=ended, at=f"{simulation.now_s:,.1f} s simulated")

        yield tick
