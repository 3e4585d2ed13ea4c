"""The standard health service and reflection, through their own stubs."""

import queue
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.server.serving import serve

INFERENCE = "expertmesh.v1.Inference"
CONTROL = "expertmesh.v1.Control"
Status = health_pb2.HealthCheckResponse


@pytest.fixture
def serving():
    with serve(ready=False) as serving:
        yield serving


@pytest.fixture
def stub(serving):
    with grpc.insecure_channel(serving.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def check(stub, service):
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


def watch(stub, service):
    """A queue of the statuses that a watcher is sent, and the call to cancel."""
    statuses = queue.Queue()
    call = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)

    def read():
        try:
            for answer in call:
                statuses.put(answer.status)
        except grpc.RpcError as error:
            statuses.put(error.code())

    threading.Thread(target=read, daemon=True).start()
    return statuses, call


def test_process_lives_before_services_are_ready(serving, stub):
    assert check(stub, "") == Status.SERVING
    assert check(stub, INFERENCE) == check(stub, CONTROL) == Status.NOT_SERVING
    serving.do(serving.gateway.set_ready, True)
    assert check(stub, INFERENCE) == check(stub, CONTROL) == Status.SERVING


def test_unknown_service(stub):
    with pytest.raises(grpc.RpcError, match="unknown service") as caught:
        check(stub, "nonsense")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    statuses, call = watch(stub, "nonsense")
    assert statuses.get(timeout=10) == Status.SERVICE_UNKNOWN
    call.cancel()


def test_watch_pushes_every_change_to_every_watcher(serving, stub):
    watchers = [watch(stub, INFERENCE) for _ in range(3)]
    for ready in (None, True, False, True):
        if ready is not None:
            serving.do(serving.gateway.set_ready, ready)
        expected = Status.SERVING if ready else Status.NOT_SERVING
        assert [statuses.get(timeout=10) for statuses, _ in watchers] == [expected] * 3
    assert all(statuses.empty() for statuses, _ in watchers)
    for statuses, call in watchers:
        call.cancel()
        assert statuses.get(timeout=10) == grpc.StatusCode.CANCELLED


def test_watch_sees_the_drain_and_the_failure(serving, stub):
    serving.do(serving.gateway.set_ready, True)
    statuses, _ = watch(stub, INFERENCE)
    assert statuses.get(timeout=10) == Status.SERVING
    serving.call(serving.gateway.drain(0.0))
    assert statuses.get(timeout=10) == Status.NOT_SERVING
    assert check(stub, "") == Status.SERVING
    serving.do(serving.gateway.set_ready, True)
    assert check(stub, INFERENCE) == Status.NOT_SERVING, "a draining server does not come back"


def test_failed_cluster_is_not_serving(serving, stub):
    serving.do(serving.gateway.set_ready, True)
    statuses, _ = watch(stub, INFERENCE)
    assert statuses.get(timeout=10) == Status.SERVING
    serving.do(serving.gateway.fail, "rank 1 died")
    assert statuses.get(timeout=10) == Status.NOT_SERVING


def test_list(stub):
    statuses = stub.List(health_pb2.HealthListRequest(), timeout=10).statuses
    assert {name: answer.status for name, answer in statuses.items()} == {
        "": Status.SERVING,
        INFERENCE: Status.NOT_SERVING,
        CONTROL: Status.NOT_SERVING,
    }


def test_reflection_lists_services_and_describes_them(serving):
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=INFERENCE),
    ]
    with grpc.insecure_channel(serving.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        services, file = stub.ServerReflectionInfo(iter(requests), timeout=10)
    names = {service.name for service in services.list_services_response.service}
    assert names == {
        INFERENCE,
        CONTROL,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    (descriptor,) = file.file_descriptor_response.file_descriptor_proto
    assert b"GenerateStream" in descriptor
