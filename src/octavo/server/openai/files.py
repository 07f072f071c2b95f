"""The routes of /v1/files."""

import asyncio
import os
import shutil
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NoReturn, TypedDict, cast

from msgspec import Meta
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Message

from octavo.params import ServiceTerms
from octavo.server.batch.service import BatchService, file_object
from octavo.server.batch.store import MAX_PAGE, Content
from octavo.server.config import ServerConfig
from octavo.server.edge.access_log import CLIENT_LEFT
from octavo.server.edge.body import BodyReader
from octavo.server.edge.dispatch import route
from octavo.server.errors import ApiError
from octavo.server.openapi.operation import Operation

from .protocol import TENANT_QUERY, tenant_of
from .replies import Json

PATH = "/v1/files"
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MAX_FILENAME = 256
FORM_BYTES = 65_536  # of a form, besides the content of the file

Handler = Callable[[BatchService, Request], Awaitable[Response]]

PAGE_QUERY: dict[str, Any] = {
    "limit": Annotated[int, Meta(ge=1, le=MAX_PAGE, description="Maximum number of entries.")],
    "after": Annotated[str, Meta(description="The id of the last entry of the page before.")],
    "order": Annotated[Literal["asc", "desc"], Meta(description="By the time of creation.")],
    **TENANT_QUERY,
}
"""The query parameters of `listed`."""

FORM = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": list(PURPOSES)}},
    "required": ["file", "purpose"],
}
"""The schema of the form that uploads a file."""


class File(TypedDict):
    """The description of a file. Times are Unix times in seconds."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: None
    filename: str
    purpose: str
    status: Literal["processed"]


class FileList(TypedDict):
    """A page of files."""

    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(TypedDict):
    """The answer to DELETE."""

    id: str
    object: Literal["file"]
    deleted: bool


def routes(service: BatchService | None, config: ServerConfig, bodies: BodyReader) -> list[Route]:
    """Return the routes of this family. Without `service`, they answer 404."""

    def described(summary: str, **more: Any) -> Operation:
        return Operation(tag="OpenAI", summary=summary, **{"query": TENANT_QUERY, **more})

    example = {"file": "@rows.jsonl", "purpose": "batch"}
    created = described("Store a file.", body=FORM, form=True, example=example, reply=File)
    query = PAGE_QUERY | {"purpose": Annotated[str, Meta(description="Only files of this purpose.")]}
    listed = described("List files.", query=query, reply=FileList)
    binary = {"type": "string", "format": "binary"}
    contents = described("Return the content of a file.", reply=binary, media_type="application/octet-stream")
    return [
        route("POST", PATH, bound(service, partial(create, config)), created),
        route("GET", PATH, bound(service, list_files), listed),
        route("GET", f"{PATH}/{{id}}", bound(service, retrieve), described("Describe a file.", reply=File)),
        route("DELETE", f"{PATH}/{{id}}", bound(service, delete), described("Delete a file.", reply=DeletedFile)),
        route("GET", f"{PATH}/{{id}}/content", bound(service, content), contents),
    ]


def bound(service: BatchService | None, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler for `service`; without one, a handler that raises ApiError 404."""
    return partial(handler, service) if service else _unavailable


async def _unavailable(_: Request) -> NoReturn:
    raise ApiError(404, "files and batches need a server that was started with --data-dir", code="no_data_dir")


async def create(config: ServerConfig, service: BatchService, request: Request) -> Response:
    """Store the file of a form with the fields `file` and `purpose`. Raises ApiError."""
    tenant = tenant_in(request)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "send the file as multipart/form-data", code="unsupported_media_type")
    await _check_space(config, service, tenant, new=1)
    limited = Request(request.scope, _limited(request, config.max_file_bytes + FORM_BYTES))
    try:
        form = limited.form(max_files=1, max_fields=16, max_part_size=4096)
        async with form as fields:
            file, purpose = fields.get("file"), fields.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "the form has no file in its field file", "file")
            if purpose not in PURPOSES:
                raise ApiError(400, f"purpose must be one of {', '.join(PURPOSES)}", "purpose")
            id = f"file-{uuid.uuid4().hex}"
            size = await asyncio.to_thread(_save, file.file, service.store.files / id)
            made = file_object(id, size, (file.filename or "file")[:MAX_FILENAME], str(purpose))
    except ClientDisconnect:
        raise ApiError(CLIENT_LEFT, "the client left before its whole file had arrived") from None
    async with service.storing:
        try:
            await _check_space(config, service, tenant, made["bytes"])
        except ApiError:
            (service.store.files / id).unlink()
            raise
        await service.store.put(tenant, made)
    return Json(made)


async def list_files(service: BatchService, request: Request) -> Response:
    """Answer with a page of a tenant's files. Raises ApiError."""
    return await listed(service, request, "file", default=MAX_PAGE)


async def retrieve(service: BatchService, request: Request) -> Response:
    """Answer with the description of a file. Raises ApiError 404."""
    return Json(await found(service, request, "file", request.path_params["id"]))


async def delete(service: BatchService, request: Request) -> Response:
    """Delete a file. A batch that uses it goes on. Raises ApiError 404."""
    file = await found(service, request, "file", request.path_params["id"])
    await service.store.delete("file", tenant_in(request), file["id"])
    (service.store.files / file["id"]).unlink(missing_ok=True)
    return Json({"id": file["id"], "object": "file", "deleted": True})


async def content(service: BatchService, request: Request) -> Response:
    """Answer with the content of a file. Raises ApiError 404."""
    file = await found(service, request, "file", request.path_params["id"])
    return FileResponse(service.store.files / file["id"], media_type="application/octet-stream")


async def found(service: BatchService, request: Request, kind: str, id: str) -> Content:
    """Return an object of the request's tenant. Raises ApiError 404."""
    if (item := await service.store.find(kind, tenant_in(request), id)) is None:
        raise ApiError(404, f"there is no {kind} {id[:100]!r}", code=f"{kind}_not_found")
    return item


async def listed(service: BatchService, request: Request, kind: str, default: int) -> Response:
    """Answer with a page of the tenant's objects: the query's `limit`, `after`, `order` and `purpose`."""
    query = request.query_params
    limit, order = query.get("limit", str(default)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 6 and 1 <= int(limit) <= MAX_PAGE):
        raise ApiError(400, f"limit must be from 1 to {MAX_PAGE}", "limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, "order must be asc or desc", "order")
    items, has_more = await service.store.page(
        kind, tenant_in(request), int(limit), query.get("after"), order == "desc", query.get("purpose")
    )
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return Json({"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more})


def tenant_in(request: Request) -> str:
    """Return the tenant of a request. Raises InvalidRequest, ApiError."""
    tenant = tenant_of(request.headers, request.query_params.get("tenant"))
    ServiceTerms(tenant=tenant)  # checks it
    try:
        tenant.encode("latin-1")
    except UnicodeEncodeError:
        raise ApiError(400, "tenant must consist of characters of Latin-1", "tenant") from None
    return tenant


async def _check_space(config: ServerConfig, service: BatchService, tenant: str, new: int) -> None:
    """Raise ApiError 400 if another file, of `new` bytes, would exceed the tenant's limits."""
    count, size = await service.store.file_usage(tenant)
    if count >= config.max_files:
        message = f"there are {count} files, and the limit is {config.max_files} (max_files): delete some"
        raise ApiError(400, message, "file", "too_many_files")
    if size + new > config.max_stored_bytes:
        message = f"the files would have more than {config.max_stored_bytes} bytes (max_stored_bytes): delete some"
        raise ApiError(400, message, "file", "storage_limit_exceeded")


def _limited(request: Request, limit: int) -> Callable[[], Awaitable[Message]]:
    """Return `receive` of a request, which raises ApiError 413 after `limit` bytes."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise ApiError(413, f"the file is larger than {limit - FORM_BYTES} bytes (max_file_bytes)", "file")
        return message

    return receive


def _save(source: object, path: Path) -> int:
    with path.open("xb") as target:
        shutil.copyfileobj(cast(BinaryIO, source), target)
        target.flush()
        os.fsync(target.fileno())
        return target.tell()
