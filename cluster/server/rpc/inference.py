"""The gRPC face of generation: messages in, the gateway's chunks out, errors as statuses."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from cluster.server.gateway import Gateway
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from cluster.server.rpc.inference_messages import Answer, chunk_message, read_chat, read_request
from cluster.server.rpc.status import statuses

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name

# A client without a deadline is reported as one that waits for centuries.
_FOREVER_S = 1e8

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(pb_grpc.InferenceServicer):
    """Unary and streamed answers come from the same chunks, so they are the same text."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(self, request: pb.GenerateRequest, context: _Context) -> pb.GenerateResponse:
        answer = Answer()
        async with statuses(context):
            asked = read_request(request, _deadline_s(context), _traceparent(context))
            async with aclosing(self._gateway.generate(asked)) as chunks:
                async for chunk in chunks:
                    answer.add(chunk)
        return answer.message()

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncIterator[pb.GenerateChunk]:
        async with statuses(context):
            asked = read_request(request, _deadline_s(context), _traceparent(context))
            async with aclosing(self._gateway.generate(asked)) as chunks:
                async for chunk in chunks:
                    yield chunk_message(chunk)

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        response = pb.TokenizeResponse()
        async with statuses(context):
            special = request.add_special_tokens or not request.HasField("add_special_tokens")
            model = request.model if request.HasField("model") else None
            is_chat = request.HasField("messages")
            prompt = read_chat(request.messages) if is_chat else request.text
            response.token_ids.extend(await self._gateway.tokenize(prompt, model, special))
        return response


def _deadline_s(context: _Context) -> float | None:
    left_s = context.time_remaining()
    return None if left_s is None or left_s > _FOREVER_S else left_s


def _traceparent(context: _Context) -> str | None:
    """As the client's tracing has it in the call's metadata (W3C trace context)."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str):
            return value
    return None
