"""What an MoE layer's exchange costs: bytes between hosts, seconds and error, scheme beside scheme.

Every scheme carries the same tokens, routed by the same gate, over the same links, in turns within
one run. Bytes are read from the counters of the hosts' network interfaces, with the dispatcher's own
ledger beside them. Experts are a gain per channel, so that what is measured is communication.

Legend: T tokens of a rank, H hidden, K experts per token, E experts, P (row, k) pairs.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from comms.dispatcher import Received
from comms.groups import InterNodeBackend, ParallelGroups
from comms.make import make_dispatcher
from comms.topology import Topology
from experts.gains import token_ranges
from router.gate import Gate, GateConfig
from simulations import netns
from simulations.hosted import ranks_on
from simulations.testbed import INTERFACE, parse_rate

BASELINE = "flat_bf16"
SEED = 3_141


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A dispatcher and its options. per_expert: every (token, expert) is a row of its own."""

    dispatcher: str
    per_expert: bool = False
    options: Mapping[str, str] = field(default_factory=dict)


SCHEMES = {
    "flat_bf16": Scheme(dispatcher="flat", per_expert=True, options={"combine": "exact"}),
    "flat_fp8": Scheme(
        dispatcher="flat",
        per_expert=True,
        options={"combine": "exact", "dispatch_dtype": "float8"},
    ),
    "hier_fp8": Scheme(dispatcher="hierarchical", options={"dispatch_dtype": "float8"}),
    "hier_fp8_logfmt": Scheme(
        dispatcher="hierarchical",
        options={"dispatch_dtype": "float8", "combine_dtype": "logfmt10"},
    ),
    "hier_int8_int8": Scheme(
        dispatcher="hierarchical", options={"dispatch_dtype": "int8", "combine_dtype": "int8"}
    ),
    "hier_fp8_fixed": Scheme(
        dispatcher="hierarchical", options={"dispatch_dtype": "float8", "combine": "fixed"}
    ),
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One layer's work. `tokens` are those of each rank; `rate` None is links without a limit.

    hosts 0: two nodes on loopback, without namespaces and so without interface counters. Raises
    ValueError for a workload that cannot be.
    """

    hosts: int = 4
    ranks_per_host: int = 2
    rate: str | None = "200mbit"
    hidden: int = 2048
    experts: int = 256
    topk: int = 8
    groups: int = 8
    topk_groups: int = 4
    tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("ranks_per_host", "hidden", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hosts < 0 or self.hosts == 1:
            raise ValueError(f"hosts must be 0 or at least 2, got {self.hosts}")
        if self.experts % self.topology.world_size:
            raise ValueError(
                f"experts must be a multiple of the ranks, got experts({self.experts}) "
                f"% ranks({self.topology.world_size}) = {self.experts % self.topology.world_size}"
            )
        _ = self.gate
        if self.rate is not None:
            parse_rate(self.rate)

    @property
    def topology(self) -> Topology:
        return Topology(num_nodes=self.hosts or 2, ranks_per_node=self.ranks_per_host)

    @property
    def gate(self) -> GateConfig:
        """DeepSeek-V3's: sigmoid, groups by the sum of their two best, renormalised."""
        return GateConfig(
            num_experts=self.experts,
            num_experts_per_token=self.topk,
            scoring="sigmoid",
            num_groups=self.groups,
            num_groups_per_token=self.topk_groups,
            group_score="top2_sum",
            renormalize=True,
        )

    @property
    def patience_s(self) -> float:
        """A deadline for one exchange that only a broken one misses: all of a host's bytes, slowly."""
        num_bytes = 2 * self.ranks_per_host * self.tokens * self.topk * self.hidden
        seconds = 0.0 if self.rate is None else 8 * num_bytes / parse_rate(self.rate)
        return 60.0 + 10 * seconds


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One layer on one rank. wire_bytes: sent by my host, on its first rank; None elsewhere."""

    seconds: float
    ledger_bytes: int
    wire_bytes: int | None
    squared_error: float
    squared_reference: float


def run(
    workload: Workload,
    *,
    schemes: Sequence[str] = tuple(SCHEMES),
    repeats: int = 5,
    inter_node_backend: str = "tcp",
) -> dict[str, Any]:
    """{"config", "schemes": {name: {wire_bytes, ledger_bytes, seconds_median, seconds_p95,
    rel_l2, ...}}}, all per layer; bytes are those of all hosts together, seconds the slowest rank's.

    Raises ValueError for schemes that do not exist, TestbedError where hosts cannot be made.
    """
    if unknown := [name for name in schemes if name not in SCHEMES]:
        raise ValueError(f"there is no scheme {unknown[0]!r}; there are {', '.join(SCHEMES)}")
    if inter_node_backend not in ("tcp", "gloo"):
        raise ValueError(f"inter_node_backend must be tcp or gloo, got {inter_node_backend!r}")
    if not schemes or repeats < 1:
        raise ValueError(f"need a scheme and a repeat, got {list(schemes)} and {repeats}")
    with ranks_on(workload.hosts, workload.ranks_per_host, workload.rate) as pool:
        per_rank = pool.run(
            _measure,
            workload.topology,
            workload,
            tuple(schemes),
            repeats,
            timeout_s=4 * (repeats + 1) * len(schemes) * workload.patience_s,
            comm_timeout_s=workload.patience_s,
            inter_node_backend=cast(InterNodeBackend, inter_node_backend),
        )
    results = {name: _summary([samples[name] for samples in per_rank]) for name in schemes}
    return {
        "config": {
            **asdict(workload),
            "repeats": repeats,
            "inter_node_backend": inter_node_backend,
        },
        "schemes": _with_ratios(results),
    }


def _summary(per_rank: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """Over the repeats, of what all ranks did in each."""
    repeats = list(zip(*per_rank, strict=True))
    seconds = [max(sample.seconds for sample in samples) for samples in repeats]
    wire = [
        sum(sample.wire_bytes for sample in samples if sample.wire_bytes is not None)
        for samples in repeats
        if any(sample.wire_bytes is not None for sample in samples)
    ]
    last = repeats[-1]
    error = sum(sample.squared_error for sample in last)
    return {
        "wire_bytes": int(statistics.median(wire)) if wire else None,
        "ledger_bytes": sum(sample.ledger_bytes for sample in last),
        "seconds_median": statistics.median(seconds),
        "seconds_p95": float(torch.quantile(torch.tensor(seconds, dtype=torch.float64), 0.95)),
        "rel_l2": (error / sum(sample.squared_reference for sample in last)) ** 0.5,
        "seconds": seconds,
    }


def _with_ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    base = results.get(BASELINE)
    for row in results.values() if base else ():
        assert base is not None
        kind = "ledger_bytes" if base["wire_bytes"] is None else "wire_bytes"
        row["bytes_ratio"] = row[kind] / base[kind]
        row["seconds_ratio"] = row["seconds_median"] / base["seconds_median"]
    return results


def _measure(
    groups: ParallelGroups, workload: Workload, schemes: Sequence[str], repeats: int
) -> dict[str, list[Sample]]:
    """What each rank does: every scheme once to warm up, then all of them in turns."""
    problem = Problem.of_rank(workload, groups.rank)
    layers = {name: layer_of(SCHEMES[name], groups, problem) for name in schemes}
    samples: dict[str, list[Sample]] = {name: [] for name in schemes}
    for repeat in range(-1, repeats):
        for turn in range(len(schemes)):
            name = schemes[(turn + repeat) % len(schemes)]
            if groups.rank == 0:
                what = "warm-up" if repeat < 0 else f"repeat {repeat + 1} of {repeats}"
                print(f"{what}: {name}", file=sys.stderr, flush=True)
            sample = _sample(groups, workload, problem, *layers[name])
            if repeat >= 0:
                samples[name].append(sample)
    return samples


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A rank's tokens, where they go, and what should come back. Expert e times gains_EH[e] is
    expert e; experts lie contiguously over the ranks, one slot each."""

    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    range_T: Tensor
    gains_EH: Tensor
    expected_TH: Tensor

    @classmethod
    def of_rank(cls, workload: Workload, rank: int) -> "Problem":
        common = torch.Generator().manual_seed(SEED)
        gains_EH = torch.randn(workload.experts, workload.hidden, generator=common)
        mine = torch.Generator().manual_seed(SEED + 1 + rank)
        x_TH = torch.randn(workload.tokens, workload.hidden, generator=mine).to(torch.bfloat16)
        gate = Gate(workload.gate, torch.zeros(workload.experts, 1))
        logits_TE = torch.randn(workload.tokens, workload.experts, generator=mine)
        ids_TK, weights_TK = gate.choose(logits_TE)
        expected_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
        for k in range(workload.topk):
            factor_TH = weights_TK[:, k, None].double() * gains_EH[ids_TK[:, k]].double()
            expected_TH += factor_TH * x_TH.double()
        return cls(
            x_TH=x_TH,
            ids_TK=ids_TK,
            weights_TK=weights_TK,
            range_T=token_ranges(ids_TK, weights_TK, gains_EH.square().mean(dim=1).sqrt()),
            gains_EH=gains_EH,
            expected_TH=expected_TH,
        )


def layer_of(
    scheme: Scheme, groups: ParallelGroups, problem: Problem
) -> tuple[Any, Callable[[], Tensor]]:
    """The scheme's dispatcher, and its whole layer: dispatch, experts, combine."""
    num_experts, hidden = problem.gains_EH.shape
    slots_per_rank = num_experts // groups.topology.world_size
    dispatcher = make_dispatcher(
        scheme.dispatcher,
        groups,
        slots_per_rank=slots_per_rank,
        hidden=hidden,
        **scheme.options,
    )
    my_gains_SH = problem.gains_EH[groups.rank * slots_per_rank :][:slots_per_rank]

    range_T = problem.range_T if scheme.options.get("combine") == "fixed" else None

    def experts(received: Received) -> Tensor:
        rows_P, columns_P = torch.nonzero(received.local_slots_RK >= 0, as_tuple=True)
        gains_PH = my_gains_SH[received.local_slots_RK[rows_P, columns_P]]
        return (received.x_RH[rows_P].float() * gains_PH).to(received.x_RH.dtype)

    def exchange(
        x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None
    ) -> Tensor:
        pending = dispatcher.start_dispatch(x_TH, slots_TK, weights_TK, range_T)
        outputs = [experts(part) for part in pending]
        return dispatcher.start_combine(outputs, pending.handle).wait()

    def whole() -> Tensor:
        return exchange(problem.x_TH, problem.ids_TK, problem.weights_TK, range_T)

    def per_expert() -> Tensor:
        num_tokens, num_topk = problem.ids_TK.shape
        x_PH = problem.x_TH.repeat_interleave(num_topk, dim=0)
        ids_P1 = problem.ids_TK.reshape(-1, 1)
        y_PH = exchange(x_PH, ids_P1, torch.ones(ids_P1.shape))
        y_TKH = y_PH.view(num_tokens, num_topk, hidden)
        return torch.einsum("tk,tkh->th", problem.weights_TK, y_TKH.float()).to(y_PH.dtype)

    return dispatcher, per_expert if scheme.per_expert else whole


def _sample(
    groups: ParallelGroups,
    workload: Workload,
    problem: Problem,
    dispatcher: Any,
    layer: Callable[[], Tensor],
) -> Sample:
    counts = workload.hosts > 0 and groups.topology.local_rank_of(groups.rank) == 0
    dispatcher.ledger.clear()
    groups.world.barrier()
    before = netns.counters(INTERFACE).tx_bytes if counts else None
    groups.world.barrier()
    start = time.perf_counter()
    out_TH = layer()
    seconds = time.perf_counter() - start
    groups.world.barrier()
    wire_bytes = None if before is None else netns.counters(INTERFACE).tx_bytes - before
    difference_TH = out_TH.double() - problem.expected_TH
    return Sample(
        seconds=seconds,
        ledger_bytes=dispatcher.ledger.inter_node_bytes(),
        wire_bytes=wire_bytes,
        squared_error=float(difference_TH.square().sum()),
        squared_reference=float(problem.expected_TH.square().sum()),
    )
