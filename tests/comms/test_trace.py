"""A trace file as a viewer reads it: every span there, in its place, on threads that nest."""

import json
import math
import os
import pickle
import time
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.groups import ParallelGroups
from comms.topology import Topology
from comms.trace import NO_TRACE, Trace, overlap
from comms.trace_file import TraceError, check_path, to_events, write_trace
from comms.where import Where

TWO_NODES = Topology(num_nodes=2, ranks_per_node=2)


def nanoseconds(microseconds: float) -> int:
    return round(Fraction(str(microseconds)) * 1000)


def as_a_viewer_reads(events):
    """{(process name, thread name): [(start ns, end ns, event)]}, checked for the format's rules."""
    names: dict[tuple[str, int, int], str] = {}
    order: dict[tuple[str, int, int], int] = {}
    for event in events:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["pid"] > 0  # 0 is the idle task's in Perfetto
        if event["ph"] == "M":
            kind, what = event["name"].split("_", 1)
            key = (kind, event["pid"], event["tid"] if kind == "thread" else 0)
            if what == "name":
                assert key not in names
                names[key] = event["args"]["name"]
            else:
                assert what == "sort_index"
                order[key] = event["args"]["sort_index"]
    assert names.keys() == order.keys()
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["name"]
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            process = names["process", event["pid"], 0]
            thread = names["thread", event["pid"], event["tid"]]
            start = nanoseconds(event["ts"])
            threads[process, thread].append((start, start + nanoseconds(event["dur"]), event))
    for spans in threads.values():
        open_ends: list[int] = []
        for start, end, _ in spans:  # in file order: parents come first
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1], "spans of a thread overlap"
            open_ends.append(end)
        assert [start for start, _, _ in spans] == sorted(start for start, _, _ in spans)
    by_place = sorted(names, key=lambda key: (key[1], key[0] != "process", order[key]))
    return dict(threads), [names[key] for key in by_place]


seconds = st.integers(0, 40).map(lambda tick: 2e5 + tick * 0.013)
spans = st.lists(
    st.tuples(st.sampled_from(["compute", "network", "own"]), seconds, seconds).map(
        lambda span: (span[0], min(span[1:]), max(span[1:]))
    ),
    max_size=25,
)


@given(st.lists(spans, min_size=1, max_size=3))
def test_every_span_is_shown_once_where_it_was(spans_of_ranks):
    traces = []
    for rank, spans in enumerate(spans_of_ranks):
        traces.append(Trace(rank, node=rank // 2))
        for number, (stream, start, end) in enumerate(spans):
            traces[rank].add(stream, f"span {number}", start, end)
    threads, _ = as_a_viewer_reads(to_events(traces[::-1]))
    origin = min((start for spans in spans_of_ranks for _, start, _ in spans), default=0.0)
    for rank, spans in enumerate(spans_of_ranks):
        shown = {}
        for (process, thread), rows in threads.items():
            if process == f"rank {rank} (node {rank // 2})":
                for start, end, event in rows:
                    assert thread.split()[0] == event["cat"]
                    shown[event["name"]] = (event["cat"], start, end)
        assert shown.keys() == {f"span {number}" for number in range(len(spans))}
        for number, (stream, start, end) in enumerate(spans):
            got_stream, got_start, got_end = shown[f"span {number}"]
            assert got_stream == stream
            assert got_start == pytest.approx((start - origin) * 1e9, abs=2)
            assert got_end == pytest.approx((end - origin) * 1e9, abs=2)


def test_exchanges_in_flight_together_get_threads_of_their_own() -> None:
    trace = Trace(0)
    trace.add("network", "exchange 1", 1.0, 4.0)
    trace.add("network", "exchange 2", 3.0, 6.0)
    trace.add("network", "exchange 3", 5.0, 7.0)
    threads, _ = as_a_viewer_reads(to_events([trace]))
    names = {thread: [row[2]["name"] for row in rows] for (_, thread), rows in threads.items()}
    assert names == {"network": ["exchange 1", "exchange 3"], "network 2": ["exchange 2"]}


def test_a_span_is_shown_inside_the_one_that_contains_it() -> None:
    trace = Trace(0)
    for name, start, end in (("head", 1, 2), ("tail", 3, 4), ("whole", 1, 4), ("next", 4, 5)):
        trace.add("compute", name, start, end)  # in the order in which nested contexts end
    threads, _ = as_a_viewer_reads(to_events([trace]))
    ((place, rows),) = threads.items()
    assert place == ("rank 0 (node 0)", "compute")
    assert [event["name"] for _, _, event in rows] == ["whole", "head", "tail", "next"]


def trace_of_a_rank(groups: ParallelGroups) -> Trace:
    where = Where()
    trace = Trace(groups.rank, node=groups.topology.node_of(groups.rank), where=where)
    groups.world.barrier()
    for where.step in range(2):
        with trace.span("compute", "attention"):
            time.sleep(0.002)
        for where.layer in range(2):
            with trace.span("network", "dispatch", bytes=10, peers=[1, 2]):
                groups.world.barrier()
        where.layer = -1
    return trace


def test_real_ranks_in_one_file(rank_pool, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    traces = rank_pool.run(trace_of_a_rank, TWO_NODES)
    write_trace(path, traces[::-1])
    document = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    threads, places = as_a_viewer_reads(document["traceEvents"])
    processes = [f"rank {rank} (node {rank // 2})" for rank in range(4)]
    assert places == [name for process in processes for name in (process, "compute", "network")]
    for process in processes:
        assert [row[2]["args"] for row in threads[process, "compute"]] == [{"step": 0}, {"step": 1}]
        assert [row[2]["args"] for row in threads[process, "network"]] == [
            {"bytes": 10, "peers": [1, 2], "layer": layer, "step": step}
            for step in range(2)
            for layer in range(2)
        ]
    # A barrier ends on no rank before it began on every rank: so they are on one clock.
    for number in range(4):
        barriers = [threads[process, "network"][number] for process in processes]
        assert max(start for start, _, _ in barriers) <= min(end for _, end, _ in barriers)
    assert document["otherData"] == {"program": "expertmesh", "dropped_spans": {}}


def test_hosts_are_aligned_by_their_wall_clocks() -> None:
    """A host that booted 1000 s later has a perf_counter that is 1000 s behind; another rank of it
    read its clocks 50 us apart, which must not move its spans."""
    traces = [Trace(rank) for rank in range(3)]
    for trace, host, offset_s, start in zip(
        traces, ("a", "b", "b"), (0.0, 1000.0, 1000.00005), (5000.0, 4000.5, 4000.5), strict=True
    ):
        trace.host, trace.clock_offset_ns = host, 10**18 + round(offset_s * 1e9)
        trace.add("compute", "experts", start, start + 1)
    events = [event for event in to_events(traces) if event["ph"] == "X"]
    assert [event["ts"] for event in events] == [0.0, 500_000.0, 500_000.0]


def test_memory_is_bounded_and_the_file_says_what_is_missing(tmp_path: Path) -> None:
    trace = Trace(3, max_spans=10)
    for number in range(25):
        trace.add("compute", str(number), number, number + 1)
    write_trace(tmp_path / "trace.json", [trace])
    document = json.loads((tmp_path / "trace.json").read_text())
    threads, _ = as_a_viewer_reads(document["traceEvents"])
    (rows,) = threads.values()
    assert [event["name"] for _, _, event in rows] == [str(number) for number in range(15, 25)]
    assert document["otherData"]["dropped_spans"] == {"rank 3": 15}
    trace.clear()
    assert (trace.spans, trace.num_dropped) == ([], 0)


def test_a_span_ends_with_an_error_too() -> None:
    trace = Trace(0)
    with pytest.raises(KeyError), trace.span("compute", "experts"):
        raise KeyError
    (span,) = trace.spans
    assert span.start_s <= span.end_s <= time.perf_counter()


def test_no_trace_keeps_nothing() -> None:
    with NO_TRACE.span("compute", "experts", bytes=1):
        NO_TRACE.add("network", "exchange", 0.0, 1.0)
    assert NO_TRACE.spans == []
    assert pickle.loads(pickle.dumps(NO_TRACE)).spans == []


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, why in (
        (tmp_path, "not a regular file"),
        (pipe, "not a regular file"),
        (tmp_path / "missing" / "trace.json", "No such file or directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(TraceError, match=f"cannot write a trace to .*{why}"):
            write_trace(path, [Trace(0)])
    unwritable = Trace(0)
    unwritable.add("compute", "experts", 0.0, 1.0, bytes=object())
    with pytest.raises(TypeError, match="JSON"):
        write_trace(old, [unwritable])
    assert old.read_text() == "old"
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == [old, pipe]
    link = tmp_path / "link.json"
    link.symlink_to(old)
    check_path(link)
    write_trace(link, [Trace(0)])
    assert link.is_symlink()
    assert json.loads(old.read_text())["traceEvents"]


def test_overlap_in_closed_form() -> None:
    """Network 1-3, 2-5 (together 1-5) and 8-9; compute 0-2, 4-8.5: hidden 1-2, 4-5 and 8-8.5."""
    trace = Trace(2)
    for start, end in ((1, 3), (2, 5), (8, 9)):
        trace.add("network", "exchange", start, end)
    for start, end in ((0, 2), (4, 8.5), (4.5, 5)):
        trace.add("compute", "experts", start, end)
    trace.add("communication", "dispatch", 0, 100)  # a wait hides nothing
    found = overlap([trace, Trace(0)])
    assert (found[2].network_s, found[2].compute_s, found[2].hidden_s) == (5.0, 6.5, 2.5)
    assert found[2].hidden_fraction == 0.5
    assert (found[0].network_s, found[0].hidden_fraction) == (0.0, 0.0)


@given(spans)
def test_overlap_against_counting_instants(spans):
    trace = Trace(0)
    for stream, start, end in spans:
        trace.add(stream, "span", start, end)
    ticks = [2e5 + (tick + 0.5) * 0.013 for tick in range(40)]

    def covered(stream, instant):
        return any(name == stream and start < instant < end for name, start, end in spans)

    found = overlap([trace])[0]
    network = [covered("network", instant) for instant in ticks]
    compute = [covered("compute", instant) for instant in ticks]
    both = sum(a and b for a, b in zip(network, compute, strict=True))
    for got, count in (
        (found.network_s, sum(network)),
        (found.compute_s, sum(compute)),
        (found.hidden_s, both),
    ):
        assert math.isclose(got, count * 0.013, abs_tol=1e-6)
