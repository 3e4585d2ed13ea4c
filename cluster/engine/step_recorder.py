"""Records what one rank does in its steps while somebody wants to see it, as a `comms.trace.Trace`.

All ranks count steps alike. A recording begins at once and ends where its reader says, who knows by
then where every rank has begun: nobody has to guess how soon a step in the future will come.
"""

from __future__ import annotations

import threading
from time import perf_counter

from cluster.engine.engine import Follower, Leader
from comms.groups import ParallelGroups
from comms.trace import NO_TRACE, Trace

MAX_SPANS = 100_000


class NotRecordedError(RuntimeError):
    """The steps that were asked for are not there, and why."""


class _Recording:
    """`first`: the step that was recorded first. `until`: the one that is not recorded any more.
    `whole`: all steps before that one are over."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.first = -1
        self.until: int | None = None
        self.begun = threading.Event()
        self.whole = False
        self.ended = threading.Event()

    def cut(self, first: int, until: int) -> Trace:
        """What began in steps `first` to `until` - 1."""
        steps = {span.args["step"]: span for span in self.trace.spans if span.stream == "step"}
        oldest = min(span.end_s for span in self.trace.spans)
        if self.trace.num_dropped and (first not in steps or oldest > steps[first].start_s):
            raise NotRecordedError(
                f"{until - first} steps are more than {MAX_SPANS} spans of time: trace fewer steps"
            )
        self.trace.keep(steps[first].start_s, steps[until - 1].end_s)
        return self.trace


class StepRecorder:
    """`step` is for the thread that runs steps, all else for others. One recording at a time."""

    def __init__(self, engine: Leader | Follower, groups: ParallelGroups) -> None:
        self._engine = engine
        self._groups = groups
        self._wanted: _Recording | None = None
        self._recording: _Recording | None = None  # what the step thread has in hand

    def step(self) -> bool:
        """One step of the engine, recorded if that is wanted; False once told to stop."""
        if self._wanted is not self._recording:
            self._change()
        if self._recording is None:
            return self._engine.step()
        number, start = self._engine.runner.num_steps, perf_counter()
        goes_on = self._engine.step()
        if self._engine.runner.num_steps > number:
            name = f"step {number}"
            self._recording.trace.add("step", name, start, perf_counter(), step=number)
        self._end_if_due(self._recording)
        return goes_on

    def begin(self, timeout_s: float) -> int:
        """Start to record; returns the number of the first step that is recorded as a whole.

        Raises NotRecordedError if the thread that runs steps does not come round in time.
        """
        groups = self._groups
        node = groups.topology.node_of(groups.rank)
        trace = Trace(groups.rank, node=node, where=groups.where, max_spans=MAX_SPANS)
        self._wanted = recording = _Recording(trace)
        if not recording.begun.wait(timeout_s):
            self.end()
            raise NotRecordedError(f"the step it is in has not ended within {timeout_s:g} s")
        return recording.first

    def take(self, first: int, until: int, timeout_s: float) -> Trace:
        """The spans of steps `first` to `until` - 1 once they are over; this ends the recording.

        Raises NotRecordedError if the rank does not come so far in time.
        """
        recording = self._wanted
        if recording is None:
            raise NotRecordedError("nothing is being recorded")
        recording.until = until
        recording.ended.wait(timeout_s)
        self.end()
        if not recording.whole:
            made = max(0, self._engine.runner.num_steps - first)
            raise NotRecordedError(
                f"{made} of {until - first} steps within {timeout_s:g} s; a cluster without requests "
                "makes none"
            )
        return recording.cut(first, until)

    def end(self) -> None:
        """Record no more; what was not taken is lost."""
        recording, self._wanted = self._wanted, None
        if recording:
            recording.ended.set()

    def _change(self) -> None:
        """Between two steps: take up what is wanted, or nothing."""
        runner, recording = self._engine.runner, self._wanted
        trace = recording.trace if recording else NO_TRACE
        runner.timer.trace = runner.model.dispatcher.trace = trace
        self._recording = recording
        if recording:
            recording.first = runner.num_steps
            recording.begun.set()

    def _end_if_due(self, recording: _Recording) -> None:
        until = recording.until
        if until is not None and self._engine.runner.num_steps >= until:
            if self._wanted is recording:
                self._wanted = None
            self._change()
            recording.whole = True
            recording.ended.set()
