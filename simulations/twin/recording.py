"""A run of an engine as a file: what the gates chose, and what the cluster made of it.

A .npz with `format`, a JSON `header` (configuration, the model's config.json, requests, rebalances)
and these arrays. The first group is what a replay starts from, the second what it must arrive at.

    routing      [T, L, K]  the gate's experts of every token that any rank owned, in order of
    chunks       [C, 4]     (step, micro-batch, rank, tokens); a rank without tokens has one too
    steps        [I]        by iteration of the engines: the step it executed, -1 = none
    epochs       [I]        of the placement in force from it on
    sampled      [X, 4]     (iteration, replica, sequence, token)
    escapes      [X, 5]     (step, model layer, source, destination, elements): see `wire.py`

    plans        [bytes]    encoded `StepPlan`s of iteration 0, replica 0, 1, ..., iteration 1, ...
    plan_ends    [I * D]    where each of them ends
    slots        [T, L, K]  where every token of `routing` went
    slot_tokens  [Q, L, S]  (token, expert) pairs computed in each slot, by step
    routed       [N, R, L, E]  the ranks' counters at each look
    sent         [X, 6]     (step, model layer, stage, source, destination, bytes), as booked
    seconds      [Q, R]     of each step
    phases       [Q, R, P]  seconds of each phase, by the names in the header

T tokens, L layers with experts, K experts per token, C chunks, I iterations, D replicas, Q steps,
S slots of all ranks, N looks, R ranks, E logical experts, P phases, X rows.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cluster.config import ServeConfig
from cluster.engine.sampling_params import SamplingParams
from cluster.engine.scheduler import SchedulerConfig
from cluster.engine.sequence import Sequence
from cluster.model.config import ModelConfig, from_values
from cluster.model.config_json import ConfigJson
from cluster.model.errors import CheckpointError, UnsupportedModelError
from comms.links import LinkSpeed
from router.load import LoadFileError
from router.load_files import RECORDING, npz_arrays
from router.placement import Placement
from simulations.twin.recording_checks import check_shapes, check_values

MAX_BLOCKS = 1 << 24


class Request(NamedTuple):
    """What reached the leader of `replica` in its iteration `iteration`."""

    iteration: int
    replica: int
    request_id: str
    token_ids: list[int]
    sampling: dict[str, Any]

    @property
    def params(self) -> SamplingParams:
        return SamplingParams.from_dict(self.sampling)


class Rebalance(NamedTuple):
    """Asked for after so many looks, with `epoch` in force; (layer, slots) in the order in which they
    came in force, one epoch each."""

    looks: int
    epoch: int
    rows: list[tuple[int, list[int]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """See the module. `looks_every`: steps between looks; `links`: as the ranks measured them."""

    config: ServeConfig
    model_json: dict[str, Any]
    scheduler: SchedulerConfig
    links: LinkSpeed | None
    looks_every: int
    phase_names: tuple[str, ...]
    requests: tuple[Request, ...]
    rebalances: tuple[Rebalance, ...]
    arrays: dict[str, NDArray[Any]]

    def __post_init__(self) -> None:
        self._check()

    @cached_property
    def model(self) -> ModelConfig:
        file = ConfigJson(file=Path(self.config.model_name), values=self.model_json)
        return from_values(file, self.scheduler.eos_token_ids)

    @property
    def num_steps(self) -> int:
        return len(self.arrays["seconds"])

    @cached_property
    def first_placement(self) -> Placement:
        """As the ranks loaded it."""
        model, topology = self.model, self.config.parallel.topology
        return Placement.contiguous(
            model.num_moe_layers,
            model.num_experts,
            topology.world_size,
            self.config.experts.num_redundant_experts,
            ranks_per_node=topology.ranks_per_node,
        )

    @cached_property
    def placements(self) -> list[Placement]:
        """Those that were in force, by epoch."""
        placements = [self.first_placement]
        for rebalance in self.rebalances:
            for layer, row in rebalance.rows:
                if not 0 <= layer < self.model.num_moe_layers:
                    raise ValueError(f"a rebalance of layer {layer}, which the model does not have")
                placements.append(placements[-1].with_layers({layer: np.array(row, np.int64)}))
        return placements

    def to_bytes(self) -> bytes:
        names = [field.name for field in fields(self) if field.name != "arrays"]
        header = {name: _plain(getattr(self, name)) for name in names}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            allow_pickle=False,
            format=np.array(RECORDING),
            header=np.array(json.dumps(header)),
            **self.arrays,
        )
        return buffer.getvalue()

    def _check(self) -> None:
        """ValueError unless the arrays agree with each other and with the header."""
        model, topology, arrays = self.model, self.config.parallel.topology, self.arrays
        sizes = {
            "L": model.num_moe_layers,
            "K": model.gate.num_experts_per_token,
            "E": model.num_experts,
            "R": topology.world_size,
            "P": len(self.phase_names),
        }
        check_shapes(arrays, sizes)
        num_slots = arrays["slot_tokens"].shape[2]
        check_values(
            arrays,
            num_experts=model.num_experts,
            num_slots=num_slots,
            num_ranks=topology.world_size,
            num_replicas=topology.num_replicas,
        )
        comms = self.config.comms
        if len(arrays["escapes"]) and (comms.combine != "fixed" or comms.all2all_backend == "flat"):
            raise ValueError("array 'escapes' must be empty: no sum crosses nodes in 16 bits")
        if self.scheduler.num_blocks > MAX_BLOCKS:
            raise ValueError(f"num_blocks({self.scheduler.num_blocks}) exceeds {MAX_BLOCKS}")
        if self.first_placement.num_slots != num_slots:
            raise ValueError(
                f"array 'slot_tokens' has {num_slots} slots, the placement "
                f"{self.first_placement.num_slots}"
            )
        looks = len(arrays["routed"])
        if self.looks_every < 1 or looks != self.num_steps // self.looks_every:
            raise ValueError(
                f"{looks} looks, expected one every looks_every({self.looks_every}) of "
                f"{self.num_steps} steps"
            )
        if any(not 1 <= rebalance.looks <= looks for rebalance in self.rebalances):
            raise ValueError(f"a rebalance after more than {looks} looks, or after none")
        epochs = arrays["epochs"]
        if len(epochs) and not 0 <= epochs.min() <= epochs.max() < len(self.placements):
            raise ValueError(f"epoch {epochs.max()} of {len(self.placements)} placements")

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "recording") -> Self:
        """What `to_bytes` gave. Raises LoadFileError naming file and array."""
        arrays = npz_arrays(data, name)
        found = str(arrays.pop("format", "none"))
        if found != RECORDING:
            raise LoadFileError(f"{name}: format '{found[:80]}', expected '{RECORDING}'")
        try:
            return cls(arrays=arrays, **_header(str(arrays.pop("header", "{}"))))
        except KeyError as error:
            raise LoadFileError(f"{name}: the header lacks {error}") from error
        except (
            ValueError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            CheckpointError,
            UnsupportedModelError,
        ) as error:
            raise LoadFileError(f"{name}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises LoadFileError."""
        try:
            return cls.from_bytes(path.read_bytes(), str(path))
        except OSError as error:
            raise LoadFileError(f"{path}: {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, ServeConfig):
        return value.model_dump()
    return asdict(value) if isinstance(value, SchedulerConfig | LinkSpeed) else value


def _header(text: str) -> dict[str, Any]:
    """The fields of a Recording but `arrays`."""
    header = json.loads(text)
    scheduler = header["scheduler"] | {"eos_token_ids": tuple(header["scheduler"]["eos_token_ids"])}
    links = header["links"]
    return {
        "config": ServeConfig.from_dict(header["config"]),
        "model_json": dict(header["model_json"]),
        "scheduler": SchedulerConfig(**scheduler),
        "links": None if links is None else LinkSpeed(**links),
        "looks_every": int(header["looks_every"]),
        "phase_names": tuple(str(name) for name in header["phase_names"]),
        "requests": tuple(_request(*request) for request in header["requests"]),
        "rebalances": tuple(
            Rebalance(int(looks), int(epoch), [(int(layer), list(row)) for layer, row in rows])
            for looks, epoch, rows in header["rebalances"]
        ),
    }


def _request(
    iteration: int, replica: int, request_id: str, token_ids: list[int], sampling: dict[str, Any]
) -> Request:
    """Raises ValueError for a request that no engine would take."""
    request = Request(int(iteration), int(replica), str(request_id), list(token_ids), sampling)
    Sequence(request.request_id, request.token_ids, request.params)
    return request
