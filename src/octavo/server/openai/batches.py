"""The routes of /v1/batches."""

from functools import partial
from typing import Any, Literal, TypedDict

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.batch.lines import URLS
from octavo.server.batch.service import BatchService
from octavo.server.config import ServerConfig
from octavo.server.edge.access_log import RequestRecord
from octavo.server.edge.body import BodyReader
from octavo.server.edge.dispatch import route
from octavo.server.errors import ApiError
from octavo.server.openapi.operation import Operation

from .files import PAGE_QUERY, bound, found, listed, tenant_in
from .protocol import TENANT_QUERY
from .replies import Json

PATH = "/v1/batches"
FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")
DEFAULT_PAGE = 20
MAX_METADATA = (16, 64, 512)  # entries, characters in a key, characters in a value

_ENTRIES, _KEY, _VALUE = MAX_METADATA
BODY = {
    "type": "object",
    "properties": {
        "input_file_id": {"type": "string", "description": "A file with the purpose batch."},
        "endpoint": {"enum": list(URLS)},
        "completion_window": {"const": "24h"},
        "metadata": {
            "type": ["object", "null"],
            "maxProperties": _ENTRIES,
            "propertyNames": {"maxLength": _KEY},
            "additionalProperties": {"type": "string", "maxLength": _VALUE},
        },
    },
    "required": ["input_file_id", "endpoint", "completion_window"],
    "additionalProperties": False,
}
"""The schema of the body that creates a batch."""


class RequestCounts(TypedDict):
    """The requests of a batch."""

    total: int
    completed: int
    failed: int


class Batch(TypedDict):
    """The description of a batch. It also has the Unix time, in seconds, of each change of its status."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    """A page of batches."""

    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def routes(service: BatchService | None, config: ServerConfig, bodies: BodyReader) -> list[Route]:
    """Return the routes of this family. Without `service`, they answer 404."""

    def described(summary: str, **more: Any) -> Operation:
        return Operation(tag="OpenAI", summary=summary, **{"reply": Batch, "query": TENANT_QUERY, **more})

    example = {"input_file_id": "file-0", "endpoint": URLS[0], "completion_window": "24h"}
    created = described("Begin a batch of the requests in a file.", body=BODY, example=example)
    all_batches = described("List batches.", query=PAGE_QUERY, reply=BatchList)
    return [
        route("POST", PATH, bound(service, partial(create, config, bodies)), created),
        route("GET", PATH, bound(service, list_batches), all_batches),
        route("GET", f"{PATH}/{{id}}", bound(service, retrieve), described("Describe a batch.")),
        route("POST", f"{PATH}/{{id}}/cancel", bound(service, cancel), described("Cancel a batch.")),
    ]


async def create(config: ServerConfig, bodies: BodyReader, service: BatchService, request: Request) -> Response:
    """Begin a batch of the requests in a file. Raises ApiError."""
    body = await bodies.read_json(request)
    if not isinstance(body, dict):
        raise ApiError(400, "the body should be an object")
    for name in body:
        if name not in FIELDS and body[name] is not None:
            raise ApiError(400, f"unknown field {name[:100]}", name[:100], "unknown_field")
    if body.get("endpoint") not in URLS:
        raise ApiError(400, f"endpoint must be {' or '.join(URLS)}", "endpoint")
    if body.get("completion_window") != "24h":
        raise ApiError(400, "completion_window must be 24h", "completion_window")
    key = RequestRecord.of(request.scope).key
    if key is not None and (key.limits_tokens or key.max_new_tokens is not None or key.min_priority is not None):
        message = "this API key has a limit of tokens or of priority, so it cannot create batches, whose rows have none"
        raise ApiError(403, message, code="route_not_allowed")
    if key is not None and (key.models is not None or not key.allows_path(body["endpoint"])):
        message = "this API key is limited to some models or routes, so it cannot create batches, which may use others"
        raise ApiError(403, message, code="route_not_allowed")
    id = body.get("input_file_id")
    if not isinstance(id, str):
        raise ApiError(400, "input_file_id must be the id of a file", "input_file_id")
    file = await found(service, request, "file", id)
    if file["purpose"] != "batch":
        raise ApiError(400, f"the purpose of {id} is {file['purpose']}, not batch", "input_file_id")
    metadata = _metadata(body.get("metadata"))
    tenant = tenant_in(request)
    if service.unfinished(tenant) >= config.max_batches:
        message = f"{config.max_batches} batches have not ended, which is the limit (max_batches): wait, or cancel some"
        raise ApiError(429, message, code="too_many_batches")
    return Json(await service.create(tenant, file, body["endpoint"], metadata))


async def list_batches(service: BatchService, request: Request) -> Response:
    """Answer with a page of a tenant's batches. Raises ApiError."""
    return await listed(service, request, "batch", DEFAULT_PAGE)


async def retrieve(service: BatchService, request: Request) -> Response:
    """Answer with a batch. Raises ApiError 404."""
    batch = await found(service, request, "batch", request.path_params["id"])
    running = service.running.get(batch["id"])
    return Json(running.batch if running else batch)


async def cancel(service: BatchService, request: Request) -> Response:
    """Cancel a batch. Raises ApiError 404, or 409 if it has ended."""
    batch = await found(service, request, "batch", request.path_params["id"])
    running = service.running.get(batch["id"])
    if running is None:
        raise ApiError(409, f"the batch is {batch['status']} and cannot be cancelled", code="batch_ended")
    await service.cancel(batch["id"])
    return Json(running.batch)


def _metadata(given: Any) -> Any:
    entries, key_length, value_length = MAX_METADATA
    if given is None:
        return None
    if not isinstance(given, dict) or len(given) > entries:
        raise ApiError(400, f"metadata must be an object of at most {entries} entries", "metadata")
    for key, value in given.items():
        if not isinstance(value, str) or len(key) > key_length or len(value) > value_length:
            message = f"metadata must have keys of {key_length} and strings of {value_length} characters at most"
            raise ApiError(400, message, "metadata")
    return given
