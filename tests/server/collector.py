"""A collector of traces that speaks OTLP over gRPC, in this process, and calls that are part of a trace."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

from cluster.server.client import build_request
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc


class Collector(pb_grpc.TraceServiceServicer):
    """`spans` by name, of every export so far; `resources` are the attributes of who sent them."""

    def __init__(self):
        self.spans = []
        self.resources = []
        self._lock = threading.Lock()

    def Export(self, request, context):
        with self._lock:
            for resource in request.resource_spans:
                self.resources.append(attributes(resource.resource))
                for scope in resource.scope_spans:
                    self.spans += scope.spans
        return pb.ExportTraceServiceResponse()

    def wait_for(self, count, timeout_s=20.0):
        deadline = time.monotonic() + timeout_s
        while len(self.spans) < count:
            assert time.monotonic() < deadline, f"{len(self.spans)} of {count} spans"
            time.sleep(0.01)
        return list(self.spans)


def attributes(message):
    """Of a span or a resource, as plain values."""

    def plain(value):
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(each) for each in value.array_value.values]
        return getattr(value, kind)

    return {each.key: plain(each.value) for each in message.attributes}


@contextmanager
def collecting():
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


def generate_in_trace(serving, traceparent, prompt=(5, 6), **options):
    """The answer to a call whose metadata carries a W3C trace context."""
    with grpc.insecure_channel(serving.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        return stub.Generate(
            build_request(list(prompt), **options),
            metadata=(("traceparent", traceparent),),
            timeout=20,
        )
