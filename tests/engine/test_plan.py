"""Step plans survive the wire, and become the tensors that a plain loop over tokens gives."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.batch import forward_batch
from cluster.engine.plan import Logits, PlanItem, StepPlan, block_table

BLOCK_SIZE = 4


@st.composite
def items(draw):
    token_ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
    start = draw(st.integers(0, 20))
    num_blocks = -(-(start + len(token_ids)) // BLOCK_SIZE)
    blocks = draw(st.lists(st.integers(0, 1 << 20), min_size=num_blocks, max_size=num_blocks))
    seq_id = draw(st.integers(0, 2**62))
    return PlanItem(
        seq_id, tuple(token_ids), start, block_table(blocks), draw(st.sampled_from(Logits))
    )


plans = st.lists(items(), max_size=6).map(StepPlan.of)


@given(plans)
def test_decode_gives_back_what_was_encoded(plan):
    decoded = StepPlan.decode(plan.encode())
    assert decoded == plan
    assert decoded.num_tokens == sum(len(item.token_ids) for item in plan.items)


@given(plans)
def test_forward_batch_equals_a_loop_over_tokens(plan):
    batch = forward_batch(plan, BLOCK_SIZE)
    token_ids, positions, kv_slots, sequences, logit_rows = [], [], [], [], []
    for row, item in enumerate(plan.items):
        for offset, token_id in enumerate(item.token_ids):
            position = item.start + offset
            token_ids.append(token_id)
            positions.append(position)
            block = item.block_table[position // BLOCK_SIZE]
            kv_slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            sequences.append(row)
        if item.logits == Logits.ALL:
            logit_rows += range(len(token_ids) - len(item.token_ids), len(token_ids))
        elif item.logits == Logits.LAST:
            logit_rows.append(len(token_ids) - 1)
    assert batch.token_ids_T.tolist() == token_ids
    assert batch.positions_T.tolist() == positions
    assert batch.kv_slots_T.tolist() == kv_slots
    assert batch.sequence_T.tolist() == sequences
    assert batch.logit_rows.tolist() == logit_rows
    assert plan.num_logit_rows == len(logit_rows)
    width = max((len(item.block_table) for item in plan.items), default=0)
    padded = [[*i.block_table, *[0] * (width - len(i.block_table))] for i in plan.items]
    assert batch.block_tables_NB.tolist() == padded
    assert batch.block_tables_NB.shape == (len(plan.items), width)


def test_an_idle_replica_sends_almost_nothing():
    assert len(StepPlan().encode()) == 1
    assert forward_batch(StepPlan.decode(StepPlan().encode()), 16).num_tokens == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb(7),
        msgpack.packb({"seq_ids": b"1234"}),
        msgpack.packb({1: 2}),
        StepPlan.of([PlanItem(1, (2,), 0, block_table([3]), Logits.LAST)]).encode()[:-2],
    ],
)
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(ValueError, match="step plan"):
        StepPlan.decode(data)


def test_columns_that_disagree_are_refused():
    plan = StepPlan.of([PlanItem(1, (2, 3), 0, block_table([3]), Logits.LAST)])
    columns = msgpack.unpackb(plan.encode())
    columns["token_ids"] = columns["token_ids"][:4]
    with pytest.raises(ValueError, match="columns that disagree"):
        StepPlan.decode(msgpack.packb(columns))
