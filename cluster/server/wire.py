"""Frames between the gateway and the leaders: small msgpack maps, checked before they are believed.

gateway -> leader   add {request_id, token_ids, sampling} | abort {request_id} | wake | stop
                    | placement {epoch}
leader -> gateway   step {replica, events, stats}; an event is
                    [request_id, token_id, finish_reason, stop_token_id, error]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

MAX_FRAME_BYTES = 64 << 20
_LIMITS = {
    "max_str_len": 1 << 16,
    "max_array_len": 1 << 20,
    "max_map_len": 64,
    "max_bin_len": 0,
    "max_ext_len": 0,
}


class WireError(ValueError):
    """A frame that is not what the protocol says; the receiver logs and drops it."""


@dataclass(frozen=True)
class Event:
    """What happened to one request in one step; absent parts are None."""

    request_id: str
    token_id: int | None
    finish_reason: str | None
    stop_token_id: int | None
    error: str | None


@dataclass(frozen=True)
class ReplicaStats:
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """Fraction of KV blocks in use."""
    step: int = 0
    epoch: int = 0
    """Of the expert placement in force."""


@dataclass(frozen=True)
class StepFrame:
    replica: int
    events: tuple[Event, ...]
    stats: ReplicaStats


def pack_add(request_id: str, token_ids: Sequence[int], sampling: Mapping[str, Any]) -> bytes:
    return _pack(
        {"type": "add", "request_id": request_id, "token_ids": token_ids, "sampling": sampling}
    )


def pack_abort(request_id: str) -> bytes:
    return _pack({"type": "abort", "request_id": request_id})


def pack_signal(kind: str) -> bytes:
    """`wake`: take part in steps again. `stop`: leave after the current step."""
    return _pack({"type": kind})


def pack_placement(epoch: int) -> bytes:
    """All ranks have prepared the placement of this epoch: put it in force at the next step."""
    return _pack({"type": "placement", "epoch": epoch})


def _pack(message: Mapping[str, Any]) -> bytes:
    return bytes(msgpack.packb(message))


def parse_step(frame: bytes) -> StepFrame:
    """Decode and check one frame of a leader; raises WireError for anything malformed."""
    try:
        message = msgpack.unpackb(frame, strict_map_key=True, raw=False, **_LIMITS)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack within limits: {error}") from None
    if not isinstance(message, dict) or message.get("type") != "step":
        raise WireError("not a map of type 'step'")
    events = message.get("events")
    if not isinstance(events, list):
        raise WireError(f"events is not a list but {type(events).__name__}")
    return StepFrame(
        replica=_number(message.get("replica"), "replica"),
        events=tuple(_parse_event(event) for event in events),
        stats=_parse_stats(message.get("stats")),
    )


def _parse_event(event: Any) -> Event:
    if not isinstance(event, list) or len(event) not in (5, 10):
        raise WireError(f"an event is not a list of 10: {event!r:.100}")
    request_id, token_id, finish_reason, stop_token_id, error = event[:5]
    if not isinstance(request_id, str):
        raise WireError(f"request_id is not a string: {request_id!r:.100}")
    for name, text in (("finish_reason", finish_reason), ("error", error)):
        if not isinstance(text, str | None):
            raise WireError(f"{name} is neither a string nor null: {text!r:.100}")
    for name, number in (("token_id", token_id), ("stop_token_id", stop_token_id)):
        if number is not None:
            _number(number, name)
    return Event(request_id, token_id, finish_reason, stop_token_id, error)


def _parse_stats(stats: Any) -> ReplicaStats:
    """Unknown entries are ignored, so that leaders may report more than this gateway reads."""
    if not isinstance(stats, dict):
        raise WireError(f"stats is not a map: {stats!r:.100}")
    kv_usage = stats.get("kv_usage", 0.0)
    if not isinstance(kv_usage, int | float) or not 0 <= kv_usage <= 1:
        raise WireError(f"kv_usage is not in [0, 1]: {kv_usage!r:.100}")
    running, waiting, step, epoch = (
        _number(stats.get(name, 0), name) for name in ("running", "waiting", "step", "epoch")
    )
    return ReplicaStats(running, waiting, float(kv_usage), step, epoch)


def _number(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise WireError(f"{name} is not a non-negative integer: {value!r:.100}")
    return value
