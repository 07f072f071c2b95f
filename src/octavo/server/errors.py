"""Every failure as OpenAI's {"error": {"message", "type", "param", "code"}}, its message one line."""

import difflib
from collections.abc import Mapping

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from octavo.errors import (
    EngineDead,
    InvalidRequest,
    OctavoError,
    PromptTooLong,
    QueueFull,
    QuotaExceeded,
    RequestFailed,
    RequestTimeout,
)

from .openai.replies import ErrorBody, ErrorReply, Json

CLIENT_LEFT = 499  # nginx's status for it; nobody is there to read it
MAX_MESSAGE = 400  # characters: an error may quote what the client sent, and that may be megabytes
MAX_DETAILS = 1000  # errors in a body: pydantic takes microseconds to tell each, and a body may hold millions


class ApiError(Exception):
    """A request refused with an HTTP status. `param` names the field at fault; `code` is for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class ServerStopping(ApiError):
    """The server ends, and its patience for running requests with it."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down", code="server_stopping")


def error_reply(error: Exception) -> tuple[int, ErrorReply]:
    """HTTP status and body for any exception; one that nobody expected is told as 500, without details."""
    match error:
        case ApiError():
            return error.status, _reply(error.status, str(error), error.param, error.code)
        case PromptTooLong():
            return 400, _reply(400, str(error), error.param, "context_length_exceeded")
        case InvalidRequest():
            return 400, _reply(400, str(error), error.param, None)
        case QuotaExceeded():
            return 429, _reply(429, str(error), None, "kv_state_quota_exceeded")
        case QueueFull():
            return 503, _reply(503, str(error), None, "queue_full")
        case RequestTimeout():
            return 504, _reply(504, str(error), None, "request_timeout")
        case EngineDead():
            return 503, _reply(503, str(error), None, "engine_dead")
        case RequestFailed():
            return 500, _reply(500, str(error), None, "request_failed")
        case HTTPException():
            return error.status_code, _reply(error.status_code, error.detail, None, None)
        case _:
            return 500, _reply(500, "internal error: the server's log has the details", None, "internal_error")


def error_headers(error: Exception) -> Mapping[str, str] | None:
    """What programs go by beside the status."""
    match error:
        case QueueFull():
            return {"retry-after": str(error.retry_after)}
        case RequestTimeout():
            # OpenAI's clients repeat a request after any status from 500 on, unless this header says not to. One that
            # took too long would only take room from others again, and its user has waited as long as he wanted to.
            # (408 would suit no better: it blames the client for sending slowly, and browsers repeat it unasked.)
            return {"x-should-retry": "false"}
        case HTTPException():
            return error.headers
        case _:
            return None


def expected(error: Exception) -> bool:
    """Whether it was raised on purpose, for a client to read: any other is a bug, and belongs into the log."""
    return isinstance(error, (ApiError, OctavoError, HTTPException))


def invalid_body(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first thing wrong with a body, as one line with the field's path."""
    if error.error_count() > MAX_DETAILS:
        return ApiError(400, f"the body has {error.error_count()} unknown fields or wrong values", code="invalid_body")
    first = error.errors(include_url=False, include_input=False)[0]
    path = _path(first)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, model.model_fields, n=1) if len(path) < 40 else []
        hint = f"; did you mean {near[0]}?" if near else ""
        return ApiError(400, f"unknown field {path[:100]}{hint}", path[:100], "unknown_field")
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing", path)
    # pydantic's messages begin "Input should be ...": the path takes the place of "Input".
    return ApiError(400, f"{path or 'the body'} {first['msg'].removeprefix('Input ')}", path or None)


def install(app: FastAPI) -> None:
    """Answer all errors of `app` in OpenAI's schema."""

    async def answer(request: Request, error: Exception) -> Json:
        status, body = error_reply(error)
        if isinstance(error, HTTPException):  # from the router: 404 or 405, which has a header with what is allowed
            route = f"{request.method} {request.scope['path']}"
            body = _reply(status, f"{error.detail}: {route}", None, None)
        return Json(body, status, error_headers(error))

    for kind in (ApiError, OctavoError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _reply(status: int, message: str, param: str | None, code: str | None) -> ErrorReply:
    kind = "invalid_request_error" if status < 500 else "server_error"
    line = " ".join(message.split())
    line = line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"
    return ErrorReply(ErrorBody(line, kind, param, code))


def _path(error: ErrorDetails) -> str:
    """messages[0].content, for ("messages", 0, "content")."""
    path = ""
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
