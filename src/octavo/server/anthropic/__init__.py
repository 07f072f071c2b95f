"""Anthropic's API: POST /v1/messages and /v1/messages/count_tokens."""

from .routes import routes

__all__ = ["routes"]
