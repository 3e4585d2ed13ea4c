"""The same numbers and the same tokens as transformers, in fp32, on every layout.

One checkpoint of each architecture runs everywhere; the other variants differ in how attention and
gates work, not in how ranks talk, and run on the layouts that divide most.
"""

import pytest
import torch

from comms.topology import Topology
from tests.checkpoints import NAMES
from tests.model.ranks import Options, serve
from tests.model.reference import NUM_TOKENS
from tests.model.solo import load_solo, make_batch, new_cache

MAX_LOGIT_DIFF = 1e-4
ARCHITECTURES = ("deepseek_v2_grouped", "deepseek_v3_qlora", "qwen3_moe_norm", "mixtral")
VARIANTS = tuple(name for name in NAMES if name not in ARCHITECTURES)
LAYOUTS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 2))
CASES = [
    *((name, layout, b) for name in ARCHITECTURES for layout in LAYOUTS for b in ("flat", "hierarchical")),
    *((name, layout, "hierarchical") for name in VARIANTS for layout in ((1, 1), (2, 2), (3, 2))),
    *(("mosaic", layout, "hierarchical") for layout in LAYOUTS),
    ("mosaic", (2, 2), "flat"),
]  # fmt: skip


def assert_equal_to_reference(results, answers, tolerance=MAX_LOGIT_DIFF):
    served = {i: (r.logits[i], r.tokens[i]) for r in results for i in r.logits}
    assert sorted(served) == list(range(len(answers)))
    for i, (logits, tokens) in served.items():
        assert float(answers[i].logits.std()) > 1.0, "the reference must tell tokens apart"
        torch.testing.assert_close(logits, answers[i].logits, rtol=0, atol=tolerance)
        assert tokens == answers[i].tokens


@pytest.mark.parametrize(("name", "layout", "backend"), CASES)
def test_equals_transformers(rank_pool, checkpoint_dir, reference, name, layout, backend):
    """Three prompts over the replicas; some replicas have two, some none."""
    answers = reference(name)
    results = rank_pool.run(
        serve,
        Topology(num_nodes=layout[0], ranks_per_node=layout[1]),
        checkpoint_dir(name),
        Options(all2all_backend=backend),
        [answer.prompt for answer in answers],
        NUM_TOKENS,
        timeout_s=120,
    )
    assert_equal_to_reference(results, answers)


@pytest.mark.parametrize("combine", ["node", "exact", "fixed"])
@pytest.mark.parametrize("name", ["deepseek_v3_qlora", "qwen3_moe_norm"])
def test_data_parallel_replicas_with_redundant_experts(
    rank_pool, checkpoint_dir, reference, name, combine
):
    """Four replicas of one rank each, one of them idle, with more slots than experts."""
    answers = reference(name)
    results = rank_pool.run(
        serve,
        Topology(num_nodes=2, ranks_per_node=2, tensor_parallel_size=1),
        checkpoint_dir(name),
        Options(combine=combine, num_redundant_experts=6, first_chunk=13),
        [answer.prompt for answer in answers],
        NUM_TOKENS,
        timeout_s=120,
    )
    assert_equal_to_reference(results, answers)


@pytest.mark.parametrize("name", ["qwen3_moe_norm", "mixtral"])
def test_more_ranks_than_kv_heads(rank_pool, checkpoint_dir, reference, name):
    """Two KV heads on four tensor-parallel ranks: every head is kept twice."""
    answers = reference(name)
    results = rank_pool.run(
        serve,
        Topology(num_nodes=1, ranks_per_node=4),
        checkpoint_dir(name),
        Options(),
        [answer.prompt for answer in answers],
        8,
        timeout_s=120,
    )
    served = results[0]
    for i, answer in enumerate(answers):
        torch.testing.assert_close(served.logits[i], answer.logits, rtol=0, atol=MAX_LOGIT_DIFF)
        assert served.tokens[i] == answer.tokens[:8]


@pytest.mark.parametrize("name", ["deepseek_v3_qlora", "mixtral"])
def test_stacked_expert_tensors(tmp_path, checkpoint_dir, reference, name):
    """transformers 5 can also write all experts of a layer as one tensor."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir(name), dtype=torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    answer = reference(name)[1]
    ours = load_solo(tmp_path)
    batch = make_batch([(answer.prompt, 0, [2, 0, 1], range(len(answer.prompt)))], 16)
    logits = ours.forward(batch, new_cache(ours, 3, 16))
    torch.testing.assert_close(logits, answer.logits, rtol=0, atol=MAX_LOGIT_DIFF)
