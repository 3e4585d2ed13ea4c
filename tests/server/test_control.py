"""Facts and loads for everybody, abort and drain for admins."""

import threading
import time

import grpc
import pytest

from cluster.server.client import ClientError
from cluster.server.errors import RequestError
from cluster.server.proto.expertmesh.v1 import control_pb2 as pb
from cluster.server.proto.expertmesh.v1 import control_pb2_grpc as pb_grpc
from cluster.server.proto.expertmesh.v1 import inference_pb2
from cluster.server.rpc.control import ControlServicer
from tests.server.serving import EOS, MAX_MODEL_LEN, VOCAB_SIZE, serve

PROMPT = [5, 6, 7]


def call(serving, method, request, metadata=()):
    with grpc.insecure_channel(serving.address) as channel:
        return getattr(pb_grpc.ControlStub(channel), method)(request, timeout=10, metadata=metadata)


def test_facts():
    with serve(num_replicas=2) as serving:
        info = serving.client.server_info()
        assert (info.model, info.ready, info.draining) == ("tiny", True, False)
        assert (info.num_nodes, info.ranks_per_node, info.num_replicas) == (2, 1, 2)
        assert info.uptime_s > 0
        model = serving.client.model_info()
        assert (model.vocab_size, model.max_model_len) == (VOCAB_SIZE, MAX_MODEL_LEN)
        assert (list(model.eos_token_ids), model.has_tokenizer) == ([EOS], True)


def test_loads_follow_the_requests():
    with serve(num_replicas=2) as serving:
        for leader in serving.leaders:
            leader.held.set()
        streams = [serving.client.generate_stream(PROMPT) for _ in range(3)]
        for stream in streams:
            next(stream)
        deadline = time.monotonic() + 10
        while [load.running for load in serving.client.loads().replicas] != [2, 1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        loads = serving.client.loads().replicas
        assert [load.in_flight for load in loads] == [2, 1]
        assert [load.kv_usage for load in loads] == [0.25, 0.25]
        assert all(load.last_heard_s < 5 for load in loads)


def test_abort_finishes_the_stream():
    with serve(step_s=0.01) as serving:
        stream = serving.client.generate_stream(PROMPT, request_id="one", max_tokens=120)
        next(stream)
        assert call(serving, "Abort", pb.AbortRequest(request_id="one")).aborted
        assert list(stream)[-1].finish.reason == inference_pb2.FinishInfo.ABORT
        serving.leaders[0].wait_for("abort")
        assert not call(serving, "Abort", pb.AbortRequest(request_id="one")).aborted


def test_drain_waits_for_those_in_flight_and_admits_no_more():
    with serve(step_s=0.01) as serving:
        stream = serving.client.generate_stream(PROMPT, max_tokens=60)
        next(stream)
        answers = []
        draining = threading.Thread(
            target=lambda: answers.append(call(serving, "Drain", pb.DrainRequest(timeout_s=10)))
        )
        draining.start()
        while not serving.client.server_info().draining:
            time.sleep(0.005)
        with pytest.raises(ClientError, match="draining") as caught:
            serving.client.generate(PROMPT)
        assert caught.value.code == "UNAVAILABLE"
        assert len([i for chunk in stream for i in chunk.token_ids]) == 60
        draining.join(10)
        assert answers == [pb.DrainResponse(num_cut_off=0)]


def test_drain_cuts_off_what_takes_too_long():
    with serve() as serving:
        serving.leaders[0].held.set()
        stream = serving.client.generate_stream(PROMPT)
        next(stream)
        answer = call(serving, "Drain", pb.DrainRequest(timeout_s=0.1))
        assert answer.num_cut_off == 1
        with pytest.raises(ClientError, match=r"shutting down and waited 0\.1 s") as caught:
            next(stream)
        assert caught.value.code == "UNAVAILABLE"
        serving.leaders[0].wait_for("abort")


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf")])
def test_bad_drain_timeout(timeout_s):
    with serve() as serving:
        with pytest.raises(grpc.RpcError, match="timeout_s") as caught:
            call(serving, "Drain", pb.DrainRequest(timeout_s=timeout_s))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert not serving.gateway.draining


def test_admin_token(tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text("sesame\n")
    token_file.chmod(0o600)
    with serve(f"server.admin_token_file={token_file}") as serving:
        request = pb.AbortRequest(request_id="none")
        for sent in ((), [("authorization", "Bearer wrong")], [("authorization", "sesame")]):
            with pytest.raises(grpc.RpcError) as caught:
                call(serving, "Abort", request, sent)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert not call(serving, "Abort", request, [("authorization", "Bearer sesame")]).aborted
        assert serving.client.server_info().model == "tiny"


def test_without_token_admin_calls_are_for_loopback():
    class Elsewhere:
        def peer(self):
            return "ipv4:10.0.0.7:5555"

        def invocation_metadata(self):
            return ()

    with serve() as serving:
        servicer = ControlServicer(serving.gateway)
        with pytest.raises(RequestError, match=r"PERMISSION_DENIED.*admin_token_file"):
            servicer._check_admin(Elsewhere())
