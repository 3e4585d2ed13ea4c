"""A draft is a plan in the order in which it is carried out, and says what that will cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cluster.rebalance_draft import draft
from router.load import ExpertLoad
from router.placement import Placement
from router.split import resplit_optima

LOADS = arrays(np.float64, (3, 8), elements=st.integers(0, 10**6).map(float)).filter(
    lambda a: a.any(axis=1).all()
)


@given(mean_LE=LOADS, from_scratch=st.booleans())
def test_what_stays_on_a_rank_keeps_its_slot_and_what_moves_is_counted(mean_LE, from_scratch):
    current = Placement.contiguous(3, 8, 4, 4, ranks_per_node=2)
    made = draft(ExpertLoad(mean_LE=mean_LE), current, target=1.02, from_scratch=from_scratch)
    assert [effect.layer for effect in made.effects] == [0, 1, 2]
    changed = dict(made.rows)
    for layer, row in changed.items():
        moves = 0
        for rank in range(4):
            mine = slice(3 * rank, 3 * rank + 3)
            before, after = current.physical_to_logical[layer, mine].tolist(), row[mine].tolist()
            moves += len(set(after) - set(before) - {-1})
            assert all(after[before.index(e)] == e for e in set(before) & set(after) - {-1})
        assert made.effects[layer].moves == moves
    assert all(effect.moves == 0 for effect in made.effects if effect.layer not in changed)
    assert made.num_moves == sum(effect.moves for effect in made.effects)


def test_the_worst_layer_comes_first():
    # Only the last rank holds 6 and 7; the more they get, the worse.
    mean_LE = np.ones((3, 8))
    mean_LE[:, 6:] = [[3], [9], [6]]
    current = Placement.contiguous(3, 8, 4, 4, ranks_per_node=2)
    load = ExpertLoad(mean_LE=mean_LE)
    made = draft(load, current, target=1.02)
    assert [layer for layer, _ in made.rows] == [1, 2, 0]
    shares = [4 * 2 * hot / (6 + 2 * hot) for hot in (3, 9, 6)]
    assert resplit_optima(load.mean_LE, current).tolist() == pytest.approx(shares, abs=1e-4)
    assert [effect.imbalance_before for effect in made.effects] == pytest.approx(shares, abs=1e-4)
    only = draft(load, current, target=1.02, only=[2])
    assert [layer for layer, _ in only.rows] == [2]
    assert [effect.layer for effect in only.effects] == [2]
