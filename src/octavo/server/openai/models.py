"""GET /v1/models and /v1/models/{name}."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.api import Api
from octavo.server.edge.dispatch import route

from .replies import Json, ModelCard, ModelList, ModelPermission


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    return [
        route("GET", "/v1/models", partial(list_models, api)),
        route("GET", "/v1/models/{name:path}", partial(get_model, api)),  # names of hub models have a slash
    ]


async def list_models(api: Api, _: Request) -> Response:
    """Answer with the models that are served."""
    return Json(ModelList(data=[_card(api)]))


async def get_model(api: Api, request: Request) -> Response:
    """Answer with one model. Raises ApiError 404."""
    api.check_model(request.path_params["name"])
    return Json(_card(api))


def _card(api: Api) -> ModelCard:
    config = api.llm.config
    permission = ModelPermission(id=f"modelperm-{config.model_name}", created=api.started)
    return ModelCard(
        id=config.model_name,
        created=api.started,
        root=config.model,
        max_model_len=api.llm.info.max_model_len,
        permission=[permission],
    )
