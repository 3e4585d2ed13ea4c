"""The gRPC face of generation: messages in, the gateway's chunks out, errors as statuses."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from cluster.server.gateway import Gateway
from cluster.server.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.server.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from cluster.server.request import Chunk, Finish, GenerationRequest, PromptInfo, Usage
from cluster.server.status import statuses

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name

_SCALARS = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "ignore_eos")
# A client without a deadline is reported as one that waits for centuries.
_FOREVER_S = 1e8

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(pb_grpc.InferenceServicer):
    """Unary and streamed answers come from the same chunks, so they are the same text."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(self, request: pb.GenerateRequest, context: _Context) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        texts: list[str] = []
        async with statuses(context):
            asked = _read(request, context.time_remaining())
            async with aclosing(self._gateway.generate(asked)) as chunks:
                async for chunk in chunks:
                    texts.append(chunk.text)
                    response.token_ids.extend(chunk.token_ids)
                    _write_facts(response, chunk)
        response.text = "".join(texts)
        return response

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncIterator[pb.GenerateChunk]:
        async with statuses(context):
            asked = _read(request, context.time_remaining())
            async with aclosing(self._gateway.generate(asked)) as chunks:
                async for chunk in chunks:
                    message = pb.GenerateChunk(text=chunk.text, token_ids=chunk.token_ids)
                    _write_facts(message, chunk)
                    yield message

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        response = pb.TokenizeResponse()
        async with statuses(context):
            special = request.add_special_tokens or not request.HasField("add_special_tokens")
            model = request.model if request.HasField("model") else None
            response.token_ids.extend(await self._gateway.tokenize(request.text, model, special))
        return response


def _read(request: pb.GenerateRequest, time_remaining_s: float | None) -> GenerationRequest:
    """The request as every front end says it; values are not judged here."""
    sent = request.sampling
    prompt = {None: None, "text": request.text, "token_ids": request.token_ids.ids}[
        request.WhichOneof("prompt")
    ]
    if time_remaining_s is not None and time_remaining_s > _FOREVER_S:
        time_remaining_s = None
    return GenerationRequest(
        prompt=prompt,
        request_id=_given(request, "request_id"),
        model=_given(request, "model"),
        replica=_given(request, "data_parallel_rank"),
        deadline_s=time_remaining_s,
        sampling={
            **{name: getattr(sent, name) for name in _SCALARS if sent.HasField(name)},
            "stop": sent.stop,
            "stop_token_ids": sent.stop_token_ids,
        },
    )


def _given(request: pb.GenerateRequest, field: Any) -> Any:
    return getattr(request, field) if request.HasField(field) else None


def _write_facts(message: pb.GenerateChunk | pb.GenerateResponse, chunk: Chunk) -> None:
    if chunk.prompt:
        message.prompt.CopyFrom(_prompt_message(chunk.prompt))
    if chunk.finish:
        message.finish.CopyFrom(_finish_message(chunk.finish))
    if chunk.usage:
        message.usage.CopyFrom(_usage_message(chunk.usage))


def _prompt_message(info: PromptInfo) -> pb.PromptInfo:
    return pb.PromptInfo(
        request_id=info.request_id,
        num_tokens=info.num_tokens,
        seed=info.seed,
        data_parallel_rank=info.replica,
        max_tokens=info.max_tokens,
    )


def _finish_message(finish: Finish) -> pb.FinishInfo:
    return pb.FinishInfo(
        reason=finish.reason.name,
        stop_token_id=finish.stop_token_id,
        eos_token_id=finish.eos_token_id,
        stop_string=finish.stop_string,
    )


def _usage_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        ttft_ms=usage.ttft_ms,
        total_ms=usage.total_ms,
    )
