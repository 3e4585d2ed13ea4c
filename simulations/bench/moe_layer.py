"""One MoE layer's exchange as a benchmark runs it: tokens, a gate, experts, a dispatcher.

An expert is a factor, so that what is measured is communication, and what should come back is known
exactly.

Legend: T tokens of a rank, H hidden, K experts per token, E experts, S slots of a rank, P (row, k)
pairs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.model.micro_batches import Pass, interleave
from comms.dispatcher import Received, TokenDispatcher
from comms.groups import ParallelGroups
from comms.make import make_dispatcher
from comms.topology import Topology
from comms.trace import NO_TRACE, Trace
from experts.gains import token_ranges
from router.gate import Gate, GateConfig
from simulations.testbed import parse_rate

SEED = 3_141


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A dispatcher and its options. per_expert: every (token, expert) is a row of its own."""

    dispatcher: str
    per_expert: bool = False
    options: Mapping[str, str] = field(default_factory=dict)


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
class Problem:
    """A rank's tokens, where they go, and what should come back. Expert e multiplies by factors_E[e]
    (exact in bfloat16); experts lie contiguously over the ranks, one slot each."""

    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    range_T: Tensor
    factors_E: Tensor
    expected_TH: Tensor

    @classmethod
    def of_rank(cls, workload: Workload, rank: int) -> "Problem":
        common = torch.Generator().manual_seed(SEED)
        factors_E = torch.randn(workload.experts, generator=common).to(torch.bfloat16)
        mine = torch.Generator().manual_seed(SEED + 1 + rank)
        x_TH = torch.randn(workload.tokens, workload.hidden, generator=mine).to(torch.bfloat16)
        gate = Gate(workload.gate, torch.zeros(workload.experts, 1))
        logits_TE = torch.randn(workload.tokens, workload.experts, generator=mine)
        ids_TK, weights_TK = gate.choose(logits_TE)
        expected_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
        for k in range(workload.topk):
            factor_T = weights_TK[:, k].double() * factors_E[ids_TK[:, k]].double()
            expected_TH += factor_T[:, None] * x_TH.double()
        return cls(
            x_TH=x_TH,
            ids_TK=ids_TK,
            weights_TK=weights_TK,
            range_T=token_ranges(ids_TK, weights_TK, factors_E.float().abs()),
            factors_E=factors_E,
            expected_TH=expected_TH,
        )


def layer_of(
    scheme: Scheme, groups: ParallelGroups, problem: Problem, trace: Trace = NO_TRACE
) -> tuple[TokenDispatcher, Callable[[], Tensor]]:
    """The scheme's dispatcher, and its whole layer: dispatch, experts, combine, in as many
    micro-batches as the dispatcher's rule says (of `groups` with measured links)."""
    num_experts = len(problem.factors_E)
    num_tokens, num_topk = problem.ids_TK.shape
    slots_per_rank = num_experts // groups.topology.world_size
    dispatcher = make_dispatcher(
        scheme.dispatcher,
        groups,
        slots_per_rank=slots_per_rank,
        hidden=problem.x_TH.shape[1],
        trace=trace,
        **scheme.options,
    )
    factors_S = problem.factors_E[groups.rank * slots_per_rank :][:slots_per_rank]

    def experts(received: Received) -> Tensor:
        with trace.span("compute", "experts"):
            rows_P, columns_P = torch.nonzero(received.local_slots_RK >= 0, as_tuple=True)
            factors_P = factors_S[received.local_slots_RK[rows_P, columns_P]]
            return received.x_RH.index_select(0, rows_P) * factors_P[:, None]

    def steps(x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor) -> Pass:
        pending = dispatcher.start_dispatch(x_TH, slots_TK, weights_TK, range_T)
        yield
        outputs = [experts(part) for part in pending]
        returning = dispatcher.start_combine(outputs, pending.handle)
        yield
        return returning.wait()

    def exchange(*arguments: Tensor) -> Tensor:
        parts = dispatcher.expect(len(arguments[0]))
        chunks = zip(*(torch.chunk(argument, parts) for argument in arguments), strict=True)
        return torch.cat(interleave([steps(*chunk) for chunk in chunks], groups.where))

    def whole() -> Tensor:
        return exchange(problem.x_TH, problem.ids_TK, problem.weights_TK, problem.range_T)

    def per_expert() -> Tensor:
        x_PH = problem.x_TH.repeat_interleave(num_topk, dim=0)
        ids_P1 = problem.ids_TK.reshape(-1, 1)
        y_PH = exchange(x_PH, ids_P1, torch.ones(ids_P1.shape), torch.ones(len(ids_P1)))
        y_TKH = y_PH.view(num_tokens, num_topk, -1)
        return torch.einsum("tk,tkh->th", problem.weights_TK, y_TKH.float()).to(y_PH.dtype)

    return dispatcher, per_expert if scheme.per_expert else whole
