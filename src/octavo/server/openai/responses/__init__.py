"""OpenAI's Responses API: /v1/responses."""

from .routes import routes

__all__ = ["routes"]
