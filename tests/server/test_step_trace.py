"""One file of all ranks' steps: they begin where the last of them could, and never record for nobody."""

import asyncio
import json

import pytest

from cluster.engine.step_recorder import NotRecordedError
from cluster.server.errors import Code, RequestError
from cluster.server.observe import step_trace
from cluster.server.observe.step_trace import StepTracer
from comms.trace import Trace


class FakeRank:
    """Begins to record at `first`; a `broken` one makes no steps, a `slow` one answers no take."""

    def __init__(self, rank, first):
        self.rank, self.first = rank, first
        self.asked = None
        self.recording = False
        self.broken = self.slow = False

    async def begin_trace(self, timeout_s):
        self.recording = True
        return self.first

    async def take_trace(self, first, until, timeout_s):
        self.asked = (first, until, timeout_s)
        if self.broken:
            raise NotRecordedError("0 of 3 steps within 1 s")
        if self.slow:
            await asyncio.sleep(3600)
        self.recording = False
        trace = Trace(self.rank, node=self.rank // 2)
        for step in range(first, until):
            trace.add("step", f"step {step}", step, step + 1, step=step)
        return trace

    async def end_trace(self):
        self.recording = False


@pytest.fixture
def ranks():
    return [FakeRank(rank, first) for rank, first in enumerate((10, 12, 11, 9))]


async def file_of(tracer, *arguments):
    return b"".join([chunk async for chunk in tracer.trace_file(*arguments)])


def test_all_ranks_give_the_same_steps_from_the_last_beginning_on(ranks, monkeypatch):
    monkeypatch.setattr(step_trace, "CHUNK_BYTES", 100)
    events = json.loads(asyncio.run(file_of(StepTracer(ranks), 3, 1.0)))["traceEvents"]
    steps = {}
    for event in events:
        if event["ph"] == "X":
            steps.setdefault(event["pid"], []).append(event["name"])
    assert list(steps.values()) == [["step 12", "step 13", "step 14"]] * 4
    assert {rank.asked for rank in ranks} == {(12, 15, 1.0)}


def test_by_default_20_steps_within_30_seconds(ranks):
    asyncio.run(file_of(StepTracer(ranks)))
    assert ranks[0].asked == (12, 32, 30.0)


@pytest.mark.parametrize(
    "arguments", [(0, 1.0), (1001, 1.0), (1, 0.0), (1, -1.0), (1, float("nan"))]
)
def test_bad_arguments_are_refused_before_anybody_records(ranks, arguments):
    with pytest.raises(RequestError) as error:
        asyncio.run(file_of(StepTracer(ranks), *arguments))
    assert error.value.code is Code.INVALID_ARGUMENT
    assert not any(rank.recording for rank in ranks)


def test_one_rank_without_steps_ends_it_for_all(ranks):
    ranks[2].broken = True
    ranks[1].slow = True
    with pytest.raises(RequestError, match=r"rank 2 has not recorded .* 0 of 3 steps") as error:
        asyncio.run(file_of(StepTracer(ranks), 3, 1.0))
    assert error.value.code is Code.FAILED_PRECONDITION
    assert not any(rank.recording for rank in ranks)


def test_a_client_that_leaves_ends_the_recording_and_the_next_may_come(ranks):
    async def run():
        tracer = StepTracer(ranks)
        ranks[1].slow = True
        first = asyncio.ensure_future(file_of(tracer, 3, 100.0))
        while ranks[1].asked is None:
            await asyncio.sleep(0)
        with pytest.raises(RequestError, match="another trace") as error:
            await file_of(tracer, 3, 1.0)
        assert error.value.code is Code.FAILED_PRECONDITION
        assert ranks[1].recording
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not any(rank.recording for rank in ranks)
        ranks[1].slow = False
        return await file_of(tracer, 3, 1.0)

    assert json.loads(asyncio.run(run()))["traceEvents"]
