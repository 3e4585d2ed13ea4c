"""Record a run of the real engine: ranks of this machine, the served scheduler, model and migrator.

Experts move meanwhile. After every `looks_every` steps the ranks tell each other what their gates
chose; after some of these looks a rebalance is asked for, as an operator of a served cluster would,
and its layers change one after the other while requests go on.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cluster.config import ServeConfig
from cluster.engine.engine import build_engine
from cluster.scripted import Script
from comms.group import Group
from comms.groups import ParallelGroups
from comms.launch import RankPool
from comms.store import host_store
from experts.migrate import MigrationError
from simulations.twin.noted import Arrival, NotedRail, TimedMailbox
from simulations.twin.rank_recorder import RankNotes, RankRecorder
from simulations.twin.recording import Recording, Request


def record_rank(
    groups: ParallelGroups,
    config: ServeConfig,
    arrivals: Sequence[Arrival],
    looks_every: int,
    after_looks: Sequence[int],
    store_address: str,
) -> RankNotes:
    """What every rank calls. Raises MigrationError if the requests end before all changes are in force."""
    topology = groups.topology
    rail = NotedRail(groups.rail, groups.where)
    if config.comms.combine == "fixed":
        groups = replace(groups, rail=cast(Group, rail))
    is_leader = topology.tp_rank_of(groups.rank) == 0
    mine = arrivals[topology.replica_of(groups.rank) :: topology.num_replicas]
    mailbox = TimedMailbox(mine) if is_leader else None
    engine = build_engine(replayable(config), groups, mailbox)
    recorder, ended = RankRecorder(engine, groups, rail, looks_every), threading.Event()
    with closing(engine.runner) as runner:
        changes = recorder.rebalances(config, after_looks, ended)
        with Script(changes, runner, mailbox, groups, store_address) as script:
            try:
                recorder.follow(engine)
            finally:
                ended.set()
        if script.failure:
            raise MigrationError(f"{script.failure}; give it more requests, or longer ones")
    return recorder.notes


def replayable(config: ServeConfig) -> ServeConfig:
    """Each iteration plans what it then computes, and no cached block is forgotten but for room."""
    scheduler = config.scheduler.model_copy(update={"async_scheduling": False})
    cache = config.cache
    if config.comms.combine == "node":  # each placement would begin with an empty cache
        cache = cache.model_copy(update={"enable_prefix_caching": False})
    return config.model_copy(update={"scheduler": scheduler, "cache": cache})


def record(
    config: ServeConfig,
    arrivals: Sequence[Arrival],
    *,
    looks_every: int = 8,
    after_looks: Sequence[int] = (),
    pool: RankPool | None = None,
    timeout_s: float = 600.0,
) -> Recording:
    """Serve the requests, dealt out in turn to the DP replicas, and record it.

    after_looks: rebalances, each after so many looks in all. Raises RankError for what goes wrong on
    a rank, ValueError for numbers that cannot be.
    """
    if (
        looks_every < 1
        or list(after_looks) != sorted({*after_looks})
        or min(after_looks, default=1) < 1
    ):
        raise ValueError(
            f"need looks_every >= 1 and ascending after_looks >= 1, got {looks_every} and "
            f"{list(after_looks)}"
        )
    store, address = host_store()
    with RankPool() if pool is None else nullcontext(pool) as ranks:
        notes = ranks.run(
            record_rank,
            config.parallel.topology,
            config,
            arrivals,
            looks_every,
            after_looks,
            address,
            timeout_s=timeout_s,
        )
    del store
    return assemble(config, notes, looks_every)


def assemble(config: ServeConfig, notes: Sequence[RankNotes], looks_every: int) -> Recording:
    """One recording from what each rank noted."""
    topology, first = config.parallel.topology, notes[0]
    assert first.scheduler is not None, "rank 0 is a leader"
    leaders = [notes[rank] for rank in topology.leader_ranks]
    chunks = sorted(
        (chunk.step, chunk.micro_batch, rank, chunk)
        for rank, noted in enumerate(notes)
        for chunk in noted.chunks
    )
    plans = [
        plan
        for of_iteration in zip(*[n.plans for n in leaders], strict=True)
        for plan in of_iteration
    ]
    names = sorted({name for noted in notes for phases in noted.phases for name in phases})
    arrays: dict[str, Any] = {
        "routing": np.concatenate([c.ids_TLK for *_, c in chunks]).astype(np.int16),
        "slots": np.concatenate([c.slots_TLK for *_, c in chunks]).astype(np.int32),
        "chunks": [(step, micro, rank, len(c.ids_TLK)) for step, micro, rank, c in chunks],
        "steps": first.steps,
        "epochs": first.epochs,
        "sampled": _table(
            [
                (iteration, replica, seq_id, token)
                for replica, leader in enumerate(leaders)
                for iteration, seq_id, token in leader.sampled
            ],
            4,
        ),
        "escapes": _table((row for noted in notes for row in noted.escapes), 5),
        "plans": np.frombuffer(b"".join(plans), np.uint8),
        "plan_ends": np.cumsum([len(plan) for plan in plans]),
        "slot_tokens": np.concatenate([np.stack(n.slot_tokens) for n in notes], axis=2),
        "routed": _looks(notes),
        "sent": _table((row for noted in notes for row in noted.sent), 6),
        "seconds": np.array([noted.seconds for noted in notes]).T,
        "phases": np.array(
            [[[p.get(name, 0.0) for name in names] for p in noted.phases] for noted in notes]
        ).transpose(1, 0, 2),
    }
    return Recording(
        config=config.model_copy(update={"model": config.model_name}),
        model_json=json.loads((Path(config.model) / "config.json").read_text(encoding="utf-8")),
        scheduler=first.scheduler,
        links=first.links,
        looks_every=looks_every,
        phase_names=tuple(names),
        requests=tuple(
            Request(iteration, replica, request_id, prompt, sampling)
            for replica, leader in enumerate(leaders)
            for iteration, request_id, prompt, sampling in leader.added
        ),
        rebalances=tuple(first.rebalances),
        arrays={key: np.asarray(array) for key, array in arrays.items()},
    )


def _table(rows: Iterable[tuple[int, ...]], columns: int) -> NDArray[np.int64]:
    return np.array(sorted(rows), dtype=np.int64).reshape(-1, columns)


def _looks(notes: Sequence[RankNotes]) -> NDArray[np.int64]:
    """[looks, R, L, E]; there may be none."""
    sizes = (len(notes), *notes[0].routed_shape)
    looks = [np.stack(of_ranks) for of_ranks in zip(*[n.routed for n in notes], strict=True)]
    return np.stack(looks) if looks else np.zeros((0, *sizes), dtype=np.int64)
