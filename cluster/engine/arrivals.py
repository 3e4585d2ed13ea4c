"""Requests between the mailbox and the scheduler: checked, and held until they are ready to run."""

from collections import deque
from time import monotonic

from cluster.engine.mailbox import Frame
from cluster.engine.sampler import Sampler
from cluster.engine.sampling_params import SamplingParams
from cluster.engine.scheduler import Scheduler
from cluster.engine.sequence import Sequence, TokenEvent


class Arrivals:
    """Owns requests whose constraint is still being compiled, and the times of arrival."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._preparing: list[Sequence] = []
        self._not_started: deque[tuple[Sequence, float]] = deque()

    @property
    def preparing(self) -> bool:
        """Whether a request waits for something else than its turn."""
        return bool(self._preparing)

    def add(self, frame: Frame, scheduler: Scheduler) -> list[TokenEvent]:
        """Take in an add frame; the event of a request that is refused."""
        try:
            sequence = _sequence_of(frame)
            if any(sequence.request_id == other.request_id for other in self._preparing):
                raise ValueError(f"request id {sequence.request_id!r} is in use")
            self._sampler.add(sequence)
        except (KeyError, TypeError, ValueError) as error:
            return [_refusal(str(frame.get("request_id")), error)]
        self._not_started.append((sequence, monotonic()))
        self._preparing.append(sequence)
        return self.pass_on(scheduler)

    def pass_on(self, scheduler: Scheduler) -> list[TokenEvent]:
        """Hand those that are ready to the scheduler; the events of those that it refuses."""
        events, preparing = [], []
        for sequence in self._preparing:
            try:
                if self._sampler.is_ready(sequence):
                    scheduler.add(sequence)
                else:
                    preparing.append(sequence)
            except ValueError as error:
                sequence.finish_reason = "error"
                events.append(_refusal(sequence.request_id, error))
        self._preparing = preparing
        return events

    def abort(self, request_id: str) -> bool:
        """Forget a request that is still held here; False if it is not."""
        for sequence in self._preparing:
            if sequence.request_id == request_id:
                sequence.finish_reason = "abort"
                self._preparing.remove(sequence)
                return True
        return False

    def stamp(self) -> None:
        """Note how long those waited that have begun to run."""
        now = monotonic()
        for _ in range(len(self._not_started)):
            sequence, arrived = self._not_started.popleft()
            if sequence.num_cached_tokens is not None:
                sequence.queue_ms = 1000 * (now - arrived)
            elif sequence.finish_reason is None:
                self._not_started.append((sequence, arrived))


def _sequence_of(frame: Frame) -> Sequence:
    return Sequence(
        frame["request_id"],
        frame["token_ids"],
        SamplingParams.from_dict(frame["sampling"]),
        priority=frame.get("priority", 0),
        cache_salt=frame.get("cache_salt", ""),
        wants_routed_experts=bool(frame.get("routed_experts", False)),
    )


def _refusal(request_id: str, error: Exception) -> TokenEvent:
    return TokenEvent(request_id, finish_reason="refused", error=str(error))
