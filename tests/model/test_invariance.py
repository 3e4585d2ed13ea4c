"""A token's logits have the same bits alone, in any batch, chunking, block layout or replica.

No tolerances: torch.equal, in fp32 and in BF16, at a given layout and placement.
"""

import random
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.model.batch import ForwardBatch
from comms.topology import Topology
from tests.model.ranks import Options, serve
from tests.model.solo import load_solo, make_batch, new_cache

BLOCK_SIZE = 16
LENGTHS = (5, 41, 80)  # the last one needs a second key tile
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sequences():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 131, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def token_by_token(checkpoint_dir):
    """A model, and each sequence's logits from steps of one token, with nobody else around."""

    @cache
    def compute(name, dtype):
        model = load_solo(checkpoint_dir(name), dtype)
        rows = []
        for tokens in sequences():
            kv = new_cache(model, 5, BLOCK_SIZE, dtype)
            steps = [
                make_batch([([token], position, range(5), [0])], BLOCK_SIZE)
                for position, token in enumerate(tokens)
            ]
            rows.append(torch.cat([model.forward(step, kv) for step in steps]))
        return model, rows

    return compute


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["deepseek_v3_qlora", "deepseek_v2_greedy", "qwen3_moe_norm", "mixtral"]
)
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), max_chunk=st.sampled_from([1, 3, 16, 17, 64, 80]))
def test_bits_do_not_depend_on_company_chunks_or_blocks(
    token_by_token, name, dtype, seed, max_chunk
):
    """Random chunks of all sequences share steps in random order, idle steps between them."""
    model, expected = token_by_token(name, DTYPES[dtype])
    rng = random.Random(seed)
    kv = new_cache(model, 16, BLOCK_SIZE, DTYPES[dtype])
    blocks = rng.sample(range(16), 16)
    done = [0, 0, 0]
    logits = [[], [], []]
    while any(done[i] < n for i, n in enumerate(LENGTHS)):
        parts, owners, sizes = [], [], []
        for i in rng.sample(range(3), 3):
            chunk = min(rng.randint(0, max_chunk), LENGTHS[i] - done[i])
            tokens = sequences()[i][done[i] : done[i] + chunk]
            parts.append((tokens, done[i], blocks[5 * i : 5 * i + 5], range(chunk)))
            owners.append(i)
            sizes.append(chunk)
            done[i] += chunk
        batch = make_batch(parts, BLOCK_SIZE) if sum(sizes) else ForwardBatch.empty()
        for i, part in zip(owners, model.forward(batch, kv).split(sizes), strict=True):
            logits[i].append(part)
    for i in range(3):
        assert torch.equal(torch.cat(logits[i]), expected[i]), f"sequence {i}"


LAYOUTS = [(2, 2, 2, "fixed"), (2, 2, 1, "node"), (3, 2, 2, "node"), (2, 2, 2, "exact")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bits_do_not_depend_on_company_chunks_or_replica_across_ranks(
    rank_pool, checkpoint_dir, layout
):
    """BF16 over several ranks: which rank owns a token's row changes with its batch; no bit may."""
    nodes, ranks, tp_size, combine = layout
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks, tensor_parallel_size=tp_size)
    mine, *others = sequences()[::-1]

    def logits_of(prompts, which, **options):
        options = Options(dtype=torch.bfloat16, combine=combine, **options)
        arguments = (checkpoint_dir("deepseek_v3_qlora"), options, prompts, 4)
        results = rank_pool.run(serve, topology, *arguments, timeout_s=60)
        served = next(r for r in results if which in r.logits)
        return served.logits[which], served.tokens[which]

    alone, tokens = logits_of([mine], 0)
    company = [mine, *others, *others, *others, others[0]]
    for other_logits, other_tokens in (
        logits_of(company, 0),
        logits_of(company, 0, first_chunk=17),
        logits_of([*others, mine, *others], 2, all2all_backend="flat"),
        logits_of([others[0], mine], 1),
    ):
        assert torch.equal(other_logits, alone)
        assert other_tokens == tokens


def test_redundant_experts_do_not_break_invariance(rank_pool, checkpoint_dir):
    """Which copy of an expert serves a token must not depend on the row it has in the batch."""
    topology = Topology(num_nodes=1, ranks_per_node=4, tensor_parallel_size=4)
    mine, *others = sequences()[::-1]
    options = Options(dtype=torch.float32, num_redundant_experts=12)
    directory = checkpoint_dir("deepseek_v3_qlora")
    alone, company = (
        rank_pool.run(serve, topology, directory, options, prompts, 2, timeout_s=60)[0].logits[0]
        for prompts in ([mine], [mine, *others])
    )
    assert torch.equal(company, alone)


@pytest.mark.parametrize("combine", ["exact", "fixed"])
def test_combine_is_equal_across_expert_layouts(rank_pool, checkpoint_dir, combine):
    """BF16, one rank a replica: any number of ranks and nodes, same bits."""
    directory = checkpoint_dir("deepseek_v3_qlora")
    options = Options(dtype=torch.bfloat16, combine=combine)
    logits = [
        rank_pool.run(
            serve,
            Topology(num_nodes=nodes, ranks_per_node=ranks, tensor_parallel_size=1),
            directory,
            options,
            sequences()[:1],
            2,
            timeout_s=60,
        )[0].logits[0]
        for nodes, ranks in ((1, 1), (1, 2), (2, 1), (3, 2))
    ]
    assert all(torch.equal(rows, logits[0]) for rows in logits[1:])
