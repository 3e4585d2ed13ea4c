"""How errors look over HTTP: a status and OpenAI's body."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cluster.server.errors import Code, RequestError

STATUS = {
    Code.INVALID_ARGUMENT: 400,
    Code.OUT_OF_RANGE: 400,
    Code.FAILED_PRECONDITION: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.CANCELLED: 499,
    Code.UNIMPLEMENTED: 501,
    Code.ABORTED: 503,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_FIELD = re.compile(r"([a-z][a-z_]*)(?:\[\d+\])*(?: =| must| needs|:)")
"""Our messages about a value begin with the name of its field."""
_OUR_NAMES = {"text": "prompt", "token_ids": "prompt"}
_UNIONS = re.compile(r"\W|^(str|int|list|dict|none)$")
_MAX_MESSAGE_CHARS = 2000

logger = logging.getLogger(__name__)


class ReaderLeftError(Exception):
    """The client has closed the connection: nobody waits for the answer any more."""


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = message[:_MAX_MESSAGE_CHARS]
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: RequestError) -> dict[str, Any]:
    found = _FIELD.match(error.message) if error.code is Code.INVALID_ARGUMENT else None
    param = _OUR_NAMES.get(found[1], found[1]) if found else None
    return error_body(status_of(error), error.message, error.code.lower(), param)


def response_of(error: RequestError) -> JSONResponse:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.code is Code.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error), status_of(error), headers)


def status_of(error: RequestError) -> int:
    return STATUS.get(error.code, 500)


def respond_with_errors(app: FastAPI) -> None:
    """Whatever a route raises ends this one request with a status and the body above."""

    @app.exception_handler(RequestError)
    async def ours(request: Request, error: RequestError) -> JSONResponse:
        return response_of(error)

    @app.exception_handler(ReaderLeftError)
    async def nobody(request: Request, error: ReaderLeftError) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
        # Pages of other sites can send forms to a server on loopback, but no JSON without asking first.
        if not request.headers.get("content-type", "").startswith("application/json"):
            message = "the body must be JSON: send it with `content-type: application/json`"
            return JSONResponse(error_body(415, message, "invalid_argument"), 415)
        message, param = describe(error.errors())
        return JSONResponse(error_body(400, message, "invalid_argument", param), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        headers: Mapping[str, str] | None = error.headers
        message = error.detail
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path:.200} here"
        return JSONResponse(error_body(error.status_code, message), error.status_code, headers)

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> JSONResponse:
        about = {"request_id": getattr(request.state, "request_id", None)}
        logger.error("a request failed for a reason that is our own", exc_info=error, extra=about)
        return JSONResponse(body_of(INTERNAL), 500)


INTERNAL = RequestError(Code.INTERNAL, "internal error; see server log")


def describe(errors: Sequence[Any]) -> tuple[str, str | None]:
    """One line for the first of pydantic's errors, and the field that it is about."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} (at {error['loc'][-1]})", None
    # Where a field takes several types there is an error for each; they say what it takes.
    place = [str(part) for part in error["loc"] if part != "body"]
    names = [part for part in place if not _UNIONS.search(part)]
    if not names:
        return "the body must be a JSON object", None
    name = ".".join(names)
    if error["type"] == "extra_forbidden":
        return f"{name}: there is no such field", names[0]
    if error["type"] == "missing":
        return f"{name}: this field is required", names[0]
    same = [e["msg"] for e in errors if [str(p) for p in e["loc"]][1:2] == place[:1]]
    reason = "; or ".join(dict.fromkeys(same)) if len(place) > len(names) else error["msg"]
    return f"{name} = {_shown(error.get('input'))}: {reason}", names[0]


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:100]
