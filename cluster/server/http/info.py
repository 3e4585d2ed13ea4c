"""Routes that tell of the server and its model, and tokenization.

`async` where they look at the gateway, which is used from its event loop only.
"""

import time
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from cluster.engine import checks
from cluster.server.errors import Code, RequestError
from cluster.server.gateway import Gateway
from cluster.server.http.models import DetokenizeBody, TokenizeBody
from cluster.server.http.requests import chat_of, model_and_preset
from cluster.server.observe.metrics import Metrics
from cluster.server.request import Chat
from cluster.server.validation import check_model

Json = dict[str, Any]


def open_routes(gateway: Gateway) -> APIRouter:
    """For probes, which have no token."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        """200 while requests are taken, else 503."""
        ready = gateway.readiness.ready
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @routes.get("/version")
    async def show_version() -> Json:
        return {"version": version("expertmesh")}

    return routes


def info_routes(gateway: Gateway, metrics: Metrics | None) -> APIRouter:
    routes = APIRouter()
    name = gateway.model.name
    created = int(time.time())
    served = [name, *(f"{name}:{preset}" for preset in gateway.presets)]

    @routes.get("/v1/models")
    async def models() -> Json:
        """The model, and each preset as a model of its own."""
        return {"object": "list", "data": [card(model) for model in served]}

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> Json:
        if model not in served:
            check_model(model, gateway.model)
        return card(model)

    @routes.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """For Prometheus."""
        if metrics is None:
            raise RequestError(Code.NOT_FOUND, "this server keeps no metrics")
        return Response(metrics.exposition(), media_type=metrics.content_type)

    def card(model: str) -> Json:
        return {
            "id": model,
            "object": "model",
            "created": created,
            "owned_by": "expertmesh",
            "root": name,
            "parent": None if model == name else name,
            "max_model_len": gateway.model.max_model_len,
        }

    return routes


def token_routes(gateway: Gateway) -> APIRouter:
    routes = APIRouter()
    name, most = gateway.model.name, gateway.model.max_model_len

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Json:
        """Token ids of a prompt, or of what the template makes of messages."""
        model, preset = model_and_preset(body.model, body.preset, name)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError(
                Code.INVALID_ARGUMENT, "prompt or messages: must have one of them, and only one"
            )
        text: str | Chat = body.prompt or ""
        if body.messages is not None:
            options = body.chat_template_kwargs
            text = chat_of(body.messages, preset, body.add_generation_prompt, options)
        token_ids = await gateway.tokenize(text, model, body.add_special_tokens is not False)
        return {
            "tokens": token_ids,
            "count": len(token_ids),
            "max_model_len": most,
        }

    @routes.post("/detokenize")
    def detokenize(body: DetokenizeBody) -> Json:
        """Text of token ids, special tokens included."""
        check_model(body.model, gateway.model)
        if gateway.tokenizer is None:
            raise RequestError(Code.FAILED_PRECONDITION, f"model {name!r} has no tokenizer")
        try:
            checks.token_ids("tokens", body.tokens, most, gateway.model.vocab_size - 1)
        except ValueError as error:
            raise RequestError(Code.INVALID_ARGUMENT, str(error)) from None
        return {"prompt": gateway.tokenizer.decode(body.tokens, skip_special_tokens=False)}

    return routes
