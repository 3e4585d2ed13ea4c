"""A layer's new slots are in force on all ranks or on none, whatever breaks in between."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import rollout as rollout_module
from cluster.ranks import RanksError
from cluster.rollout import Rollout
from tests.fake_ranks import cluster, placement

SHORT_S = 0.03


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch):
    monkeypatch.setattr(rollout_module, "ABANDON_TIMEOUT_S", SHORT_S)


def swapped(row, a=0, b=11):
    row = np.array(row)
    row[[a, b]] = row[[b, a]]
    return row.tolist()


async def change(rollout, ranks, layer=0):
    epoch = ranks[0].at.epoch + 1
    row = swapped(ranks[0].at.physical_to_logical[layer])
    await rollout.prepare(epoch, layer, row)
    await rollout.commit(epoch)
    return row


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 10))


def test_all_ranks_get_the_new_row_together():
    ranks, leaders = cluster()

    async def scenario():
        rollout = Rollout(ranks, leaders, SHORT_S)
        return [await change(rollout, ranks, layer) for layer in (1, 0)]

    rows = run(scenario())
    assert leaders.committed == [1, 2]
    for rank in ranks:
        assert rank.at.epoch == 2
        assert rank.at.physical_to_logical[[1, 0]].tolist() == rows
        assert rank.prepared is None
        assert rank.abandoned == []


@pytest.mark.parametrize(
    ("behaviour", "names"),
    [
        ("fails", "rank 2 has not prepared epoch 1 .*: RuntimeError: no holder answers"),
        ("hangs", r"rank 2 has not prepared epoch 1 \(expert layer 0\) within 0.03 s"),
        ("prepares and then hangs", "rank 2 has not prepared epoch 1"),
    ],
)
def test_a_rank_that_does_not_prepare_leaves_the_old_slots_everywhere(behaviour, names):
    ranks, leaders = cluster()
    ranks[2].behaviour = behaviour

    async def scenario():
        rollout = Rollout(ranks, leaders, SHORT_S)
        with pytest.raises(RanksError, match=names):
            await change(rollout, ranks)
        assert leaders.committed == []
        for rank in ranks:
            assert (rank.at.epoch, rank.prepared, rank.abandoned) == (0, None, [1])
        ranks[2].behaviour = "works"
        await change(rollout, ranks)  # the same epoch, once more

    run(scenario())
    assert leaders.committed == [1]


def test_one_failure_is_enough_and_the_others_are_not_waited_for():
    ranks, leaders = cluster()
    ranks[0].behaviour, ranks[1].behaviour = "hangs", "fails"

    async def scenario():
        with pytest.raises(RanksError, match=r"rank 1 .* no holder answers"):
            await change(Rollout(ranks, leaders, 3600), ranks)

    run(scenario())
    assert all(rank.abandoned == [1] for rank in ranks)


def test_nothing_new_is_prepared_until_every_rank_has_forgotten_the_old():
    ranks, leaders = cluster()
    ranks[1].behaviour, ranks[3].deaf = "fails", True

    async def scenario():
        rollout = Rollout(ranks, leaders, SHORT_S)
        with pytest.raises(RanksError, match="no holder answers"):
            await change(rollout, ranks)
        assert ranks[3].prepared is not None  # it could not be told
        ranks[1].behaviour = "works"
        with pytest.raises(RanksError, match="rank 3 has not confirmed that epoch 1 is abandoned"):
            await change(rollout, ranks)
        ranks[3].deaf = False
        await change(rollout, ranks)

    run(scenario())
    assert ranks[3].at.epoch == 1


def test_a_commit_that_got_lost_is_sent_again(monkeypatch):
    monkeypatch.setattr(rollout_module, "RESEND_S", 0.02)
    ranks, leaders = cluster()
    leaders.lose = 2
    run(change(Rollout(ranks, leaders, 5.0), ranks))
    assert leaders.committed == [1, 1, 1]
    assert ranks[0].at.epoch == 1


def test_a_late_commit_is_named_and_blocks_the_next_change_until_it_is_reported():
    ranks, leaders = cluster()
    leaders.stuck = True

    async def scenario():
        rollout = Rollout(ranks, leaders, SHORT_S)
        with pytest.raises(RanksError, match="epoch 1 was committed, but replica 0, 1 has not"):
            await change(rollout, ranks)
        assert all(rank.abandoned == [] for rank in ranks), "there is no way back"
        with pytest.raises(RanksError, match="epoch 1 was committed"):
            await rollout.prepare(2, 0, [])
        leaders.stuck = False
        leaders.flip()
        await change(rollout, ranks)

    run(scenario())
    assert ranks[0].at.epoch == 2


BEHAVIOURS = st.sampled_from(["works"] * 5 + ["fails", "hangs", "prepares and then hangs"])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_breaks_ranks_never_stand_at_different_placements(data):
    ranks, leaders = cluster(placement(num_layers=2, num_experts=4, num_ranks=2, redundant=2))
    start = ranks[0].at
    expected = start

    async def scenario():
        nonlocal expected
        rollout = Rollout(ranks, leaders, 0.005)
        for _ in range(data.draw(st.integers(1, 5))):
            for rank in ranks:
                rank.behaviour = data.draw(BEHAVIOURS)
            leaders.stuck = data.draw(st.booleans())
            layer = data.draw(st.integers(0, 1))
            row = swapped(expected.physical_to_logical[layer], 0, data.draw(st.integers(1, 5)))
            epoch = expected.epoch + 1
            try:
                await rollout.prepare(epoch, layer, row)
                changed = expected.with_layers({layer: np.array(row)}, epoch)
                await rollout.commit(epoch)
            except RanksError:
                if leaders.stuck and all(rank.prepared for rank in ranks):
                    leaders.flip()  # late, but it comes: it was committed
                    expected = changed
            else:
                expected = changed
            for rank in ranks:
                assert rank.at.epoch == expected.epoch
                assert (rank.at.physical_to_logical == expected.physical_to_logical).all()
                assert rank.prepared is None

    run(scenario())
