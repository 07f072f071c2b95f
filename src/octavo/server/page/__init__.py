"""The page at `/`: chat, live view and models, as static files (docs/page.md)."""

from .routes import PATHS, routes

__all__ = ["PATHS", "routes"]
