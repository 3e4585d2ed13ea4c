"""The dispatcher of one rank does the arithmetic of those that send, to the last bit."""

import pytest
import torch

from comms.codecs import CODECS
from comms.flat import FlatDispatcher
from comms.hierarchical import HierarchicalDispatcher
from comms.local import LocalDispatcher
from comms.make import dispatcher_for
from comms.topology import Topology
from tests.comms.cases import equal, expert, make_inputs
from tests.comms.thread_world import run_threads

ONE = Topology(num_nodes=1, ranks_per_node=1)
SLOTS, HIDDEN = 6, 128


def through(kind, inputs, **options):
    groups = run_threads(lambda groups, _: groups, ONE, [None])[0]
    dispatcher = kind(groups, slots_per_rank=SLOTS, hidden=HIDDEN, **options)
    range_T = inputs.range_T if options["combine"] == "fixed" else None
    received, handle = dispatcher.dispatch(inputs.x_TH, inputs.slots_TK, inputs.weights_TK, range_T)
    again_RH = dispatcher.dispatch_again(inputs.x_TH.flip(0), handle)
    return received, again_RH, dispatcher.combine(expert(received, 0, SLOTS), handle)


@pytest.mark.parametrize("pattern", ["random", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("combine", ["fixed", "node", "exact"])
@pytest.mark.parametrize("codec", CODECS)
def test_rows_and_sums_are_those_of_the_others(codec, combine, dtype, pattern) -> None:
    other = FlatDispatcher if pattern == "none" else HierarchicalDispatcher
    for num_tokens in (0, 1, 17):
        (inputs,) = make_inputs(
            ONE, tokens=[num_tokens], slots_per_rank=SLOTS, hidden=HIDDEN, dtype=dtype,
            pattern=pattern, seed=num_tokens,
        )  # fmt: skip
        options = {"dispatch_dtype": codec, "combine": combine, "combine_dtype": codec}
        received, again_RH, out_TH = through(LocalDispatcher, inputs, **options)
        expected, expected_again_RH, expected_out_TH = through(other, inputs, **options)
        assert equal(received.x_RH, expected.x_RH)
        assert torch.equal(received.local_slots_RK, expected.local_slots_RK)
        assert equal(again_RH, expected_again_RH)
        assert equal(out_TH, expected_out_TH)
        assert out_TH.dtype == dtype


def test_it_serves_where_there_is_nobody_to_send_to() -> None:
    for topology, kind in (
        (ONE, LocalDispatcher),
        (Topology(num_nodes=2, ranks_per_node=1), HierarchicalDispatcher),
    ):
        num_ranks = topology.world_size
        groups = run_threads(lambda groups, _: groups, topology, [None] * num_ranks)[0]
        found = dispatcher_for("hierarchical", groups, slots_per_rank=2, hidden=8)
        assert type(found) is kind
