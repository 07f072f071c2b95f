"""Ollama's API: /api/chat, /api/generate, and the routes about models."""

from starlette.routing import Route

from octavo.server.api import Api

from . import generate, models


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    return [*generate.routes(api), *models.routes(api)]
