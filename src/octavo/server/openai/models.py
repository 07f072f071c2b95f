"""GET /v1/models and /v1/models/{name}."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.api import Api
from octavo.server.edge.dispatch import route
from octavo.server.openapi.operation import Operation

from .replies import Json, ModelCard, ModelList, ModelPermission


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    all_names = Operation(tag="OpenAI", summary="List the models.", reply=ModelList)
    one = Operation(tag="OpenAI", summary="Describe a model.", reply=ModelCard)
    return [
        route("GET", "/v1/models", partial(list_models, api), all_names),
        route("GET", "/v1/models/{name:path}", partial(get_model, api), one),  # names of hub models have a slash
    ]


async def list_models(api: Api, _: Request) -> Response:
    """Answer with all names that requests may use: of models, their aliases, and splits."""
    return Json(ModelList(data=[_card(api, name) for name in api.fleet.names()]))


async def get_model(api: Api, request: Request) -> Response:
    """Answer with one of them. Raises UnknownModel."""
    name = request.path_params["name"]
    api.fleet.resolve(name)
    return Json(_card(api, name))


def _card(api: Api, name: str) -> ModelCard:
    card = ModelCard(
        id=name,
        created=api.started,
        root=None,
        permission=[ModelPermission(id=f"modelperm-{name}", created=api.started)],
    )
    if (model := api.fleet.names()[name]) is None:
        card.shares = dict(api.fleet.shares(name))
        return card
    card.root, card.state = model.spec.config.model, model.state
    card.max_model_len = model.llm.info.max_model_len if model.was_loaded else None
    if name == model.name:
        card.aliases = list(model.spec.handling.aliases)
    else:
        card.parent = model.name
    return card
