"""The OpenAPI document (https://spec.openapis.org/oas/v3.1.1.html) of a list of routes."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from octavo.server.edge.dispatch import Endpoint
from octavo.server.errors import error_type
from octavo.version import __version__

from .operation import MODEL, Operation

Schema = dict[str, Any]

_REFERENCE = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"{(\w+)(:path)?}")
_DESCRIPTION = "An LLM server with the APIs of OpenAI, vLLM, Anthropic and Ollama."


def document(routes: Iterable[Route], model: str) -> dict[str, Any]:
    """Return the OpenAPI document of `routes`.

    Args:
        model: the name that examples give for a model.
    """
    described = [(route, operation_of(route)) for route in routes]
    errors = {route.path: error_type(route.path) for route, _ in described}
    schemas = _Schemas([kind for _, operation in described for kind in operation.types] + list(errors.values()))
    paths: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for route, operation in described:
        path = _PARAMETER.sub(r"{\1}", route.path)
        method = method_of(route).lower()
        paths[path][method] = _operation(route, operation, schemas, schemas.of(errors[route.path]), model)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": __version__, "description": _DESCRIPTION},
        "paths": dict(paths),
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"admin_key": {"type": "http", "scheme": "bearer"}},
        },
    }


def operation_of(route: Route) -> Operation:
    """Return the operation that was declared with a route."""
    assert isinstance(route.endpoint, Endpoint)
    return route.endpoint.operation


def method_of(route: Route) -> str:
    """Return the method of a route. One for GET answers HEAD too, which is left out."""
    [method] = (route.methods or set()) - {"HEAD"}
    return method


def _operation(route: Route, operation: Operation, schemas: "_Schemas", error: Schema, model: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method_of(route).lower()}{route.path}").strip("_"),
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name, _ in _PARAMETER.findall(route.path)
        ]
        + [
            {"name": name, "in": "query", "required": False, "schema": msgspec.json.schema(kind)}
            for name, kind in operation.query.items()
        ],
        "responses": _responses(operation, schemas, error),
    }
    if operation.body is not None:
        content = {"schema": schemas.of(operation.body)}
        if operation.example is not None:
            content["example"] = _with_model(operation.example, model)
        media_type = "multipart/form-data" if operation.form else "application/json"
        described["requestBody"] = {"required": True, "content": {media_type: content}}
    if operation.needs_key:
        described["security"] = [{"admin_key": []}]
    return described


def _responses(operation: Operation, schemas: "_Schemas", error: Schema) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.reply is not None:
        content[operation.media_type] = {"schema": schemas.of(operation.reply)}
    if operation.events is not None:
        event = schemas.of(operation.events)
        is_sse = operation.events_type == "text/event-stream"
        content[operation.events_type] = {"schema": _server_sent(event) if is_sse else event}
    answer: dict[str, Any] = {"description": "The answer."} | ({"content": content} if content else {})
    failure = {"description": "An error.", "content": {"application/json": {"schema": error}}}
    return {str(operation.status): answer, "default": failure}


def _server_sent(event: Schema) -> Schema:
    """Return the schema of one of a stream's server-sent events, as OpenAPI 3.2 describes them."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": event}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _with_model(example: Any, model: str) -> Any:
    """Return an example with `model` in place of MODEL."""
    if isinstance(example, dict):
        return {name: _with_model(value, model) for name, value in example.items()}
    return model if example == MODEL else example


class _Schemas:
    """The JSON schemas of types. The named ones among them are in `components`, to which all others refer."""

    def __init__(self, kinds: list[Any]):
        models = [kind for kind in kinds if _is_model(kind)]
        others = [kind for kind in kinds if not _is_model(kind) and not isinstance(kind, Mapping)]
        of_models, definitions = models_json_schema(
            [(model, "validation") for model in dict.fromkeys(models)],
            ref_template=_REFERENCE.replace("{name}", "{model}"),
        )
        of_others, components = msgspec.json.schema_components(others, ref_template=_REFERENCE)
        self.components: Schema = definitions.get("$defs", {}) | components
        self._of: dict[Any, Schema] = {model: schema for (model, _), schema in of_models.items()}
        self._of |= zip(others, of_others, strict=True)

    def of(self, kind: Any) -> Schema:
        """Return the schema of a type, or `kind` if it is a schema already."""
        return dict(kind) if isinstance(kind, Mapping) else self._of[kind]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
