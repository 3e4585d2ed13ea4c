"""The engine on two GPUs: the tokens of one GPU, whatever the company, and who was late if one stops."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

pytest.importorskip("zmq", reason="needs what the engine needs")

from cluster import offline
from cluster.config import ServeConfig
from cluster.engine.sampling_params import SamplingParams
from cluster.model.config import ModelConfig
from cluster.scripted import Change
from comms.group import CommTimeout
from comms.groups import ParallelGroups
from comms.store import host_store
from tests.gpu.float8_checkpoints import write
from tests.gpu.greedy import MOSAIC
from tests.gpu.served import configured, on_two, requests, with_few_graphs
from tests.model.solo import make_batch, solo_groups

pytestmark = pytest.mark.usefixtures("both_gpus")


@cache
def of_one_gpu() -> dict[str, list[int]]:
    return offline.generate(solo_groups(), configured(ranks=1), requests(9))


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (2, 1)])
def test_two_ranks_give_the_tokens_of_one(pair, nodes, ranks):
    """Through memory that they share, and through NCCL."""
    expected = of_one_gpu()
    assert len(set(expected["r1"])) > 3, "a text, not one token again and again"
    assert on_two(pair, configured(nodes, ranks), requests(9)) == expected


def test_one_rank_has_nothing_to_do(pair):
    """Its padding takes part in every step of the other's, as graphs and without."""
    config = configured(most=24, scheduler={"async_scheduling": False})
    found = on_two(pair, config, requests(4)[3:], fn=with_few_graphs)
    assert found == {"r3": of_one_gpu()["r3"]}
    assert on_two(pair, config, requests(9), fn=with_few_graphs) == of_one_gpu()


def test_experts_move_between_ranks(pair):
    """From one GPU to the other through the host, while both serve; copies too."""
    model, rng = ModelConfig.from_dir(MOSAIC), np.random.default_rng(2)
    spare = [int(e) for e in rng.permutation(model.num_experts)[:2]]
    rows = [rng.permutation([*range(model.num_experts), *spare]).tolist() for _ in range(4)]
    changes = [Change(3 * i, i % model.num_moe_layers, row) for i, row in enumerate(rows)]
    store, address = host_store()
    moving = {"num_redundant_experts": 2}
    config = configured(experts=moving, eplb_config={"bandwidth_mib_s": 4096})
    assert on_two(pair, config, requests(9), changes, address) == of_one_gpu()
    del store


def test_float8_experts_are_the_same_on_any_rank_and_move(pair, tmp_path):
    """With a checkpoint in float8: rows travel quantised, and weights with their scales."""
    model = str(write(tmp_path / "float8", "mla"))
    frames = []
    for i in range(6):
        params = SamplingParams(
            temperature=1.0, seed=i, max_tokens=60 if i == 0 else 30, ignore_eos=True
        )
        token_ids = [(7 * i + 5 * j) % 96 for j in range(2 + 4 * i)]
        frames.append(offline.add_frame(f"r{i}", token_ids, params))
    expected = offline.generate(solo_groups(), configured(ranks=1, model=model), frames)
    changes = [Change(1, 0, [2, 1, 0, 3]), Change(4, 0, [3, 1, 0, 2])]
    store, address = host_store()
    assert on_two(pair, configured(model=model), frames, changes, address) == expected
    del store


def alone_in_a_pass(groups: ParallelGroups, config: ServeConfig, graph: bool) -> str:
    """Rank 0 computes a step that rank 1 knows nothing of; what it says of that."""
    from cluster.engine.runner import Runner
    from cluster.gpus import take_gpu

    take_gpu(groups.rank)
    with closing(Runner.load(config, groups)) as runner:
        model = runner.model
        model.exchange.dispatcher.report.timeout_s = 0.5
        kv = model.new_cache(4, 16)
        if graph:
            model.capture(kv, 1)  # with the new deadline
        else:
            model = replace(model, graphs=None)
        said = ""
        if groups.rank == 0:
            model.where.step = 7
            batch = make_batch([([5], 0, [0], [0])], 16)
            with pytest.raises(CommTimeout) as error:
                model.forward(batch, kv, 1)
            said = str(error.value)
        groups.world.barrier()
        return said


@pytest.mark.parametrize("graph", [False, True])
def test_a_rank_that_does_not_come_is_named(pair, graph):
    config = configured(most=2, scheduler={"max_num_seqs": 2})
    said, _ = pair.run(
        alone_in_a_pass, config.parallel.topology, config, graph, timeout_s=150, comm_timeout_s=120
    )
    for name in ("rank 0", "rank 1", "step 7"):
        assert name in said, said
