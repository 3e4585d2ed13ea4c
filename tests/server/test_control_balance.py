"""Placement, balance and rebalances over real sockets: the leaders are stubs, the ranks fakes."""

import asyncio
import io
import time

import grpc
import numpy as np
import pytest

from cluster.rebalancer import ExpertFacts, Rebalancer
from cluster.server.client import Client, ClientError
from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from cluster.server.proto.expertmesh.v1 import control_pb2_grpc as pb_grpc
from router.placement import Placement
from tests.fake_ranks import FakeRank
from tests.server.serving import serve

LAYERS = (3, 5)
START = Placement.contiguous(2, 8, 4, 4, ranks_per_node=2)
SKEWED = np.array([20, 20, 20, 20, 40, 40, 80, 80])
FACTS = ExpertFacts(model_layers=LAYERS, experts_per_token=2, expert_bytes=1000)
QUICK = ("eplb_config.interval_s=0.02", "eplb_config.prepare_timeout_s=5")


class Ranks:
    """Four ranks that count as if `batches` skewed batches had come, and flip with the leaders."""

    def __init__(self, batches=10):
        self.fakes = [FakeRank(idx, START) for idx in range(4)]
        self.gateway = None
        for idx, rank in enumerate(self.fakes):
            rank.routed_LE = batches * np.tile(SKEWED, (2, 1))
            rank.served_L = np.array([100 * (idx + 1), 100])
            rank.sent = 1000 * idx

    def rebalancer(self, config, gateway):
        async def flips():
            while True:
                for rank in self.fakes:
                    if rank.prepared and min(gateway.placement_epochs()) >= rank.prepared.epoch:
                        rank.at, rank.prepared = rank.prepared, None
                await asyncio.sleep(0.001)

        self.flipping = asyncio.get_running_loop().create_task(flips())
        return Rebalancer(config, FACTS, START, self.fakes, gateway)


@pytest.fixture
def ranks():
    return Ranks()


@pytest.fixture
def serving(ranks):
    with serve(*QUICK, num_replicas=2, make_rebalancer=ranks.rebalancer) as serving:
        yield serving
        serving.do(ranks.flipping.cancel)


def wait_until(happened):
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def more_traffic(ranks):
    for idx, rank in enumerate(ranks.fakes):
        rank.routed_LE = rank.routed_LE + 10 * np.tile(SKEWED, (2, 1))
        rank.served_L = rank.served_L + np.array([10 * (idx + 1), 0])
        rank.sent += 500


def test_the_placement_is_that_in_force(serving):
    answer = serving.client.placement()
    assert (answer.epoch, answer.num_experts, answer.num_ranks) == (0, 8, 4)
    assert (answer.ranks_per_node, answer.slots_per_rank) == (2, 3)
    assert [layer.layer for layer in answer.layers] == list(LAYERS)
    for layer, row in zip(answer.layers, START.physical_to_logical, strict=True):
        assert list(layer.experts) == row.tolist()


def test_balance_is_what_was_served_in_the_window(serving, ranks):
    wait_until(lambda: serving.client.balance().ranks)
    more_traffic(ranks)
    wait_until(lambda: any(rank.served_total for rank in serving.client.balance().ranks))
    balance = serving.client.balance()
    assert 0 < balance.window_s < 20
    assert [(rank.rank, rank.node) for rank in balance.ranks] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [list(rank.served) for rank in balance.ranks] == [[10, 0], [20, 0], [30, 0], [40, 0]]
    assert [rank.served_total for rank in balance.ranks] == [10, 20, 30, 40]
    assert [rank.intra_node_bytes for rank in balance.ranks] == [500, 1500, 2500, 3500]
    assert [rank.inter_node_bytes for rank in balance.ranks] == [1000, 3000, 5000, 7000]
    assert [rank.step_ms for rank in balance.ranks] == [3.0] * 4  # the median of 2, 3 and 4
    first, second = balance.layers
    assert (first.layer, first.balancedness) == (3, 25 / 40)
    assert (second.layer, second.balancedness) == (5, 0.0)  # it served nothing
    assert balance.balancedness_mean == balance.balancedness_min == 25 / 40
    # Rank 3 alone holds experts 6 and 7: 160 of 320, twice a quarter.
    assert [layer.planned for layer in balance.layers] == pytest.approx([0.5, 0.5])
    assert balance.enabled_reason == "off: eplb_config.enabled is false"
    assert serving.client.server_info().rebalancing == balance.enabled_reason


def test_before_any_rank_was_heard_there_is_nothing_to_show():
    ranks = Ranks()
    with serve("eplb_config.interval_s=1000", make_rebalancer=ranks.rebalancer) as serving:
        balance = serving.client.balance()
        assert (len(balance.ranks), len(balance.layers), balance.window_s) == (0, 0, 0.0)
        with pytest.raises(ClientError, match="not enough load recorded yet: 0 tokens"):
            serving.client.rebalance(dry_run=True)
        serving.do(ranks.flipping.cancel)


def test_a_dry_run_explains_and_a_run_does_it(serving, ranks):
    wait_until(lambda: serving.client.balance().ranks)
    shown = serving.client.rebalance(dry_run=True)
    assert not shown.started
    assert [effect.layer for effect in shown.layers] == list(LAYERS)
    for effect in shown.layers:
        assert effect.imbalance_before == pytest.approx(2.0)
        assert effect.lower_bound <= effect.imbalance_after <= 1.02
        assert effect.bytes == 1000 * effect.moves > 0
    assert shown.bytes == sum(effect.bytes for effect in shown.layers)
    assert "2 of 2 layers to change; worst imbalance 2.000 -> 1.0" in shown.reason
    assert serving.client.balance().rebalances.started == 0

    done = serving.client.rebalance()
    assert (done.started, done.epoch, done.bytes) == (True, 0, shown.bytes)
    wait_until(lambda: serving.client.balance().rebalances.finished)
    stats = serving.client.balance().rebalances
    assert (stats.started, stats.abandoned, stats.running) == (1, 0, False)
    assert stats.moves == sum(effect.moves for effect in done.layers)
    assert (stats.last_reason, stats.last_error) == ("asked for by an operator", "")
    after = serving.client.placement()
    assert after.epoch == 2
    for layer, rank in zip(after.layers, ranks.fakes, strict=False):
        assert (
            list(layer.experts) == rank.at.physical_to_logical[LAYERS.index(layer.layer)].tolist()
        )
    for leader in serving.leaders:
        assert {frame["epoch"] for frame in leader.of_type("placement")} == {1, 2}
    assert not serving.client.rebalance().started, "nothing is left to move"


def test_a_leader_that_was_not_told_keeps_everybody_waiting(serving):
    wait_until(lambda: serving.client.balance().ranks)
    serving.leaders[1].deaf_to_commits.set()
    assert serving.client.rebalance().started
    serving.leaders[1].wait_for("placement")
    time.sleep(0.1)
    assert serving.client.balance().rebalances.running
    assert serving.client.placement().epoch == 0
    with pytest.raises(ClientError, match="a rebalance is running") as caught:
        serving.client.rebalance()
    assert caught.value.code == "FAILED_PRECONDITION"
    serving.leaders[1].deaf_to_commits.clear()
    wait_until(lambda: serving.client.balance().rebalances.finished)  # it is sent again


def test_a_failing_rank_is_named_in_the_balance(serving, ranks):
    wait_until(lambda: serving.client.balance().ranks)
    ranks.fakes[2].behaviour = "fails"
    assert serving.client.rebalance().started
    wait_until(lambda: serving.client.balance().rebalances.abandoned)
    stats = serving.client.balance().rebalances
    assert "rank 2 has not prepared epoch 1" in stats.last_error
    assert "no holder answers" in stats.last_error
    assert serving.client.placement().epoch == 0
    assert serving.client.server_info().ready


@pytest.mark.parametrize("target", [0.5, float("nan"), float("inf"), -1.0])
def test_bad_targets(serving, target):
    with pytest.raises(ClientError, match="target = ") as caught:
        serving.client.rebalance(dry_run=True, target=target)
    assert caught.value.code == "INVALID_ARGUMENT"


def test_the_dump_is_the_recorded_load(serving):
    wait_until(lambda: serving.client.balance().ranks)
    arrays = np.load(io.BytesIO(serving.client.dump_expert_stats()))
    assert np.allclose(arrays["mean"], SKEWED / SKEWED.sum())


def test_admin_calls_need_the_token_and_reads_do_not(tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text("sesame")
    token_file.chmod(0o600)
    ranks = Ranks()
    options = (*QUICK, f"server.admin_token_file={token_file}")
    with serve(*options, make_rebalancer=ranks.rebalancer) as serving:
        client = serving.client
        wait_until(lambda: client.balance().ranks)
        for token in (None, "wrong"):
            with Client(serving.address, admin_token=token) as stranger:
                for call in (stranger.rebalance, stranger.dump_expert_stats):
                    with pytest.raises(ClientError) as caught:
                        call()
                    assert caught.value.code == "UNAUTHENTICATED"
        with Client(serving.address, admin_token="sesame") as admin:
            assert admin.dump_expert_stats()
            assert not admin.rebalance(dry_run=True).started
        assert client.placement().num_ranks == 4
        serving.do(ranks.flipping.cancel)


def test_without_ranks_the_calls_are_refused():
    with serve() as serving, grpc.insecure_channel(serving.address) as channel:
        stub = pb_grpc.ControlStub(channel)
        for method, request in (
            (stub.GetExpertPlacement, pb.GetExpertPlacementRequest()),
            (stub.GetBalance, pb.GetBalanceRequest()),
            (stub.Rebalance, pb.RebalanceRequest()),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                method(request, timeout=10)
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert serving.client.server_info().rebalancing.startswith("off")
