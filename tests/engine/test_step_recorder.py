"""Recordings of one rank: exactly the steps that were asked for, whatever came before and after."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from cluster.engine import step_recorder
from cluster.engine.step_recorder import NotRecordedError, StepRecorder
from cluster.engine.step_timer import StepTimer
from comms.topology import Topology
from comms.trace import NO_TRACE
from comms.where import Where

PATIENCE_S = 20.0


class Engine:
    """Makes steps of two phases and a message under way while `working`, else passes the time."""

    def __init__(self, num_steps):
        self.runner = SimpleNamespace(
            num_steps=num_steps,
            timer=StepTimer(),
            model=SimpleNamespace(dispatcher=SimpleNamespace(trace=NO_TRACE)),
        )
        self.working = threading.Event()
        self.working.set()

    def step(self):
        runner = self.runner
        with runner.timer.phase("schedule"):
            time.sleep(0.0005)
        if self.working.is_set():
            with runner.timer.phase("experts"):
                start = time.perf_counter()
                time.sleep(0.0005)
            runner.model.dispatcher.trace.add("network", "send", start, time.perf_counter())
            runner.num_steps += 1
        return True

    def records_nothing(self):
        return self.runner.timer.trace is self.runner.model.dispatcher.trace is NO_TRACE


@contextmanager
def running(num_steps=7):
    """A recorder whose steps are being made, as in a worker."""
    groups = SimpleNamespace(
        rank=3, topology=Topology(num_nodes=2, ranks_per_node=2), where=Where()
    )
    engine = Engine(num_steps)
    recorder = StepRecorder(engine, groups)
    stop = threading.Event()

    def run():
        while not stop.is_set():
            recorder.step()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield recorder, engine
    finally:
        stop.set()
        thread.join(PATIENCE_S)


def wait_until(happened):
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def of_stream(trace, stream):
    return [span for span in trace.spans if span.stream == stream]


def test_a_trace_has_the_steps_asked_for_and_what_happened_in_them():
    with running() as (recorder, engine):
        first = recorder.begin(PATIENCE_S)
        # As if the slowest rank had begun two steps later.
        trace = recorder.take(first + 2, first + 6, PATIENCE_S)
        wait_until(engine.records_nothing)
    steps = of_stream(trace, "step")
    assert [span.args["step"] for span in steps] == [first + 2, first + 3, first + 4, first + 5]
    assert [span.name for span in steps] == [f"step {first + i}" for i in range(2, 6)]
    phases = of_stream(trace, "compute")
    assert [span.name for span in phases] == ["schedule", "experts"] * 4
    assert len(of_stream(trace, "network")) == 4
    for step, (schedule, experts) in zip(
        steps, zip(phases[::2], phases[1::2], strict=True), strict=True
    ):
        assert step.start_s <= schedule.start_s < experts.end_s <= step.end_s
    assert (trace.rank, trace.node, trace.num_dropped) == (3, 1, 0)


def test_steps_that_are_over_are_still_in_the_recording():
    with running() as (recorder, engine):
        first = recorder.begin(PATIENCE_S)
        wait_until(lambda: engine.runner.num_steps > first + 20)
        trace = recorder.take(first + 1, first + 3, PATIENCE_S)
    assert [span.args["step"] for span in of_stream(trace, "step")] == [first + 1, first + 2]


def test_a_recording_waits_for_steps_through_idle_times():
    with running() as (recorder, engine):
        engine.working.clear()
        time.sleep(0.01)  # a step may be under way
        first = recorder.begin(PATIENCE_S)
        assert first == engine.runner.num_steps, "the next one is the first"
        threading.Timer(0.05, engine.working.set).start()
        trace = recorder.take(first, first + 2, PATIENCE_S)
    steps = of_stream(trace, "step")
    assert [span.args["step"] for span in steps] == [first, first + 1]
    assert len(of_stream(trace, "compute")) == 4, "of the idle time before them nothing is left"


def test_without_steps_the_wait_ends_and_so_does_the_recording():
    with running() as (recorder, engine):
        engine.working.clear()
        first = recorder.begin(PATIENCE_S)
        with pytest.raises(NotRecordedError, match=r"0 of 5 steps within 0\.05 s"):
            recorder.take(first, first + 5, 0.05)
        wait_until(engine.records_nothing)


def test_a_rank_that_does_not_come_round_is_not_waited_for():
    groups = SimpleNamespace(
        rank=3, topology=Topology(num_nodes=2, ranks_per_node=2), where=Where()
    )
    engine = Engine(0)
    recorder = StepRecorder(engine, groups)
    with pytest.raises(NotRecordedError, match=r"has not ended within 0\.01 s"):
        recorder.begin(0.01)
    recorder.step()
    assert engine.records_nothing()


def test_ending_a_recording_wakes_who_waits_for_it():
    with running() as (recorder, engine):
        engine.working.clear()
        first = recorder.begin(PATIENCE_S)
        errors = []

        def take():
            with pytest.raises(NotRecordedError) as error:
                recorder.take(first, first + 5, 3600.0)
            errors.append(error)

        waiting = threading.Thread(target=take, daemon=True)
        waiting.start()
        wait_until(lambda: recorder._wanted.until is not None)
        recorder.end()
        waiting.join(PATIENCE_S)
        assert errors
        wait_until(engine.records_nothing)
        engine.working.set()
        again = recorder.begin(PATIENCE_S)
        assert len(of_stream(recorder.take(again, again + 1, PATIENCE_S), "step")) == 1


def test_more_spans_than_there_is_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(step_recorder, "MAX_SPANS", 12)  # of three steps
    with running() as (recorder, _):
        first = recorder.begin(PATIENCE_S)
        with pytest.raises(NotRecordedError, match=r"4 steps are more than 12 spans"):
            recorder.take(first, first + 4, PATIENCE_S)


def test_off_it_adds_nothing_to_a_step():
    engine = Engine(0)
    recorder = StepRecorder(engine, SimpleNamespace())
    assert recorder.step() is True
    assert engine.runner.num_steps == 1
    assert engine.records_nothing()
