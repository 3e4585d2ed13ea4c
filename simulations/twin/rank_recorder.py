"""One rank of a run that is recorded: what its engine did, noted between steps.

L layers with experts, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from cluster.config import ServeConfig
from cluster.engine.engine import Follower, Leader
from cluster.engine.runner import Runner
from cluster.engine.scheduler import SchedulerConfig
from cluster.scripted import Change
from comms.groups import ParallelGroups
from comms.links import LinkSpeed
from experts.migrate import MigrationError
from simulations.twin.looks import Looks, Report, report
from simulations.twin.noted import NotedChoice, NotedRail, NotedScheduler
from simulations.twin.recording import Rebalance
from simulations.twin.recording_checks import STAGES

_POLL_S = 0.005


class Chunk(NamedTuple):
    """The tokens of one micro-batch on this rank: ids and slots, [tokens, L, K]."""

    step: int
    micro_batch: int
    ids_TLK: NDArray[np.int64]
    slots_TLK: NDArray[np.int64]


@dataclass(kw_only=True)
class RankNotes:
    """What one rank has seen; the fields are those of a `Recording`, for this rank."""

    steps: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    slot_tokens: list[NDArray[np.int64]] = field(default_factory=list)
    routed: list[NDArray[np.int64]] = field(default_factory=list)
    sent: list[tuple[int, ...]] = field(default_factory=list)
    escapes: list[tuple[int, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    rebalances: list[Rebalance] = field(default_factory=list)
    plans: list[bytes] = field(default_factory=list)
    sampled: list[tuple[int, int, int]] = field(default_factory=list)
    added: list[tuple[int, str, list[int], dict[str, Any]]] = field(default_factory=list)
    scheduler: SchedulerConfig | None = None
    """Of leaders."""
    links: LinkSpeed | None = None
    routed_shape: tuple[int, ...] = (0, 0)


class RankRecorder:
    """Around one rank's engine, between its steps. `looks`: reports of all ranks, one after the other."""

    def __init__(
        self, engine: Leader | Follower, groups: ParallelGroups, rail: NotedRail, looks_every: int
    ) -> None:
        self.notes = RankNotes(links=groups.links)
        self.looks: list[list[Report]] = []
        self._runner: Runner = engine.runner
        self._groups, self._rail, self._looks_every = groups, rail, looks_every
        self._moes = engine.runner.model.moe_layers
        self._choices = [NotedChoice(moe.choice) for moe in self._moes]
        for moe, choice in zip(self._moes, self._choices, strict=True):
            moe.choice = choice
        self.notes.routed_shape = (len(self._moes), len(self._moes[0].routed_E))
        self._computed = self._slot_tokens()
        self._scheduler: NotedScheduler | None = None
        if isinstance(engine, Leader):
            self._scheduler = engine.scheduler = NotedScheduler(engine.scheduler)
            self.notes.scheduler = engine.scheduler.config

    def follow(self, engine: Leader | Follower) -> None:
        """Run the engine to its end, and note every iteration."""
        going = True
        while going:
            before, phases = self._runner.num_steps, dict(self._runner.timer.seconds)
            start = perf_counter()
            going = engine.step()
            seconds = perf_counter() - start
            executed = self._runner.num_steps > before
            self.notes.steps.append(before if executed else -1)
            self.notes.epochs.append(self._runner.epoch)
            if executed:
                self.notes.seconds.append(seconds)
                self._note_step(before, phases)
        if self._scheduler is not None:
            self.notes.plans = self._scheduler.plans
            self.notes.sampled = self._scheduler.sampled
            self.notes.added = self._scheduler.added
        self.notes.escapes = [
            (step, layer, self._groups.rank, peer, count)
            for (step, layer, peer), count in sorted(self._rail.escapes.items())
            if count
        ]

    def _note_step(self, step: int, phases: dict[str, float]) -> None:
        taken = [choice.taken for choice in self._choices]
        for micro_batch, of_layers in enumerate(zip(*taken, strict=True)):
            ids, slots = (np.stack(arrays, axis=1) for arrays in zip(*of_layers, strict=True))
            self.notes.chunks.append(Chunk(step, micro_batch, ids, slots))
        for choice in self._choices:
            choice.taken = []
        computed = self._slot_tokens()
        self.notes.slot_tokens.append(computed - self._computed)
        self._computed = computed
        ledger = self._runner.model.dispatcher.ledger
        self.notes.sent += [
            (
                step,
                row["layer"],
                STAGES.index(row["stage"]),
                row["source"],
                row["destination"],
                row["num_bytes"],
            )
            for row in ledger.step_rows()
            if row["step"] == step and row["num_bytes"]
        ]
        now = self._runner.timer.seconds
        self.notes.phases.append({name: now[name] - phases.get(name, 0.0) for name in now})
        if self._runner.num_steps % self._looks_every == 0:
            self._look()

    def _slot_tokens(self) -> NDArray[np.int64]:
        return torch.stack([moe.tokens_per_slot_S for moe in self._moes]).numpy()

    def _look(self) -> None:
        """Every rank's counters, on every rank; all are between the same two steps."""
        stats = self._runner.expert_stats()
        self.notes.routed.append(stats["routed"])
        mine = msgpack.packb([stats["routed"].tolist(), [rows.tolist() for rows in stats["rows"]]])
        part = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        parts = self._groups.world.exchange([part] * self._groups.world.size, "recorded look")
        self.looks.append([report(*msgpack.unpackb(part.numpy().tobytes())) for part in parts])

    def rebalances(
        self, config: ServeConfig, after_looks: Sequence[int], ended: threading.Event
    ) -> Iterator[Change]:
        """The changes of each rebalance, planned when it is due; every rank finds the same."""
        runner, done = self._runner, 0
        experts_per_token = runner.model.config.gate.num_experts_per_token
        looks = Looks(config.eplb_config, runner.migrator.placement, experts_per_token)
        for wanted in after_looks:
            while len(self.looks) < wanted:
                if ended.wait(_POLL_S):
                    raise MigrationError(f"the requests ended before look {wanted}")
            for reports in self.looks[done:wanted]:
                looks.add(reports)
            done = wanted
            rows = [
                (layer, row.tolist()) for layer, row in looks.draft(runner.migrator.placement).rows
            ]
            self.notes.rebalances.append(Rebalance(wanted, runner.epoch, rows))
            for layer, row in rows:
                yield Change(0, layer, row)
