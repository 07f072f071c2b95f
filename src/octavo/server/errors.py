"""Every failure as OpenAI's {"error": {"message", "type", "param", "code"}}, with a message of one line."""

import difflib
import re
from collections.abc import Iterable, Mapping

from pydantic import ValidationError
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

MAX_MESSAGE = 400  # characters: an error may quote what the client sent, and that may be megabytes
MAX_DETAILS = 1000  # errors in a body: each takes pydantic microseconds to describe, and a body may hold many
MIN_HINTED = 5  # letters: shorter names are near to too many others


class ApiError(Exception):
    """A request refused with an HTTP status.

    Args:
        param: the field at fault.
        code: for programs to tell errors apart.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class ServerStopping(ApiError):
    """The server is shutting down and the time for running requests is over."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down", code="server_stopping")


def error_reply(error: Exception) -> tuple[int, ErrorReply]:
    """Return HTTP status and body for any exception; 500 without details for one that is a bug."""
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
    """Return the header fields that tell programs what to do about `error`."""
    match error:
        case QueueFull():
            return {"retry-after": str(error.retry_after)}
        case ApiError() if error.status == 503:
            return {"retry-after": "1"}
        case RequestTimeout():
            # OpenAI's clients repeat a request after any status from 500 on, unless this header forbids it. A request
            # that took too long would only take time from others again. (408 would not help: browsers repeat it.)
            return {"x-should-retry": "false"}
        case HTTPException():
            return error.headers
        case _:
            return None


def error_response(error: Exception) -> Json:
    """Return the HTTP response for any exception."""
    status, body = error_reply(error)
    return Json(body, status, error_headers(error))


def is_expected(error: Exception) -> bool:
    """Return whether `error` was raised on purpose, for a client to read. Any other is a bug and belongs in the log."""
    return isinstance(error, (ApiError, OctavoError, HTTPException))


def invalid_body(error: ValidationError) -> ApiError:
    """Return the first thing wrong with a body, as one line with the field's path."""
    if error.error_count() > MAX_DETAILS:
        return ApiError(400, f"the body has {error.error_count()} wrong values", code="invalid_body")
    first = error.errors(include_url=False, include_input=False)[0]
    path = _path(first)
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing", path)
    return ApiError(400, f"{path or 'the body'} {_in_json_terms(first['msg'])}", path or None)


def unknown_field(path: str, name: str, known: Iterable[str]) -> ApiError:
    """Return the error for an unknown field `name` at `path`, with a hint if it is one of `known` misspelt."""
    near = misspelt(name, known)
    hint = f"; did you mean {near}?" if near else ""
    return ApiError(400, f"unknown field {path[:100]}{hint}", path[:100], "unknown_field")


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """Return the one name of `known` that `name` is a slip of, or None.

    A slip is a letter or two left out, doubled or swapped: names of other meanings, such as length_penalty beside
    presence_penalty, top_a beside top_p or min_tokens beside max_tokens, are further from each other than that.
    """
    if not MIN_HINTED <= len(name) <= 40:
        return None
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.88)
    return near[0] if len(near) == 1 else None


def _reply(status: int, message: str, param: str | None, code: str | None) -> ErrorReply:
    kind = "invalid_request_error" if status < 500 else "server_error"
    line = " ".join(message.split())
    line = line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"
    return ErrorReply(ErrorBody(line, kind, param, code))


def _in_json_terms(message: str) -> str:
    """Input should be a valid dictionary or instance of Message -> should be an object"""
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "an object", message.removeprefix("Input "))
    return message.replace("a valid list", "an array")


def _path(error: ErrorDetails) -> str:
    """("messages", 0, "content") -> messages[0].content"""
    path = ""
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
