"""Who sent how much to whom, and who waited for whom: exact totals of one rank or, merged, of all.

Totals are kept by (layer, stage, source, destination), whose number the layout bounds, and for the
last few steps once more by step; so a server may record for months. Stages are, with the
hierarchical and the low-latency dispatcher, "dispatch/exchange", "dispatch/scatter",
"combine/reduce" and "combine/exchange"; with the flat one "dispatch" and "combine".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from comms.topology import Topology
from comms.where import Where

Key = tuple[int, str, int, int]  # layer (-1: outside of layers), stage, source, destination


@dataclass(slots=True)
class Flow:
    """What went from a source to a destination, and how long the destination waited for it."""

    num_bytes: int = 0
    num_messages: int = 0
    waited_s: float = 0.0

    def add(self, other: "Flow") -> None:
        self.num_bytes += other.num_bytes
        self.num_messages += other.num_messages
        self.waited_s += other.waited_s


class RankDelay(NamedTuple):
    """How long a rank kept others waiting. `blame_s` = `delayed_s` - `waited_s`, see slow_ranks."""

    rank: int
    blame_s: float
    delayed_s: float
    waited_s: float


@dataclass(kw_only=True)
class TrafficLedger:
    """Bytes and messages as sent, per (stage, source rank, destination rank), and seconds waited.

    Rows that stay on their rank are not sent and not counted. Each rank records what it sends and
    how long it waits, under the layer and step that `where` says; `merge` adds up several ranks.
    `max_steps`: of how many steps, the latest, figures by step are kept.
    """

    topology: Topology
    where: Where = field(default_factory=Where)
    max_steps: int = 8
    _layers: dict[Key, Flow] = field(default_factory=dict, init=False)
    _steps: dict[int, dict[Key, Flow]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be >= 1, got {self.max_steps}")

    def record(self, stage: str, source: int, destination: int, num_bytes: int) -> None:
        """One message from source to destination; nothing if it is empty or stays on its rank."""
        if num_bytes == 0 or source == destination:
            return
        for flow in self._flows(stage, source, destination):
            flow.num_bytes += num_bytes
            flow.num_messages += 1

    def record_wait(self, stage: str, waiting: int, peer: int, seconds: float) -> None:
        """`waiting` waited for bytes of one peer."""
        if seconds <= 0 or waiting == peer:
            return
        for flow in self._flows(stage, peer, waiting):
            flow.waited_s += seconds

    def record_waits(
        self, stage: str, waiting: int, peers: Sequence[int], seconds: Sequence[float]
    ) -> None:
        """`waiting` waited for all peers at once, seconds[i] until the bytes of peers[i] were here.

        What is booked adds up to the longest wait: each moment is shared equally by the peers that
        were still missing. An entry of the waiting rank itself is ignored.
        """
        missing = sorted(
            (s, peer) for s, peer in zip(seconds, peers, strict=True) if peer != waiting
        )
        share = before = 0.0
        for position, (until, peer) in enumerate(missing):
            share += (until - before) / (len(missing) - position)
            before = until
            self.record_wait(stage, waiting, peer, share)

    def merge(self, other: "TrafficLedger") -> None:
        """Add what another ledger has; of the steps of both, the latest `max_steps` remain."""
        _add_all(self._layers, other._layers)
        for step, flows in other._steps.items():
            _add_all(self._steps.setdefault(step, {}), flows)
        self._steps = dict(sorted(self._steps.items())[-self.max_steps :])

    def clear(self) -> None:
        self._layers.clear()
        self._steps.clear()

    @property
    def num_bytes(self) -> dict[tuple[str, int, int], int]:
        """By (stage, source, destination), over all layers and steps."""
        return {key: flow.num_bytes for key, flow in self._totals().items() if flow.num_messages}

    @property
    def num_messages(self) -> dict[tuple[str, int, int], int]:
        """By (stage, source, destination), over all layers and steps."""
        return {key: flow.num_messages for key, flow in self._totals().items() if flow.num_messages}

    def intra_node_bytes(self, stage: str | None = None) -> int:
        """Bytes between different ranks of one node, of one stage or of all."""
        return self._bytes(stage, same_node=True)

    def inter_node_bytes(self, stage: str | None = None) -> int:
        """Bytes between nodes, of one stage or of all."""
        return self._bytes(stage, same_node=False)

    def slow_ranks(self) -> list[RankDelay]:
        """All ranks, the one to blame for most waiting first; from the merged ledger of all ranks.

        delayed_s: the longest that any one rank waited for this one; waited_s: what it waited
        itself. Their difference does not blame a rank that was late only because it waited, however
        many ranks then waited for it: that time is the blame of whoever was late first. All times
        are as booked by record_waits, so waiting for two peers at once is not counted twice.
        """
        ranks = range(self.topology.world_size)
        waited = {(destination, source): 0.0 for destination in ranks for source in ranks}
        for (_, source, destination), flow in self._totals().items():
            waited[destination, source] += flow.waited_s
        delays = []
        for rank in ranks:
            delayed_s = max(waited[other, rank] for other in ranks)
            waited_s = sum(waited[rank, other] for other in ranks)
            delays.append(RankDelay(rank, delayed_s - waited_s, delayed_s, waited_s))
        return sorted(delays, key=lambda delay: (-delay.blame_s, delay.rank))

    def rows(self) -> list[dict[str, Any]]:
        """Totals as a table: stage, source, destination, num_bytes, num_messages, waited_s."""
        return [
            _row(stage, source, destination, flow)
            for (stage, source, destination), flow in sorted(self._totals().items())
        ]

    def layer_rows(self) -> list[dict[str, Any]]:
        """Like rows, with a first column `layer`; -1 is what was recorded outside of layers."""
        return _layer_rows(self._layers)

    def step_rows(self) -> list[dict[str, Any]]:
        """Like layer_rows, with a first column `step`, of the latest steps; -1: outside of steps."""
        return [
            {"step": step, **row}
            for step, flows in sorted(self._steps.items())
            for row in _layer_rows(flows)
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything in plain lists and dicts: totals, layers, steps, slow_ranks."""
        return {
            "totals": self.rows(),
            "layers": self.layer_rows(),
            "steps": self.step_rows(),
            "slow_ranks": [delay._asdict() for delay in self.slow_ranks()],
        }

    def _flows(self, stage: str, source: int, destination: int) -> Iterable[Flow]:
        """Where to book: the flow of the layer, and that of the layer in this step."""
        where = self.where
        key = (where.layer, stage, source, destination)
        total = self._layers.get(key)
        if total is None:
            total = self._layers[key] = Flow()
        flows = self._steps.get(where.step)
        if flows is None:
            flows = self._begin_step(where.step)
        in_step = flows.get(key)
        if in_step is None:
            in_step = flows[key] = Flow()
        return total, in_step

    def _begin_step(self, step: int) -> dict[Key, Flow]:
        while len(self._steps) >= self.max_steps:
            del self._steps[next(iter(self._steps))]
        flows = self._steps[step] = {}
        return flows

    def _totals(self) -> dict[tuple[str, int, int], Flow]:
        totals: dict[tuple[str, int, int], Flow] = {}
        for (_, stage, source, destination), flow in self._booked():
            totals.setdefault((stage, source, destination), Flow()).add(flow)
        return totals

    def _booked(self) -> list[tuple[Key, Flow]]:
        """A copy, made at once: who watches from another thread must not meet a growing dict."""
        return list(self._layers.items())

    def _bytes(self, stage: str | None, *, same_node: bool) -> int:
        node_of = self.topology.node_of
        return sum(
            flow.num_bytes
            for (_, key_stage, source, destination), flow in self._booked()
            if (stage is None or stage == key_stage)
            and (node_of(source) == node_of(destination)) == same_node
        )


def _add_all(into: dict[Key, Flow], flows: Mapping[Key, Flow]) -> None:
    for key, flow in flows.items():
        into.setdefault(key, Flow()).add(flow)


def _layer_rows(flows: Mapping[Key, Flow]) -> list[dict[str, Any]]:
    return [
        {"layer": layer, **_row(stage, source, destination, flow)}
        for (layer, stage, source, destination), flow in sorted(flows.items())
    ]


def _row(stage: str, source: int, destination: int, flow: Flow) -> dict[str, Any]:
    return {
        "stage": stage,
        "source": source,
        "destination": destination,
        "num_bytes": flow.num_bytes,
        "num_messages": flow.num_messages,
        "waited_s": flow.waited_s,
    }
