"""Copies dealt out in the proportions of quotas: near them after any number of tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.odds import CopyOdds
from router.placement import Placement

PLACEMENT = Placement(
    physical_to_logical=np.array([[0, 1, 0, 2, 0, 1, 3, -1]]), num_experts=4, num_ranks=4
)
LAYER = PLACEMENT.layer(0)  # expert 0 in slots 0, 2, 4; expert 1 in 1, 5; 2 in 3; 3 in 6
USUAL_E = np.array([4, 5, 3, 6])

quotas = st.lists(st.integers(0, 1000), min_size=3, max_size=3)


@given(quotas, st.lists(st.integers(0, 40), max_size=20), st.integers(0, 63))
def test_any_number_of_tokens_comes_near_its_proportions(
    quota: list[int], batches: list[int], turn: int
) -> None:
    quotas_EC = np.array([quota, [3, 5, 0], [1, 0, 0], [0, 0, 0]])
    odds = CopyOdds(quotas_EC, USUAL_E, LAYER, turn)
    chosen: list[int] = []
    for tokens in batches:
        chosen += odds.choose(np.zeros((tokens, 1), dtype=np.int64)).ravel().tolist()
    if sum(quota) == 0:
        assert set(chosen) <= {4}  # the usual one
        return
    counts = [chosen.count(slot) for slot in (0, 2, 4)]
    assert sum(counts) == len(chosen)
    for count, share in zip(counts, np.array(quota) / sum(quota), strict=True):
        assert abs(count - share * len(chosen)) < 3.5  # of up to 800 tokens
        assert count == 0 or share > 0


@given(st.lists(st.lists(st.integers(-1, 3), min_size=2, max_size=2), max_size=30))
def test_every_id_finds_a_slot_of_its_expert(ids: list[list[int]]) -> None:
    ids_TK = np.array(ids, dtype=np.int64).reshape(-1, 2)
    quotas_EC = np.array([[1, 1, 2], [3, 5, 0], [1, 0, 0], [0, 0, 0]])
    slots_TK = CopyOdds(quotas_EC, USUAL_E, LAYER).choose(ids_TK)
    held = np.append(PLACEMENT.physical_to_logical[0], -1)  # slot -1 holds nothing
    assert (held[slots_TK] == ids_TK).all()


def test_a_batch_counts_as_its_tokens_would_one_by_one() -> None:
    quotas_EC = np.array([[1, 1, 2], [3, 5, 0], [1, 0, 0], [0, 0, 0]])
    ids_TK = np.random.default_rng(0).integers(0, 4, (50, 1))
    together = CopyOdds(quotas_EC, USUAL_E, LAYER).choose(ids_TK)
    one_by_one = CopyOdds(quotas_EC, USUAL_E, LAYER)
    assert together.tolist() == [one_by_one.choose(row[None]).tolist()[0] for row in ids_TK]
