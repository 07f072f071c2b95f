"""Reading a request's body: bounded while it arrives, then straight from bytes into its model."""

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from octavo.server.errors import CLIENT_LEFT, ApiError, invalid_body

MAX_BODY = 16 * 2**20  # bytes

Model = TypeVar("Model", bound=BaseModel)


async def read_json(request: Request, model: type[Model]) -> Model:
    """The body as a `model`. Raises ApiError: 413 too large, 415 not declared as JSON, 400 invalid.

    pydantic parses the bytes itself: bounded depth, no lone surrogates, no invalid UTF-8, unlike json.loads.
    """
    # A web page can make a browser post text/plain to localhost, but not application/json.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the header Content-Type: application/json", code="unsupported_media_type")
    body = await _read(request)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error, model) from None


async def _read(request: Request) -> bytearray:
    too_large = ApiError(413, f"the body is larger than {MAX_BODY >> 20} MiB", code="body_too_large")
    if int(request.headers.get("content-length", "0")) > MAX_BODY:  # digits: the HTTP parser has seen to that
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise too_large
    except ClientDisconnect:
        raise ApiError(CLIENT_LEFT, "the client left before its whole body had come") from None
    return body
