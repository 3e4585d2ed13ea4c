"""Which experts tokens went to is what transformers' gates choose for the same tokens."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from cluster import offline
from cluster.config import ServeConfig
from cluster.engine.engine import build_engine
from cluster.engine.mailbox import Frame, LocalMailbox
from cluster.engine.sampling_params import SamplingParams
from comms.dispatcher import TokenDispatcher
from comms.groups import ParallelGroups
from comms.launch import RankPool

LENGTHS = (3, 40, 17, 9)
NUM_TOKENS = 6


def requests() -> list[Frame]:
    """All but the last ask for their experts."""
    rng = np.random.default_rng(3)
    frames = []
    for idx, length in enumerate(LENGTHS):
        params = SamplingParams(seed=idx, max_tokens=NUM_TOKENS, ignore_eos=True)
        frame = offline.add_frame(str(idx), rng.integers(0, 100, length).tolist(), params)
        frames.append(frame | {"routed_experts": idx < len(LENGTHS) - 1})
    return frames


def serve(groups: ParallelGroups, config: ServeConfig, parts: int) -> list[tuple]:
    """(request, emitted token, (first position, experts)) of each event of this replica."""
    topology = groups.topology
    mine = requests()[topology.replica_of(groups.rank) :: topology.num_replicas]
    mailbox = LocalMailbox(mine) if topology.tp_rank_of(groups.rank) == 0 else None
    engine = build_engine(config, groups, mailbox)
    dispatcher: TokenDispatcher = engine.runner.model.dispatcher
    with mock.patch.object(type(dispatcher), "expect", return_value=parts):
        while engine.step():
            pass
    engine.runner.close()
    if mailbox is None:
        return []
    assert not [event.error for event in mailbox.events if event.error]
    return [(event.request_id, event.token_id, event.routed_experts) for event in mailbox.events]


def gates_of_transformers(directory: Path, token_ids: list[int]) -> np.ndarray:
    """Experts [tokens, layers, k], sorted, that reach the expert layers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    chosen = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    with torch.inference_mode():
        model(torch.tensor([token_ids]))
    return np.sort(torch.stack(chosen, dim=1).numpy(), axis=2)


@pytest.mark.parametrize(
    ("name", "layout", "parts"),
    [
        ("deepseek_v3_qlora", (1, 1, 1), 1),
        ("deepseek_v3_qlora", (2, 2, 2), 2),
        ("qwen3_moe_norm", (1, 4, 4), 1),
        ("mixtral", (2, 2, 1), 2),
    ],
)
def test_experts_are_those_of_transformers(
    rank_pool: RankPool, tiny_checkpoint, name: str, layout: tuple[int, int, int], parts: int
) -> None:
    """In chunks of 16 tokens, some steps in two micro-batches; every token is told of once."""
    nodes, ranks, tp = layout
    directory = tiny_checkpoint(name)
    config = ServeConfig.from_dict(
        {
            "model": str(directory),
            "dtype": "float32",
            "parallel": {"num_nodes": nodes, "ranks_per_node": ranks, "tensor_parallel_size": tp},
            "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 16},
        }
    )
    results = rank_pool.run(serve, config.parallel.topology, config, parts, timeout_s=120)
    events = [event for result in results for event in result]
    for frame in requests():
        request_id, prompt = frame["request_id"], frame["token_ids"]
        mine = [event for event in events if event[0] == request_id]
        routed = [experts for _, _, told in mine for experts in told]
        if not frame["routed_experts"]:
            assert routed == []
            continue
        tokens = [token_id for _, token_id, _ in mine if token_id is not None]
        expected = gates_of_transformers(directory, [*prompt, *tokens[:-1]])
        assert [r.start for r in routed] == np.cumsum([0, *map(num_tokens, routed)])[:-1].tolist()
        ids = np.concatenate([decode(r) for r in routed])
        np.testing.assert_array_equal(np.sort(ids, axis=2), expected)


def num_tokens(routed) -> int:
    return len(routed.ids) // (2 * routed.num_layers * routed.experts_per_token)


def decode(routed) -> np.ndarray:
    shape = (-1, routed.num_layers, routed.experts_per_token)
    return np.frombuffer(routed.ids, "<i2").reshape(shape)
