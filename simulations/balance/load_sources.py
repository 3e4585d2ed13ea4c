"""Recorded loads as workloads: the routing of tokens, or counts that another server dumped.

Batches of recorded tokens are drawn from them at random, with replacement, as a batch of many requests
at different positions would: from all tasks at once ("mixed"), from one task after the other
("task_shift"), or on every node from another task ("node_skew"). Recorded counts are shares that change
from step to step as they did, and begin again where the record ends.

T recorded tokens, L layers, E experts, K experts per token, O origins, S recorded steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from router.gate import GateConfig
from router.load import LoadFileError
from router.load_files import FORMAT, expert_counts, npz_arrays, read_counts, read_routing
from router.placement import IntArray
from simulations.balance.expert_loads import (
    COUNTS,
    ROWS,
    DrawnLoads,
    ExpertLoads,
    Rows,
    tokens_of_origin,
)
from simulations.balance.load_shares import FloatArray, LoadShape

Order = Literal["mixed", "task_shift", "node_skew"]


class RecordedTokens:
    """tasks: ids [T, L, K] each. Raises ValueError for an order that does not exist."""

    def __init__(
        self,
        tasks: Mapping[str, Rows],
        num_experts: int,
        *,
        tokens: int,
        num_nodes: int,
        order: Order = "mixed",
        shift_every: int = 500,
        seed: list[int],
    ) -> None:
        if order not in get_args(Order):
            raise ValueError(
                f"unknown workload {order!r} of a trace: choose from {', '.join(get_args(Order))}"
            )
        self._tasks = [np.concatenate([*tasks.values()])] if order == "mixed" else [*tasks.values()]
        self._num_experts, self._seed = num_experts, seed
        self._shift_every = shift_every if order == "task_shift" else None
        self.num_origins = num_nodes if order == "node_skew" else 1
        self._tokens = tokens_of_origin(tokens, self.num_origins)

    def counts(self, start: int, stop: int) -> IntArray:
        return np.stack([self._batch(step) for step in range(start, stop)])

    def rows(self, step: int, num_tokens: int) -> Rows:
        drawn = self._drawn(step, num_tokens, ROWS)
        return np.stack([ids_TLK.transpose(1, 0, 2) for ids_TLK in drawn])

    def _batch(self, step: int) -> IntArray:
        drawn = self._drawn(step, self._tokens, COUNTS)
        return np.stack([expert_counts(ids_TLK, self._num_experts) for ids_TLK in drawn])

    def _drawn(self, step: int, num_tokens: int, what: int) -> list[Rows]:
        """[tokens, L, K] of each origin."""
        rng = np.random.default_rng([*self._seed, what, step])
        first = step // self._shift_every if self._shift_every else 0
        tasks = [self._tasks[(first + n) % len(self._tasks)] for n in range(self.num_origins)]
        return [task[rng.integers(len(task), size=num_tokens)] for task in tasks]


class RecordedShares:
    """counts_SLE of recorded steps, as shares."""

    def __init__(self, counts_SLE: FloatArray) -> None:
        self._counts_SLE = counts_SLE

    def at(self, step: int) -> FloatArray:
        # A layer without tokens in a step is taken as even.
        counts_LE = self._counts_SLE[step % len(self._counts_SLE)]
        empty_L1 = counts_LE.sum(axis=1, keepdims=True) == 0
        return np.asarray((counts_LE + empty_L1)[None])


def recorded_loads(
    trace: Path,
    shape: LoadShape,
    gate: GateConfig,
    *,
    tokens: int,
    order: Order,
    shift_every: int,
    jitter: float,
    seed: list[int],
) -> ExpertLoads:
    """The workload of a file: recorded routing, a load window, or a dump of counts.

    Raises LoadFileError for a file that is none of them, or of another model.
    """
    if trace.suffix == ".npz" and not _is_window(trace):
        tasks = read_routing(trace)
        ids_TLK = next(iter(tasks.values()))
        highest = max(int(ids.max()) for ids in tasks.values())
        found = (ids_TLK.shape[1], highest + 1, ids_TLK.shape[2])
        wanted = (shape.num_layers, shape.num_experts, gate.num_experts_per_token)
        if found[0] != wanted[0] or found[1] > wanted[1] or found[2] != wanted[2]:
            raise LoadFileError(
                f"{trace}: expert ids of {found[0]} layers, up to {highest}, top-{found[2]}; the "
                f"model has {wanted[0]} layers of {wanted[1]} experts, top-{wanted[2]}"
            )
        return RecordedTokens(
            tasks,
            shape.num_experts,
            tokens=tokens,
            num_nodes=shape.num_nodes,
            order=order,
            shift_every=shift_every,
            seed=seed,
        )
    counts_SLE = read_counts(trace)
    if counts_SLE.shape[1:] != (shape.num_layers, shape.num_experts):
        raise LoadFileError(
            f"{trace}: counts of {counts_SLE.shape[1]} layers of {counts_SLE.shape[2]} experts; the "
            f"model has {shape.num_layers} layers of {shape.num_experts} experts"
        )
    if order != "mixed":
        raise LoadFileError(
            f"{trace}: counts tell no tasks apart, as workload {order!r} would need"
        )
    return DrawnLoads(RecordedShares(counts_SLE), gate, tokens=tokens, jitter=jitter, seed=seed)


def _is_window(trace: Path) -> bool:
    try:
        arrays = npz_arrays(trace.read_bytes(), str(trace))
    except OSError as error:
        raise LoadFileError(f"{trace}: {error.strerror or error}") from error
    return str(arrays.get("format")) == FORMAT
