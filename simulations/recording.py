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
from cluster.model.config import ModelConfig, from_values
from cluster.model.config_json import ConfigJson
from cluster.model.errors import CheckpointError, UnsupportedModelError
from comms.links import LinkSpeed
from router.load import LoadFileError
from router.load_files import RECORDING, npz_arrays
from router.placement import Placement

STAGES = (
    "dispatch/exchange",
    "dispatch/scatter",
    "combine/reduce",
    "combine/exchange",
    "dispatch",
    "combine",
    "counts/node",
    "counts/rail",
)
"""By their numbers in `sent`."""

_SHAPES = {
    "routing": "TLK",
    "chunks": "C4",
    "steps": "I",
    "epochs": "I",
    "sampled": "X4",
    "escapes": "X5",
    "plans": "B",
    "plan_ends": "J",
    "slots": "TLK",
    "slot_tokens": "QLS",
    "routed": "NRLE",
    "sent": "X6",
    "seconds": "QR",
    "phases": "QRP",
}
_FLOATS = ("seconds", "phases")


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
        _check_arrays(self)

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
        "requests": tuple(Request(*request) for request in header["requests"]),
        "rebalances": tuple(
            Rebalance(int(looks), int(epoch), [(int(layer), row) for layer, row in rows])
            for looks, epoch, rows in header["rebalances"]
        ),
    }


def _check_arrays(recording: Recording) -> None:
    """ValueError unless the arrays are there, and agree with each other and with the header."""
    arrays, topology = recording.arrays, recording.config.parallel.topology
    placement, model = recording.first_placement, recording.model
    sizes = {
        "L": model.num_moe_layers,
        "K": model.gate.num_experts_per_token,
        "E": model.num_experts,
        "S": placement.num_slots,
        "R": topology.world_size,
        "P": len(recording.phase_names),
    }
    if set(arrays) != set(_SHAPES):
        odd = sorted(set(arrays) ^ set(_SHAPES))
        raise ValueError(f"arrays are {sorted(arrays)}: {odd} missing or unknown")
    for key, letters in _SHAPES.items():
        _check_shape(key, arrays[key], letters, sizes)
    if len(arrays["plan_ends"]) != len(arrays["steps"]) * topology.num_replicas:
        raise ValueError("array 'plan_ends' must have one entry per iteration and replica")
    _check_range("routing", arrays["routing"], -1, model.num_experts)
    _check_range("slots", arrays["slots"], -1, placement.num_slots)
    _check_range("steps", arrays["steps"], -1, recording.num_steps)
    _check_range("epochs", arrays["epochs"], 0, 1 + sum(len(r.rows) for r in recording.rebalances))
    _check_range("chunks", arrays["chunks"][:, 0], 0, recording.num_steps)
    _check_range("chunks", arrays["chunks"][:, 1], 0, 1 << 10)
    _check_range("chunks", arrays["chunks"][:, 2], 0, topology.world_size)
    _check_range("chunks", arrays["chunks"][:, 3], 0, len(arrays["routing"]) + 1)
    _check_range("sent", arrays["sent"][:, 2], 0, len(STAGES))
    _check_range("plan_ends", np.diff(arrays["plan_ends"], prepend=0), 0, 1 + len(arrays["plans"]))
    if int(arrays["chunks"][:, 3].sum()) != len(arrays["routing"]):
        raise ValueError(
            f"array 'chunks' tells of {arrays['chunks'][:, 3].sum()} tokens, 'routing' has "
            f"{len(arrays['routing'])}"
        )
    if recording.looks_every < 1 or len(arrays["routed"]) != (
        recording.num_steps // recording.looks_every
    ):
        raise ValueError(
            f"{len(arrays['routed'])} looks, expected one every looks_every("
            f"{recording.looks_every}) of {recording.num_steps} steps"
        )
    for rebalance in recording.rebalances:
        if not 1 <= rebalance.looks <= len(arrays["routed"]):
            raise ValueError(
                f"a rebalance after {rebalance.looks} of {len(arrays['routed'])} looks"
            )
    if sorted(step for step in arrays["steps"].tolist() if step >= 0) != [
        *range(recording.num_steps)
    ]:
        raise ValueError("array 'steps' must have every step once, in order")


def _check_shape(key: str, array: NDArray[Any], letters: str, sizes: dict[str, int]) -> None:
    """A letter is the same size everywhere, but X; a digit is itself."""
    wanted = [int(x) if x.isdigit() else sizes.get(x, -1) for x in letters]
    kind = "f" if key in _FLOATS else "iu"
    fits = array.ndim == len(letters) and all(
        want in (-1, have) for want, have in zip(wanted, array.shape, strict=False)
    )
    if not fits or array.dtype.kind not in kind:
        shown = ", ".join(str(w) if w >= 0 else "any" for w in wanted)
        kinds = "floats" if key in _FLOATS else "integers"
        raise ValueError(
            f"array '{key}' is {array.dtype} {list(array.shape)}, expected {kinds} [{shown}]"
        )
    sizes.update(
        {x: n for x, n in zip(letters, array.shape, strict=True) if x.isalpha() and x != "X"}
    )


def _check_range(key: str, array: NDArray[Any], low: int, end: int) -> None:
    if array.size and not (low <= int(array.min()) and int(array.max()) < end):
        raise ValueError(
            f"array '{key}' has {array.min()} to {array.max()}, expected {low} to {end - 1}"
        )
