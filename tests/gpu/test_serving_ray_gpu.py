"""`expertmesh serve` on two GPUs: Ray, gRPC, real sockets, and the tokens of one GPU."""

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("ray", reason="needs Ray: these are the served cluster's tests")
pytest.importorskip("grpc", reason="needs grpcio")

from cluster import offline
from cluster.engine.sampling_params import SamplingParams
from tests.gpu.greedy import MOSAIC, prompts
from tests.gpu.served import configured
from tests.model.solo import solo_groups

COMMAND = (sys.executable, "-c", "from deploy.cli import main; main()", "serve")
OPTIONS = (
    f"model={MOSAIC}",
    "device=cuda",
    "parallel.num_nodes=1",
    "parallel.ranks_per_node=2",
    "parallel.tensor_parallel_size=1",
    "scheduler.max_num_batched_tokens=8",
    "scheduler.max_num_seqs=8",
    "experts.num_redundant_experts=2",
    "eplb_config.interval_s=0.25",
    "eplb_config.min_tokens=16",
    "eplb_config.bandwidth_mib_s=4096",
    "server.port=0",
)
NUM_TOKENS = 100
PATIENCE_S = 120


@pytest.fixture
def served():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    from tests.deploy.processes import running

    with running([*COMMAND, *OPTIONS]) as command:
        command.wait_for(r"serving mosaic on (\S+)", 100)
        yield command


def token_ids() -> list[list[int]]:
    """Prompts of 11 to 340 tokens."""
    return [ids * (1 + 9 * (i % 4)) for i, ids in enumerate(prompts() * 2)]


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_tokens_streams_and_a_rebalance(served, both_gpus):
    from cluster.server.client import Client

    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    frames = [offline.add_frame(str(i), ids, params) for i, ids in enumerate(token_ids())]
    expected = list(offline.generate(solo_groups(), configured(ranks=1), frames).values())

    address = served.wait_for(r"serving mosaic on (\S+)", 1)[1]
    with Client(address, timeout_s=PATIENCE_S) as client, ThreadPoolExecutor(8) as threads:

        def generate(ids):
            chunks = client.generate_stream(
                ids, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True
            )
            return [token for chunk in chunks for token in chunk.token_ids]

        assert generate(token_ids()[0]) == expected[0], "while the other rank is idle"
        assert list(threads.map(generate, token_ids())) == expected

        cut = client.generate_stream(token_ids()[1], max_tokens=1500, ignore_eos=True)
        next(cut)
        cut.close()
        until(lambda: not any(load.running for load in client.loads().replicas))

        before = client.balance().rebalances
        streams = [threads.submit(generate, ids) for ids in token_ids()]
        until(lambda: any(load.running for load in client.loads().replicas))
        assert client.rebalance(from_scratch=True).started
        assert [stream.result() for stream in streams] == expected
        until(lambda: not client.balance().rebalances.running)
        after = client.balance().rebalances
        assert after.finished == before.finished + 1, after.last_error
        assert after.moves > before.moves
        assert client.placement().epoch > 0
        assert list(threads.map(generate, token_ids())) == expected

    served.signal(signal.SIGINT)
    assert served.wait(PATIENCE_S) == 0, served.output
    assert "Traceback" not in served.output
