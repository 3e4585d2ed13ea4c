"""Exchange between the GPUs of one node: microseconds of each way, beside the link's floor and NCCL.

Legend: T tokens of a rank, H hidden, K top-k, R received rows, P pairs, W ranks.

Every figure is of one call among many in a CUDA graph, so of one that follows another without the host
between them, on the slower rank; inputs take turns over more memory than the L2 cache holds. A dispatch
ends when the rows of all peers are here, quantisation included; a combine when the sums are added.
The floor of a way is the bytes that leave a rank over the link's 450 GB/s each way.

    dispatch_float8, dispatch_bfloat16
    combine_sums      of sums that are there already, one per row: what DeepEP's combine does
    combine_pairs     weights and adds the pairs' outputs on the way, in fp32
    combine_fixed     the same in integers, which no placement changes
    round_trip        float8 dispatch and combine_pairs, with nothing between
    peer_copy         the same bytes as bfloat16 dispatch, by the copy engine's kernel of torch
    nccl              the same, by its sends and receives

With `rail` each GPU is a node of its own, and the same ways, named nodes_*, go over NCCL (`comms/nodes.py`):
all rows to all nodes, needed or not, and combine_fixed in 32 bits. Here NCCL takes NVLink too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.nccl import NcclRail
from comms.reference import RankInput, reference_combine, reference_dispatch
from comms.store import PrefixStore, connect_store, host_store
from comms.symmetric_layout import DispatchDtype, SumMode, SymmetricLayout
from comms.topology import Topology

LINK_BYTES_PER_S = 450e9
DEEPEP_US = {  # V1.2.1, intranode kernels on two H200, 24 multiprocessors, best of its tuning
    "dispatch_float8": {128: 45, 1024: 75, 4096: 243},
    "dispatch_bfloat16": {128: 33, 1024: 105, 4096: 323},
    "combine_sums": {128: 42, 1024: 119, 4096: 413},
}
REPEATS = 20  # that must have the same bits
CHECKED_TOKENS = 128  # compared with the reference, which works row by row


@dataclass(frozen=True, kw_only=True)
class GpuWorkload:
    """One layer's exchange; each token chooses `num_topk` of `num_experts` at random."""

    ranks: int = 2
    tokens: tuple[int, ...] = (128, 1024, 4096)
    hidden: int = 7168
    num_experts: int = 256
    num_topk: int = 8
    programs: int | None = None
    rail: bool = False

    def __post_init__(self) -> None:
        if self.num_experts % self.ranks:
            raise ValueError(
                f"experts must divide over ranks, got {self.num_experts} % {self.ranks} = "
                f"{self.num_experts % self.ranks}"
            )
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"need at least one token, got {self.tokens}")

    @property
    def is_deepeps(self) -> bool:
        """Whether it is the one of which there are figures of DeepEP."""
        return (self.ranks, self.hidden, self.num_experts, self.num_topk) == (2, 7168, 256, 8)

    def layout(self, dtype: DispatchDtype, combine: SumMode) -> SymmetricLayout:
        return SymmetricLayout(
            world_size=self.ranks,
            slots_per_rank=self.num_experts // self.ranks,
            hidden=self.hidden,
            num_topk=self.num_topk,
            capacity=max(self.tokens),
            dispatch_dtype=dtype,
            combine=combine,
        )


def run(workload: GpuWorkload, *, peers: bool = True, timeout_s: float = 300.0) -> dict[str, Any]:
    """{"config", "device", "results": {name: {tokens: {"us", "floor_us", "bytes", ...}}}, "checks"}.

    Raises ValueError where there are fewer GPUs than ranks, RankError where a rank failed or found
    other bits than the reference.
    """
    if torch.cuda.device_count() < workload.ranks:
        raise ValueError(f"need {workload.ranks} GPUs, there are {torch.cuda.device_count()}")
    store, address = host_store()
    with RankPool(workload.ranks) as pool:
        answers = pool.run(
            _measure,
            Topology(num_nodes=1, ranks_per_node=workload.ranks),
            address,
            workload,
            peers,
            timeout_s=timeout_s,
        )
    del store
    results: dict[str, dict[str, Any]] = {}
    for name, of_sizes in answers[0]["results"].items():
        results[name] = {}
        for tokens in of_sizes:
            of_ranks = [answer["results"][name][tokens] for answer in answers]
            slowest = max(of_ranks, key=lambda figures: float(figures["us"]))
            if workload.is_deepeps and tokens in DEEPEP_US.get(name, {}):
                slowest["deepep_us"] = DEEPEP_US[name][tokens]
            results[name][str(tokens)] = slowest
    return {
        "config": asdict(workload),
        "device": answers[0]["device"],
        "checks": answers[0]["checks"],
        "results": results,
    }


def _measure(
    groups: ParallelGroups, address: str, workload: GpuWorkload, peers: bool
) -> dict[str, Any]:
    """What each rank does."""
    bench = RankBench(groups, address, workload)
    checks = bench.check()
    results: dict[str, dict[int, dict[str, float]]] = {}
    for tokens in workload.tokens:
        for ways in (bench.inside, bench.nodes):
            for name, figures in (bench.figures(tokens, ways) if ways else {}).items():
                results.setdefault(name, {})[tokens] = figures
        if peers:
            for name, figures in bench.peers(tokens).items():
                results.setdefault(name, {})[tokens] = figures
    bench.close()
    return {
        "device": f"{workload.ranks} x {torch.cuda.get_device_name()}",
        "checks": checks,
        "results": results,
    }


class Dispatcher(Protocol):
    """What those of one node and of several have in common; handles go back to who made them."""

    @property
    def layout(self) -> SymmetricLayout: ...

    def expect(self, max_tokens: int | None) -> int: ...

    def dispatch(
        self, x_TH: Tensor, slots_TK: Tensor, weights_TK: Tensor, range_T: Tensor | None = None, /
    ) -> tuple[Any, Any]: ...

    def combine(self, y_PH: Tensor, place_RK: Tensor | None, handle: Any) -> Tensor: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Dispatchers, and what their results are called."""

    float8: Dispatcher
    bfloat16: Dispatcher
    fixed: Dispatcher
    prefix: str = ""

    @classmethod
    def made_by(
        cls, make: Callable[[DispatchDtype, SumMode], Dispatcher], prefix: str = ""
    ) -> Ways:
        return cls(
            float8=make("float8", "node"),
            bfloat16=make("bfloat16", "node"),
            fixed=make("float8", "fixed"),
            prefix=prefix,
        )

    @property
    def all(self) -> tuple[Dispatcher, Dispatcher, Dispatcher]:
        return self.float8, self.bfloat16, self.fixed


class RankBench:
    """One rank's inputs, dispatchers and clock."""

    def __init__(self, groups: ParallelGroups, address: str, workload: GpuWorkload) -> None:
        from comms.gpu_dispatcher import connect_dispatcher
        from comms.symmetric import SymmetricDispatcher

        self.groups, self.workload, self.rank = groups, workload, groups.rank
        self.device = torch.device("cuda", groups.rank)
        torch.cuda.set_device(self.device)
        self.store = connect_store(address)

        def dispatcher(dtype: DispatchDtype, combine: SumMode) -> SymmetricDispatcher:
            made = SymmetricDispatcher.connect(
                workload.layout(dtype, combine), self.store, self.rank, self.device,
                timeout_s=20.0, programs=workload.programs,
            )  # fmt: skip
            self._memory = made.memory
            return made

        def of_nodes(dtype: DispatchDtype, combine: SumMode) -> Dispatcher:
            return connect_dispatcher(
                Topology(num_nodes=workload.ranks, ranks_per_node=1), workload.layout(dtype, combine),
                PrefixStore(f"{dtype}/{combine}", self.store), self.rank, self.device,
                timeout_s=20.0, programs=workload.programs,
            )  # fmt: skip

        self.inside = Ways.made_by(dispatcher)
        self.nodes = Ways.made_by(of_nodes, "nodes_") if workload.rail else None
        self._nccl: NcclRail | None = None

    # -- correctness -------------------------------------------------------------------------

    def check(self) -> dict[str, Any]:
        """Bitwise against the reference, and REPEATS times against itself."""
        tokens = min(CHECKED_TOKENS, max(self.workload.tokens))
        inputs = [self._input(rank, tokens) for rank in range(self.workload.ranks)]
        others = self.nodes.all if self.nodes else (None,) * 3
        for dispatcher, other in zip(self.inside.all, others, strict=True):
            seen = self._repeated(dispatcher, inputs)
            self._compare(dispatcher.layout, inputs, seen)
            for a, b in zip(seen, self._repeated(other, inputs) if other else seen, strict=True):
                assert torch.equal(a, b), "nodes of one GPU give other bits than one node"
        return {"tokens": tokens, "bitwise_reference": True, "equal_repeats": REPEATS}

    def _repeated(self, dispatcher: Dispatcher, inputs: list[RankInput]) -> list[Tensor]:
        """Rows, slots, scales if there are any, and sums: REPEATS times the same."""
        dispatcher.expect(len(inputs[0].x_TH))
        seen = []
        for _ in range(REPEATS):
            received, handle = dispatcher.dispatch(
                *self._arguments(inputs[self.rank], dispatcher.layout.combine)
            )
            places, y_PH = self._outputs(received.local_slots_RK, self.rank)
            out_TH = dispatcher.combine(y_PH, places, handle)
            is_sent_R = (received.local_slots_RK >= 0).any(1)
            rows = [
                received.x_RH.view(torch.uint8)[is_sent_R],
                received.local_slots_RK[is_sent_R],
            ]
            rows += [] if received.scale_RB is None else [received.scale_RB[is_sent_R]]
            seen.append([x.cpu() for x in (*rows, out_TH)])
        torch.cuda.synchronize()
        dispatcher.check()
        for again in seen[1:]:
            for a, b in zip(seen[0], again, strict=True):
                assert torch.equal(a, b), "two runs of the same exchange differ"
        return seen[0]

    def _compare(
        self, layout: SymmetricLayout, inputs: list[RankInput], seen: list[Tensor]
    ) -> None:
        slots, world_size = layout.slots_per_rank, layout.world_size
        wanted = reference_dispatch(inputs, slots, layout.dispatch_dtype)
        mine = wanted[self.rank]
        assert torch.equal(seen[1].long(), mine.local_slots_RK), "slots differ from the reference"
        x_RH = seen[0].view(layout.row_dtype).float()
        if layout.dispatch_dtype == "float8":
            x_RH = x_RH.unflatten(1, (-1, 128)).mul(seen[2][:, :, None]).flatten(1)
        assert torch.equal(x_RH.bfloat16(), mine.x_RH), "rows differ from the reference"
        outputs = []
        for rank, received in enumerate(wanted):
            _, y_PH = self._outputs(received.local_slots_RK.to(self.device), rank)
            outputs.append(y_PH[: int((received.local_slots_RK >= 0).sum())].cpu())
        nodes = Topology(num_nodes=world_size, ranks_per_node=1)
        sums = reference_combine(outputs, inputs, nodes, slots, layout.combine)
        assert torch.equal(seen[-1], sums[self.rank]), "sums differ from the reference"

    # -- time --------------------------------------------------------------------------------

    def figures(self, tokens: int, ways: Ways) -> dict[str, dict[str, float]]:
        """Of each way: microseconds, those of its floor, bytes that leave this rank."""
        hidden = self.workload.hidden
        found: dict[str, dict[str, float]] = {}
        calls: list[Callable[[], object]]
        for dispatcher in ways.all:
            dispatcher.expect(tokens)
        inputs = self._copies(tokens)
        sent = self._rows_to_peers(inputs[0].slots_TK)
        meta = 8 * self.workload.num_topk
        wire = {"float8": hidden + hidden // 32 + meta, "bfloat16": 2 * hidden + meta}
        for dispatcher in (ways.float8, ways.bfloat16):
            dtype = dispatcher.layout.dispatch_dtype
            calls = [partial(dispatcher.dispatch, *self._arguments(x, "node")) for x in inputs]
            found[f"dispatch_{dtype}"] = self._timed(calls, sent * wire[dtype])
        for name, dispatcher in (
            ("combine_sums", ways.bfloat16),
            ("combine_pairs", ways.bfloat16),
            ("combine_fixed", ways.fixed),
        ):
            calls = []
            for x in inputs[:2]:
                received, handle = dispatcher.dispatch(
                    *self._arguments(x, dispatcher.layout.combine)
                )
                places, y_PH = self._outputs(received.local_slots_RK, self.rank)
                if name == "combine_sums":
                    shape = (self.workload.ranks * tokens, hidden)
                    sums_RH = torch.randn(shape, device=self.device).bfloat16()
                    calls.append(partial(dispatcher.combine, sums_RH, None, handle))
                else:
                    calls.append(partial(dispatcher.combine, y_PH, places, handle))
            found[name] = self._timed(calls, sent * 2 * hidden)
        calls = [
            partial(self._round_trip, ways.float8, self._arguments(x, "node"), y_PH, places)
            for x in inputs
        ]
        found["round_trip"] = self._timed(calls, sent * (wire["float8"] + 2 * hidden))
        for dispatcher in ways.all:
            dispatcher.check()
        return {ways.prefix + name: figures for name, figures in found.items()}

    def _round_trip(
        self, dispatcher: Dispatcher, arguments: Sequence[Tensor], y_PH: Tensor, places_RK: Tensor
    ) -> None:
        _, handle = dispatcher.dispatch(*arguments)
        dispatcher.combine(y_PH, places_RK, handle)

    def peers(self, tokens: int) -> dict[str, dict[str, float]]:
        """A plain copy into the next rank's memory, and NCCL, of what a bfloat16 dispatch sends."""
        world_size, hidden = self.workload.ranks, self.workload.hidden
        memory = self._memory
        shape = (tokens, hidden)
        there = memory.handle.get_buffer(
            (self.rank + 1) % world_size, (tokens * hidden,), torch.bfloat16
        ).view(shape)
        inputs = [x.x_TH for x in self._copies(tokens)]
        calls: list[Callable[[], object]] = [partial(there.copy_, x) for x in inputs]
        found = {"peer_copy": self._timed(calls, tokens * hidden * 2)}
        if self._nccl is None:
            self._nccl = NcclRail(
                self.store, self.rank, range(world_size), self.device, name="bench"
            )
        x_WTH = torch.stack([inputs[0]] * world_size)
        out_WTH = torch.empty_like(x_WTH)
        bytes_sent = (world_size - 1) * tokens * hidden * 2
        calls = [partial(self._nccl.start, out_WTH.unbind(), x_WTH.unbind())] * 2
        found["nccl"] = self._timed(calls, bytes_sent)
        return found

    def _timed(self, calls: Sequence[Callable[[], object]], num_bytes: float) -> dict[str, float]:
        """Median over replays of a graph of an even number of calls, all ranks at once."""
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        self.groups.world.barrier()
        number = max(len(calls) + len(calls) % 2, 8 if num_bytes > 1e7 else 32)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for i in range(number):
                calls[i % len(calls)]()
        times = []
        for _ in range(3):
            self.groups.world.barrier()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
            graph.replay()
            for event in events[:-1]:
                event.record()
                graph.replay()
            events[-1].record()
            torch.cuda.synchronize()
            times += [1000 * a.elapsed_time(b) / number for a, b in pairwise(events)]
        return {
            "us": float(np.median(times)),
            "us_p90": float(np.quantile(times, 0.9)),
            "floor_us": 1e6 * num_bytes / LINK_BYTES_PER_S,
            "bytes": float(num_bytes),
        }

    def close(self) -> None:
        self.groups.world.barrier()
        for dispatcher in self.nodes.all if self.nodes else ():
            dispatcher.close()
        if self._nccl is not None:
            self._nccl.close()

    # -- inputs ------------------------------------------------------------------------------

    def _input(self, rank: int, tokens: int, copy: int = 0) -> RankInput:
        """Of any rank, the same wherever it is made; on the CPU."""
        work = self.workload
        make = torch.Generator().manual_seed(1_000 * rank + copy)
        x_TH = torch.randn(tokens, work.hidden, generator=make).bfloat16()
        scores_TE = torch.rand(tokens, work.num_experts, generator=make)
        slots_TK = scores_TE.topk(work.num_topk).indices
        weights_TK = torch.rand(tokens, work.num_topk, generator=make)
        range_T = 8 + torch.rand(tokens, generator=make)
        return RankInput(x_TH=x_TH, slots_TK=slots_TK, weights_TK=weights_TK, range_T=range_T)

    def _arguments(self, x: RankInput, mode: str) -> list[Tensor]:
        parts = [x.x_TH, x.slots_TK, x.weights_TK]
        if mode == "fixed" and x.range_T is not None:
            parts.append(x.range_T)
        return [part.to(self.device) for part in parts]

    def _copies(self, tokens: int) -> list[RankInput]:
        """Inputs on the device, together larger than the L2 cache, an even number of them."""
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        number = int(np.clip(np.ceil(2.5 * cache / (2.0 * tokens * self.workload.hidden)), 2, 64))
        first = self._input(self.rank, tokens)
        parts = self._arguments(first, "fixed")
        make = torch.Generator(self.device).manual_seed(self.rank)
        return [
            RankInput(
                x_TH=torch.randn(parts[0].shape, device=self.device, generator=make).bfloat16(),
                slots_TK=parts[1],
                weights_TK=parts[2],
                range_T=parts[3],
            )
            for _ in range(number + number % 2)
        ]

    def _outputs(self, local_slots_RK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(place_RK, y_PH): row-major places; y as random as it is repeatable."""
        valid_R = local_slots_RK.flatten() >= 0
        places = torch.where(valid_R, valid_R.int().cumsum(0) - 1, -1).int()
        make = torch.Generator(self.device).manual_seed(77 + rank)
        shape = (int(valid_R.sum()) + 1, self.workload.hidden)
        y_PH = torch.randn(shape, device=self.device, generator=make).bfloat16()
        return places.view(local_slots_RK.shape), y_PH

    def _rows_to_peers(self, slots_TK: Tensor) -> int:
        per_rank = self.workload.num_experts // self.workload.ranks
        ranks_TK = slots_TK // per_rank
        peers = [rank for rank in range(self.workload.ranks) if rank != self.rank]
        return sum(int((ranks_TK == rank).any(1).sum()) for rank in peers)
