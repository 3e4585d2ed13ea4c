"""Paged attention: right against fp64 softmax, and bit-identical whatever the batch looks like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.model.batch import ForwardBatch
from cluster.model.kv_cache import LayerCache
from cluster.model.paged import AttentionPlan, paged_attention

HEADS = [(1, 4, 28, 28), (2, 2, 20, 20), (1, 1, 16, 16), (3, 2, 24, 40)]  # G, Q, D, V


def make_cache(block_size, num_blocks, length, heads, dtype, permutation, latent=False):
    """Random keys and values of one sequence at permuted blocks; huge numbers elsewhere."""
    num_kv, _, key_dim, value_dim = heads
    generator = torch.Generator().manual_seed(length)
    k_LGD = torch.randn(length, num_kv, key_dim, generator=generator).to(dtype)
    v_LGV = torch.randn(length, num_kv, value_dim, generator=generator).to(dtype)
    positions = torch.arange(length)
    slots = permutation[positions // block_size] * block_size + positions % block_size
    caches = []
    for rows in (k_LGD, v_LGV):
        cache = torch.full((num_kv, num_blocks * block_size, rows.shape[2]), 1e30, dtype=dtype)
        cache[:, slots] = rows.transpose(0, 1)
        caches.append(cache.view(num_kv, num_blocks, block_size, -1))
    if latent:
        return caches[0], caches[0], k_LGD, k_LGD
    return caches[0], caches[1], k_LGD, v_LGV


def plan_for(positions, tables, sequences, block_size):
    zeros = torch.zeros_like(positions)
    batch = ForwardBatch(
        token_ids_T=zeros,
        positions_T=positions,
        kv_slots_T=zeros,
        block_tables_NB=tables,
        sequence_T=sequences,
        logit_rows=zeros[:0],
    )
    return AttentionPlan.build(batch, block_size)


def exact(q_TGQD, k_LGD, v_LGV, positions, scale):
    """Plain causal softmax attention in fp64."""
    scores = torch.einsum("tgqd,lgd->tgql", q_TGQD.double(), k_LGD.double()) * scale
    hidden = torch.arange(len(k_LGD)) > positions.view(-1, 1, 1, 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("tgql,lgv->tgqv", weights, v_LGV.double())


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 16, 24, 128])
def test_equals_exact_softmax(heads, dtype, block_size):
    length = 150
    num_blocks = -(-length // block_size) + 2
    permutation = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    k_cache, v_cache, k_LGD, v_LGV = make_cache(
        block_size, num_blocks, length, heads, dtype, permutation
    )
    positions = torch.arange(length)
    q = torch.randn(length, *heads[:2], heads[2]).to(dtype)
    # The table keeps its spare entries: they point at blocks that nobody may look at.
    plan = plan_for(positions, permutation.unsqueeze(0), torch.zeros_like(positions), block_size)
    out = paged_attention(q, k_cache, v_cache, plan, 0.3)
    expected = exact(q, k_LGD, v_LGV, positions, 0.3)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from(HEADS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    block_size=st.sampled_from([4, 16, 32, 64]),
    latent=st.booleans(),
    in_spans=st.booleans(),
    length=st.integers(1, 200),
    data=st.data(),
)
def test_a_token_keeps_its_bits(heads, dtype, block_size, latent, in_spans, length, data):
    """Alone or in any batch, at any place in it, with any blocks: torch.equal, no tolerance."""
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
    num_blocks = 2 * (-(-length // block_size)) + 1
    q_all = torch.randn(length, *heads[:2], heads[2], generator=seed).to(dtype)

    def attend(rows, others):
        """Outputs of the tokens `rows`, in company of tokens of a second sequence."""
        blocks = torch.randperm(num_blocks, generator=seed)
        k_cache, v_cache, _, _ = make_cache(
            block_size, num_blocks, length, heads, dtype, blocks, latent
        )
        num_used = -(-length // block_size)
        used, free = blocks[:num_used], blocks[num_used:]
        for cache in {id(c): c for c in (k_cache, v_cache)}.values():
            cache[:, free] = torch.randn(cache[:, free].shape, generator=seed).to(dtype)
        tables = torch.zeros(2, max(len(used), len(free)), dtype=torch.int64)
        tables[0, : len(used)], tables[1, : len(free)] = used, free
        positions = torch.cat([rows, others])
        sequences = torch.cat([torch.zeros_like(rows), torch.ones_like(others)])
        tables = tables[:, : int(positions.max()) // block_size + 1]  # as wide as this batch needs
        order = torch.randperm(len(positions), generator=seed)
        if in_spans:  # consecutive tokens of one sequence share their tiles
            order = order[sequences[order].argsort(stable=True)]
        q = torch.cat([q_all[rows], q_all[others]])
        plan = plan_for(positions[order], tables, sequences[order], block_size)
        out = paged_attention(q[order], k_cache, v_cache, plan, 0.25)
        return out[order.argsort()][: len(rows)]

    subset = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=30), "tokens")
    rows = torch.tensor(subset)
    alone = torch.cat([attend(row.view(1), rows[:0]) for row in rows])
    others = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), max_size=30), "others"))
    together = attend(rows, others.to(torch.int64))
    assert torch.equal(together, alone)


def test_block_sizes_that_divide_the_tile_give_the_same_bits():
    length, heads = 130, HEADS[0]
    positions = torch.arange(length)
    q = torch.randn(length, *heads[:2], heads[2])
    outs = []
    for block_size in (8, 16, 64):
        num_blocks = -(-length // block_size)
        blocks = torch.randperm(num_blocks)
        k, v, _, _ = make_cache(block_size, num_blocks, length, heads, torch.float32, blocks)
        plan = plan_for(positions, blocks.unsqueeze(0), torch.zeros_like(positions), block_size)
        outs.append(paged_attention(q, k, v, plan, 0.2))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_no_tokens_no_tiles():
    assert AttentionPlan.build(ForwardBatch.empty(), 16).parts == ()


def test_nan_of_one_sequence_does_not_reach_the_next_owner_of_its_blocks():
    keys, values = torch.zeros(2, 1, 3, 16, 16).unbind(0)
    cache = LayerCache(keys=keys, values=values)
    slots = torch.arange(48)
    broken = torch.full((48, 1, 16), torch.nan)
    broken[::2] = torch.inf
    cache.write(slots, broken, -broken)
    good = torch.randn(5, 1, 16)
    cache.write(slots[:5], good, good)
    positions = torch.arange(5)
    plan = plan_for(positions, torch.tensor([[0, 1, 2]]), torch.zeros_like(positions), 16)
    q = torch.randn(5, 1, 2, 16)
    out = paged_attention(q, cache.keys, cache.values, plan, 0.25)
    torch.testing.assert_close(
        out, exact(q, good, good, positions, 0.25).float(), rtol=1e-4, atol=1e-5
    )
