"""GET and POST /v1/admin/models: see and change the models of a running server, with the admin key."""

import hmac
from functools import partial
from typing import Any, Literal, TypedDict

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.errors import (
    ConfigError,
    DamagedWeights,
    EngineDead,
    ModelNotFound,
    OutOfMemory,
    UnsupportedModel,
)
from octavo.fleet.specs import model_spec

from .api import Api
from .edge.dispatch import route
from .errors import ApiError
from .openai.replies import Json
from .openapi.operation import MODEL, Operation
from .stats import ServerStats, server_stats

PATH = "/v1/admin/models"
WRONG_MODEL = (ConfigError, ModelNotFound, DamagedWeights, UnsupportedModel, OutOfMemory)


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /v1/admin/models.

    Attributes:
        name: the model's name in the API.
        model: for swap, and for load of a model that the server does not have: a directory, file, hub name or alias.
        settings: its further settings, as in a models file. A swap keeps the other settings of the old model.
        replicas: for scale: the number of engines.
    """

    action: Literal["load", "unload", "swap", "scale"]
    name: str
    model: str | None = None
    settings: dict[str, Any] = {}
    replicas: int | None = None


class Changed(TypedDict):
    """The state of a model after a change."""

    name: str
    state: str


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    listed = Operation(tag="Octavo", summary="Return statistics of all models.", reply=ServerStats, needs_key=True)
    changed = Operation(
        tag="Octavo",
        summary="Load, unload, swap or scale a model.",
        body=Change,
        example={"action": "load", "name": MODEL},
        reply=Changed,
        needs_key=True,
    )
    return [
        route("GET", PATH, partial(list_models, api), listed),
        route("POST", PATH, partial(change_models, api), changed),
    ]


async def list_models(api: Api, request: Request) -> Response:
    """Answer with the statistics of all models, as GET /stats does. Raises ApiError 401 or 403."""
    check_key(api.config.admin_key, request.headers)
    return Json(await server_stats(api.fleet))


async def change_models(api: Api, request: Request) -> Response:
    """Load, unload, swap or scale a model, and answer when that has ended. It goes on if the client disconnects.

    Raises ApiError: 400 for a model that cannot be loaded, 401 or 403 without the key, 404 for an unknown name, 409
        while another change of the model is under way, 503 if its engine fails.
    """
    check_key(api.config.admin_key, request.headers)
    content = await api.bodies.read_json(request)
    try:
        change = msgspec.convert(content, Change)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"the body is not valid: {error}") from None
    try:
        await _apply(api, change)
    except WRONG_MODEL as error:
        raise ApiError(400, str(error), code="model_not_loaded") from None
    except (EngineDead, OSError) as error:  # OSError: no process can be started
        raise ApiError(503, str(error), code="model_not_loaded") from None
    return Json({"name": change.name, "state": api.fleet.known(change.name).state})


async def _apply(api: Api, change: Change) -> None:
    given = change.settings | ({"model": change.model} if change.model else {})
    _refuse_unused(change)
    match change.action:
        case "load":
            await api.fleet.load(change.name, model_spec(change.name, given) if given else None)
        case "unload":
            await api.fleet.unload(change.name)
        case "swap":
            if "model" not in given:
                raise ApiError(400, "swap needs the model that replaces the one of this name", "model")
            inherited = api.fleet.known(change.name).spec.inherited()
            await api.fleet.swap(model_spec(change.name, given, inherited))
        case "scale":
            if change.replicas is None:
                raise ApiError(400, "scale needs the number of replicas", "replicas")
            await api.fleet.scale(change.name, change.replicas)


def _refuse_unused(change: Change) -> None:
    """Raise ApiError 400 if a change has a field that its action does not use."""
    unused = ["replicas"] if change.action in ("load", "swap") else ["model", "settings"]
    unused += ["replicas"] if change.action == "unload" else []
    for field in unused:
        if getattr(change, field) not in (None, {}):
            raise ApiError(400, f"{change.action} does not take {field}", field)


def check_key(key: str | None, headers: Headers) -> None:
    """Raise ApiError 403 if the server has no admin key, 401 unless the request has it as its bearer token."""
    if key is None:
        raise ApiError(403, "the admin routes are off: start the server with --admin-key", code="admin_disabled")
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), key.encode()):
        raise ApiError(401, "this route needs the header Authorization: Bearer with the server's admin key")
