"""Frames between the gateway and the leaders: small msgpack maps, checked before they are believed.

gateway -> leader   add {request_id, token_ids, sampling, priority, cache_salt, routed_experts}
                    | abort {request_id} | wake | stop | placement {epoch} | flush_cache
leader -> gateway   step {replica, events, stats}; an event is the list of the fields of TokenEvent,
                    of which all from the sixth on may be left out
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from cluster.engine.sequence import RoutedExperts, TokenEvent, TokenLogprob

MAX_FRAME_BYTES = 64 << 20
_LIMITS = {
    "max_str_len": 1 << 16,
    "max_array_len": 1 << 20,
    "max_map_len": 64,
    "max_bin_len": MAX_FRAME_BYTES,
    "max_ext_len": 0,
}
_NUM_FIELDS = len(TokenEvent._fields)
_NUM_REQUIRED = 5
_NO_EXTRAS: list[Any] = [None, [], [], None, None]
_NOTHING_ELSE = [None, None, None, *_NO_EXTRAS]


class WireError(ValueError):
    """A frame that is not what the protocol says; the receiver logs and drops it."""


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """What a leader last said of itself; counts of tokens and preemptions are since its start."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """Fraction of KV blocks in use."""
    step: int = 0
    epoch: int = 0
    """Of the expert placement in force."""
    preemptions: int = 0
    kv_blocks_used: int = 0
    """Held by sequences."""
    kv_blocks_cached: int = 0
    """Kept for later requests, and given up when blocks are short."""
    kv_blocks_total: int = 0
    prefix_queries: int = 0
    """Tokens of prompts that were looked for in the cache ..."""
    prefix_hits: int = 0
    """... and found."""
    step_tokens: int = 0
    """Executed in this step."""
    step_ms: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds since the start, by phase of the step."""


_COUNTS = tuple(
    name for name, kind in ReplicaStats.__annotations__.items() if kind is int
)  # all that are integers


@dataclass(frozen=True, slots=True)
class StepFrame:
    replica: int
    events: tuple[TokenEvent, ...]
    stats: ReplicaStats


def pack_add(
    request_id: str,
    token_ids: Sequence[int],
    sampling: Mapping[str, Any],
    *,
    priority: int = 0,
    cache_salt: str = "",
    routed_experts: bool = False,
) -> bytes:
    return _pack(
        {
            "type": "add",
            "request_id": request_id,
            "token_ids": token_ids,
            "sampling": sampling,
            "priority": priority,
            "cache_salt": cache_salt,
            "routed_experts": routed_experts,
        }
    )


def pack_abort(request_id: str) -> bytes:
    return _pack({"type": "abort", "request_id": request_id})


def pack_signal(kind: str) -> bytes:
    """`wake`: take part in steps again. `stop`: leave after the current step. `flush_cache`: forget
    all cached blocks that no sequence holds."""
    return _pack({"type": kind})


def pack_placement(epoch: int) -> bytes:
    """All ranks have prepared the placement of this epoch: put it in force at the next step."""
    return _pack({"type": "placement", "epoch": epoch})


def _pack(message: Mapping[str, Any]) -> bytes:
    return bytes(msgpack.packb(message))


def parse_step(frame: bytes) -> StepFrame:
    """Decode and check one frame of a leader; raises WireError for anything malformed, unless only
    events of some requests are: these become events with an `error` and no `finish_reason`."""
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
        events=tuple(_parse_or_fail(event) for event in events),
        stats=_parse_stats(message.get("stats")),
    )


def _parse_or_fail(event: Any) -> TokenEvent:
    """An event that is malformed ends its own request; the others' tokens in the frame are good."""
    try:
        return _parse_event(event)
    except WireError as error:
        if isinstance(event, list) and event and type(event[0]) is str:
            return TokenEvent(event[0], error=f"what the engine told of it is malformed: {error}")
        raise


def _parse_event(event: Any) -> TokenEvent:
    if not isinstance(event, list) or not _NUM_REQUIRED <= len(event) <= _NUM_FIELDS:
        raise WireError(f"an event is not a list of {_NUM_FIELDS}: {event!r:.100}")
    request_id, token_id, finish_reason, stop_token_id, error = event[:_NUM_REQUIRED]
    if event[2:] == _NOTHING_ELSE and type(request_id) is str:  # nearly all are like this
        return TokenEvent(request_id, None if token_id is None else _number(token_id, "token_id"))
    if not isinstance(request_id, str):
        raise WireError(f"request_id is not a string: {request_id!r:.100}")
    for name, text in (("finish_reason", finish_reason), ("error", error)):
        if text is not None and not isinstance(text, str):
            raise WireError(f"{name} is neither a string nor null: {text!r:.100}")
    for name, number in (("token_id", token_id), ("stop_token_id", stop_token_id)):
        if number is not None:
            _number(number, name)
    return TokenEvent(*event[:_NUM_REQUIRED], *_parse_extras(event[_NUM_REQUIRED:]))


def _parse_extras(values: list[Any]) -> tuple[Any, ...]:
    """The fields from `logprob` on, as far as they are there."""
    if not values:
        return ()
    values = values + _NO_EXTRAS[len(values) :]
    logprob, prompt_logprobs, routed_experts, cached_tokens, queue_ms = values
    return (
        None if logprob is None else _parse_logprob(logprob),
        tuple(_parse_logprob(one) for one in _list(prompt_logprobs, "prompt_logprobs")),
        tuple(_parse_routing(one) for one in _list(routed_experts, "routed_experts")),
        None if cached_tokens is None else _number(cached_tokens, "cached_tokens"),
        None if queue_ms is None else _duration(queue_ms, "queue_ms"),
    )


def _parse_logprob(value: Any) -> TokenLogprob:
    if not isinstance(value, list) or len(value) != len(TokenLogprob._fields):
        raise WireError(f"a logprob is not a list of {len(TokenLogprob._fields)}: {value!r:.100}")
    token_id, logprob, rank, top_ids, top_logprobs = value
    if len(_list(top_ids, "top_ids")) != len(_list(top_logprobs, "top_logprobs")):
        raise WireError(f"{len(top_ids)} top_ids with {len(top_logprobs)} top_logprobs")
    return TokenLogprob(
        _number(token_id, "token_id"),
        _real(logprob, "logprob"),
        _number(rank, "rank"),
        tuple(_number(one, "top_ids") for one in top_ids),
        tuple(_real(one, "top_logprobs") for one in top_logprobs),
    )


def _parse_routing(value: Any) -> RoutedExperts:
    if not isinstance(value, list) or len(value) != len(RoutedExperts._fields):
        raise WireError(f"routed experts are not a list of {len(RoutedExperts._fields)}")
    *numbers, ids = value
    start, num_layers, experts_per_token = (_number(one, "routed_experts") for one in numbers)
    token_bytes = 2 * num_layers * experts_per_token
    if not isinstance(ids, bytes) or not token_bytes or len(ids) % token_bytes:
        raise WireError(f"the ids of routed experts are not bytes in multiples of {token_bytes}")
    return RoutedExperts(start, num_layers, experts_per_token, ids)


def _parse_stats(stats: Any) -> ReplicaStats:
    """Unknown entries are ignored, so that leaders may report more than this gateway reads."""
    if not isinstance(stats, dict):
        raise WireError(f"stats is not a map: {stats!r:.100}")
    kv_usage = stats.get("kv_usage", 0.0)
    if not isinstance(kv_usage, int | float) or not 0 <= kv_usage <= 1:
        raise WireError(f"kv_usage is not in [0, 1]: {kv_usage!r:.100}")
    phases = stats.get("phases", {})
    if not isinstance(phases, dict):
        raise WireError(f"phases is not a map: {phases!r:.100}")
    return ReplicaStats(
        kv_usage=float(kv_usage),
        step_ms=_duration(stats.get("step_ms", 0.0), "step_ms"),
        phases={str(name): _duration(spent, "phases") for name, spent in phases.items()},
        **{name: _number(stats.get(name, 0), name) for name in _COUNTS},
    )


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise WireError(f"{name} is not a list: {value!r:.100}")
    return value


def _number(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise WireError(f"{name} is not a non-negative integer: {value!r:.100}")
    return value


def _real(value: Any, name: str) -> float:
    """Not NaN; minus infinity is the logarithm of zero."""
    if type(value) not in (int, float) or value != value:
        raise WireError(f"{name} is not a number: {value!r:.100}")
    return float(value)


def _duration(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise WireError(f"{name} is not a duration: {value!r:.100}")
    return float(value)
