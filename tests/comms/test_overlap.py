"""The rule that says what to overlap: nothing without links or on fast ones, more as messages grow."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from comms.links import LinkSpeed
from comms.make import make_dispatcher
from comms.overlap import OverlapRule
from comms.topology import Topology
from tests.comms.thread_world import run_threads

SLOW = LinkSpeed(latency_s=1e-4, bytes_per_s=25e6)
FAST = LinkSpeed(latency_s=1e-5, bytes_per_s=50e9)
RULE = OverlapRule(links=SLOW, num_nodes=2, dispatch_bytes=2112, combine_bytes=4096)


def test_what_is_short_or_stays_at_home_is_not_split() -> None:
    assert RULE.micro_batches(512) == 2
    for rule in (replace(RULE, links=None), replace(RULE, links=FAST)):
        assert rule.micro_batches(512) == 1
        assert not rule.two_parts(512)
    assert RULE.micro_batches(1) == 1
    assert not RULE.two_parts(1)


def test_few_tokens_on_a_slow_link_come_in_two_parts_only() -> None:
    crawling = replace(RULE, links=LinkSpeed(latency_s=0.0, bytes_per_s=1e5))
    assert crawling.two_parts(4)
    assert crawling.micro_batches(4) == 1


@given(
    tokens=st.integers(0, 5000),
    more=st.integers(0, 5000),
    bytes_per_s=st.floats(1e3, 1e12),
    nodes=st.integers(2, 64),
)
def test_more_tokens_never_mean_less_overlap(tokens, more, bytes_per_s, nodes) -> None:
    links = LinkSpeed(latency_s=1e-4, bytes_per_s=bytes_per_s)
    rule = replace(RULE, links=links, num_nodes=nodes)
    assert rule.micro_batches(tokens) <= rule.micro_batches(tokens + more)
    assert rule.two_parts(tokens) <= rule.two_parts(tokens + more)


def test_a_dispatcher_expects_by_the_rule() -> None:
    topology = Topology(num_nodes=2, ranks_per_node=1)
    groups = run_threads(lambda groups, _: groups, topology, [None, None])[0]
    slow = make_dispatcher(
        "hierarchical", replace(groups, links=SLOW), slots_per_rank=4, hidden=2048
    )
    assert [slow.expect(n) for n in (None, 1, 512, 512, None)] == [1, 1, 2, 2, 1]
    unmeasured = make_dispatcher("hierarchical", groups, slots_per_rank=4, hidden=2048)
    assert unmeasured.expect(512) == 1
