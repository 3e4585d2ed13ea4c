"""Slots by quota: the ranks of a node, each alone, do together what the quotas say."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.slots import choose_by_share, share_of_rank
from router.split import LayerSplit
from tests.router.test_split import random_layer


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3))
def test_all_ranks_together_fill_the_quotas(seed, num_nodes, ranks_per_node):
    rng = np.random.default_rng(seed)
    num_ranks = num_nodes * ranks_per_node
    num_experts = int(rng.integers(2, 3 * num_ranks + 1))
    layer = random_layer(rng, num_experts, num_ranks, 4, ranks_per_node)
    ids_NMTK = [
        [rng.integers(-1, num_experts, (rng.integers(0, 40), 3)) for _ in range(ranks_per_node)]
        for _ in range(num_nodes)
    ]
    counts_NME = np.array(
        [
            [np.bincount(ids.ravel() + 1, minlength=num_experts + 1)[1:] for ids in of_node]
            for of_node in ids_NMTK
        ]
    )
    quotas_NEC = LayerSplit(layer).divide(counts_NME.sum(axis=1), 0.02)
    for node, of_node in enumerate(ids_NMTK):
        used = np.zeros_like(quotas_NEC[node])
        for rank, ids_TK in enumerate(of_node):
            before_E = counts_NME[node, :rank].sum(axis=0)
            share_EC = share_of_rank(quotas_NEC[node], before_E, counts_NME[node, rank])
            slots_TK = choose_by_share(ids_TK, share_EC, layer)
            assert slots_TK.dtype == np.int64
            assert ((slots_TK == -1) == (ids_TK == -1)).all()
            for expert, slot in zip(ids_TK[ids_TK >= 0], slots_TK[ids_TK >= 0], strict=True):
                used[expert, list(layer.logical_to_physical[expert]).index(slot)] += 1
        assert np.array_equal(used, quotas_NEC[node])
