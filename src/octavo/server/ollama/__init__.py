"""Ollama's API: /api/chat, /api/generate, /api/embed, and the routes about models."""

from starlette.routing import Route

from octavo.server.api import Api

from . import embed, generate, models


def routes(api: Api) -> list[Route]:
    """Return the routes of this family."""
    return [*generate.routes(api), *embed.routes(api), *models.routes(api)]
