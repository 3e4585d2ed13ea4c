"""A client without generated code: it learns services and messages from the server, as grpcurl does."""

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)


class ReflectionClient:
    """Requests and answers are plain dicts, with the field names of the .proto files."""

    def __init__(self, address, timeout_s=20.0):
        self._channel = grpc.insecure_channel(address)
        self._database = ProtoReflectionDescriptorDatabase(self._channel)
        self._pool = DescriptorPool(self._database)
        self._timeout_s = timeout_s

    def services(self):
        return set(self._database.get_services())

    def methods(self, service):
        return [method.name for method in self._pool.FindServiceByName(service).methods]

    def call(self, service, method, /, metadata=(), **fields):
        """The answer, or the list of answers where the method streams them."""
        descriptor = self._pool.FindServiceByName(service).methods_by_name[method]
        request = json_format.ParseDict(fields, GetMessageClass(descriptor.input_type)())
        kind = "unary_stream" if descriptor.server_streaming else "unary_unary"
        stub = getattr(self._channel, kind)(
            f"/{service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )
        answer = stub(request, timeout=self._timeout_s, metadata=metadata)
        if descriptor.server_streaming:
            return [_plain(message) for message in answer]
        return _plain(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._channel.close()


def _plain(message):
    return json_format.MessageToDict(message, preserving_proto_field_name=True)
