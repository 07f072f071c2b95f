"""Convert exceptions to error bodies with a message of one line.

They are OpenAI's {"error": {"message", "type", "param", "code"}}, except on the routes of other APIs.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from octavo.errors import (
    EngineDead,
    InvalidRequest,
    ModelBusy,
    OctavoError,
    PromptTooLong,
    QueueFull,
    QuotaExceeded,
    RequestFailed,
    RequestTimeout,
    UnknownModel,
)

from .openai.replies import ErrorBody, ErrorReply, Json

MAX_MESSAGE = 400  # characters in a message; an error may quote megabytes that the client sent
MAX_DETAILS = 1000  # errors in a body that are described; each description takes pydantic microseconds
ANTHROPIC, OLLAMA = "/v1/messages", "/api/"  # prefixes of the paths whose errors have these APIs' form
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
MIN_HINTED = 5  # letters in a name that gets a hint; shorter names resemble too many others


class AnthropicErrorBody(TypedDict):
    """What was wrong, in Anthropic's API."""

    type: str
    message: str


class AnthropicError(TypedDict):
    """The body of an error in Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorBody


class OllamaError(TypedDict):
    """The body of an error in Ollama's API."""

    error: str


class ApiError(Exception):
    """A request refused with an HTTP status.

    Args:
        param: the name of the field at fault.
        code: identifies the kind of error for programs.
        headers: further header fields of the response.
        kind: the type of the error in OpenAI's API; by default, it follows from the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        kind: str | None = None,
    ):
        super().__init__(message)
        self.kind = kind
        self.headers = headers
        self.status = status
        self.param = param
        self.code = code


class ServerStopping(ApiError):
    """A request that did not finish within the drain timeout of a server that shuts down."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down", code="server_stopping")


def error_reply(error: Exception) -> tuple[int, ErrorReply]:
    """Return the HTTP status and body for any exception. An unexpected exception becomes a 500 without details."""
    match error:
        case ApiError():
            return error.status, _reply(error.status, str(error), error.param, error.code, error.kind)
        case PromptTooLong():
            return 400, _reply(400, str(error), error.param, "context_length_exceeded")
        case UnknownModel():
            return 404, _reply(404, str(error), error.param, "model_not_found")
        case InvalidRequest():
            return 400, _reply(400, str(error), error.param, None)
        case ModelBusy():
            return 409, _reply(409, str(error), None, "model_busy")
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
    """Return the header fields for `error`: whether, and after how many seconds, a client should retry."""
    match error:
        case QueueFull():
            return {"retry-after": str(error.retry_after)}
        case ApiError() if error.headers or error.status != 503:
            return error.headers
        case ApiError():
            return {"retry-after": "1"}
        case RequestTimeout():
            # OpenAI's clients retry after any status of 500 or more unless this header forbids it. A retry of a request
            # that timed out would again take time from other requests. (Browsers retry after status 408, too.)
            return {"x-should-retry": "false"}
        case HTTPException():
            return error.headers
        case _:
            return None


def error_body(error: Exception, path: str) -> tuple[int, Any]:
    """Return the HTTP status and body for any exception, in the form of the API that `path` belongs to."""
    status, reply = error_reply(error)
    if path.startswith(ANTHROPIC):
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return status, {"type": "error", "error": {"type": kind, "message": reply.error.message}}
    if path.startswith(OLLAMA):
        return status, {"error": reply.error.message}
    return status, reply


def error_type(path: str) -> type:
    """Return the type of the bodies of errors in the API that `path` belongs to."""
    if path.startswith(ANTHROPIC):
        return AnthropicError
    return OllamaError if path.startswith(OLLAMA) else ErrorReply


def error_response(error: Exception, path: str) -> Json:
    """Return the HTTP response for any exception, in the form of the API that `path` belongs to."""
    status, body = error_body(error, path)
    return Json(body, status, error_headers(error))


def is_expected(error: Exception) -> bool:
    """Return whether `error` was raised on purpose for the client. Any other error is a bug and must be logged."""
    return isinstance(error, (ApiError, OctavoError, HTTPException))


def invalid_body(error: ValidationError) -> ApiError:
    """Convert the first error in a body to one line with the field's path."""
    if error.error_count() > MAX_DETAILS:
        return ApiError(400, f"the body has {error.error_count()} wrong values", code="invalid_body")
    first = error.errors(include_url=False, include_input=False)[0]
    path = _path(first)
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing", path)
    if first["type"] == "too_short" and first["ctx"]["min_length"] == 1:
        return ApiError(400, f"{path} should not be empty", path)
    return ApiError(400, f"{path or 'the body'} {_in_json_terms(first['msg'])}", path or None)


def unknown_field(path: str, name: str, known: Iterable[str]) -> ApiError:
    """Return the error for an unknown field `name` at `path`, with a hint if it is a misspelling of one in `known`."""
    near = misspelt(name, known)
    hint = f"; did you mean {near}?" if near else ""
    return ApiError(400, f"unknown field {path[:100]}{hint}", path[:100], "unknown_field")


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` of which `name` is a misspelling, or None.

    A misspelling has one or two letters left out, doubled or swapped. Names with different meanings, such as
    length_penalty and presence_penalty, top_a and top_p, or min_tokens and max_tokens, differ by more.
    """
    if not MIN_HINTED <= len(name) <= 40:
        return None
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.88)
    return near[0] if len(near) == 1 else None


def _reply(status: int, message: str, param: str | None, code: str | None, kind: str | None = None) -> ErrorReply:
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    line = " ".join(message.split())
    line = line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"
    return ErrorReply(ErrorBody(line, kind, param, code))


def _in_json_terms(message: str) -> str:
    """Translate "Input should be a valid dictionary or instance of Message" to "should be an object", for example."""
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "an object", message.removeprefix("Input "))
    return message.replace("a valid list", "an array")


def _path(error: ErrorDetails) -> str:
    """Return the path of an error's field, such as messages[0].content for ("messages", 0, "content")."""
    path = ""
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
