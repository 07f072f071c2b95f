"""Routes of Ollama's API about models: which there are and which are loaded. /v1/admin/models changes them."""

from datetime import UTC, datetime
from functools import partial
from typing import Any, TypedDict

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from octavo.fleet.model import Model
from octavo.server.api import Api
from octavo.server.edge.dispatch import route
from octavo.server.errors import ApiError, OllamaError
from octavo.server.openai.answers import reasoning_parser
from octavo.server.openai.replies import Json
from octavo.server.openapi.operation import MODEL, Operation
from octavo.text.infilling import marks_of
from octavo.version import __version__

NEVER = "9999-12-31T23:59:59Z"  # when a loaded model expires
REFUSED = (("POST", "pull"), ("POST", "push"), ("POST", "create"), ("POST", "copy"), ("DELETE", "delete"))


class Models(TypedDict):
    """Models, in Ollama's form."""

    models: list[dict[str, Any]]


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""

    def described(summary: str, **more: Any) -> Operation:
        return Operation(tag="Ollama", summary=summary, **more)

    text = described("Show that the server runs.", reply={"type": "string"}, media_type="text/plain")
    named = {"type": "object", "properties": {"model": {"type": "string"}}, "required": ["model"]}
    properties = described("Describe a model.", body=named, example={"model": MODEL}, reply=dict[str, Any])
    refused = described("Refused, since models are named at the server's start.", status=501, reply=OllamaError)
    return [
        *([] if api.config.page else [route("GET", "/", running, text)]),
        route("GET", "/api/version", version, described("Return the server's version.", reply=dict[str, str])),
        route("GET", "/api/tags", partial(tags, api), described("List the models.", reply=Models)),
        route("GET", "/api/ps", partial(loaded, api), described("List the loaded models.", reply=Models)),
        route("POST", "/api/show", partial(show, api), properties),
        *(route(method, f"/api/{name}", partial(refuse, name), refused) for method, name in REFUSED),
    ]


async def running(_: Request) -> Response:
    """Answer that there is a server, as Ollama does at /."""
    return PlainTextResponse("Octavo is running")


async def version(_: Request) -> Response:
    """Answer with the version of Octavo."""
    return Json({"version": __version__})


async def tags(api: Api, _: Request) -> Response:
    """Answer with all names that requests may use, except those of splits."""
    models = [_entry(api, name, model) for name, model in api.fleet.names().items() if model is not None]
    return Json({"models": models})


async def loaded(api: Api, _: Request) -> Response:
    """Answer with the models that are loaded."""
    models = [
        _entry(api, model.name, model)
        | {"expires_at": NEVER, "size_vram": 0, "context_length": model.llm.info.max_model_len}
        for model in api.fleet.models
        if model.state == "loaded"
    ]
    return Json({"models": models})


async def show(api: Api, request: Request) -> Response:
    """Answer with the properties of a model. Raises ApiError, UnknownModel."""
    body = await api.bodies.read_json(request)
    name = (body.get("model") or body.get("name")) if isinstance(body, dict) else None
    if not isinstance(name, str):
        raise ApiError(400, "the body must be an object with the name of a model", "model")
    model = api.fleet.known(api.fleet.resolve(known_name(api, name)))
    info: dict[str, Any] = {"general.architecture": "octavo", "general.basename": model.name}
    if model.was_loaded:
        info["octavo.context_length"] = model.llm.info.max_model_len
    entry = _entry(api, name, model)
    return Json(
        {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": entry["details"],
            "model_info": info,
            "modified_at": entry["modified_at"],
            "capabilities": _capabilities(model),
        }
    )


async def refuse(name: str, _: Request) -> Response:
    """Refuse a change of the models. Raises ApiError 501."""
    message = f"/api/{name} is not supported: models are named at the server's start, or changed by /v1/admin/models"
    raise ApiError(501, message, code="not_supported")


def _capabilities(model: Model) -> list[str]:
    """Return what a model can do, as far as it is known: those of its tokenizer only when it has been loaded."""
    capabilities = ["completion", "tools", "embedding"]
    if model.was_loaded and reasoning_parser(model.llm):
        capabilities.append("thinking")
    if model.was_loaded and marks_of(model.llm.tokenizer):
        capabilities.append("insert")
    return capabilities


def known_name(api: Api, name: str) -> str:
    """Return a model's name without the tag ":latest", unless it is part of the name."""
    return name if name in api.fleet.names() else name.removesuffix(":latest")


def _entry(api: Api, name: str, model: Model) -> dict[str, Any]:
    kind = "gguf" if model.spec.config.model.endswith(".gguf") else "safetensors"
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(api.started, UTC).isoformat().replace("+00:00", "Z"),
        "size": model.size,
        "digest": model.llm.info.fingerprint if model.was_loaded else "",
        "details": {
            "parent_model": "" if name == model.name else model.name,
            "format": kind,
            "family": "",
            "families": [],
            "parameter_size": "",
            "quantization_level": model.spec.config.quantization,
        },
    }
