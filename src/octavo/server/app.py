"""Assembles the server's ASGI application from its route families."""

import time
from collections.abc import Callable, Collection
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Scope

from octavo.fleet.fleet import Fleet

from . import admin, anthropic, models_admin, ollama, worker_info
from .api import Api
from .batch.service import BatchService
from .config import ServerConfig
from .database import DATABASE, Database
from .edge.authentication import Authentication
from .edge.body import BodyReader
from .edge.dispatch import Dispatcher
from .edge.traffic import Traffic
from .openai import (
    batches,
    chat,
    completions,
    decisions,
    embeddings,
    files,
    kv_states,
    models,
    render,
    responses,
    scores,
    tokenize,
)
from .openapi.pages import documented


def create_app(
    fleet: Fleet, config: ServerConfig | None = None, draining: Callable[[], bool] = lambda: False
) -> Dispatcher:
    """Return the ASGI application that serves `fleet`, whose models must be started already.

    Args:
        config: settings; defaults if None.
        draining: returns whether the server is shutting down, for GET /ready.
    """
    config = config or ServerConfig()
    folder = Path(config.data_dir) if config.data_dir else None
    database = Database(folder / DATABASE if folder else None)
    api = Api(fleet, config, BodyReader(config), int(time.time()), draining, database)
    openai = (chat, completions, responses, embeddings, scores, decisions, models, render, tokenize, kv_states)
    families = (*openai, anthropic, ollama, admin, models_admin, worker_info)
    traffic = Traffic()
    service = BatchService(folder, database, config, traffic) if folder else None
    routes = [route for family in families for route in family.routes(api)]
    routes += [*files.routes(service, config, api.bodies), *batches.routes(service, config, api.bodies)]
    on_end = None
    if config.enable_metrics:
        from . import metrics  # imported late, as most servers that start do not need it

        fleet.enable_metrics()
        http = metrics.HttpMeter()
        routes += metrics.routes(metrics.Exporter(fleet, http))
        on_end = http.ended
    paths: Collection[str] = ()
    if config.page:
        from . import page

        routes += page.routes(api)
        paths = page.PATHS
    described = documented(routes, fleet.default.name)
    app = Dispatcher(described, config.allowed_origins, traffic, _authentication(config, paths), on_end)
    if service:
        service.start(app)
    return app


def _authentication(config: ServerConfig, page: Collection[str]) -> Authentication | None:
    """Return what checks the API keys of requests; None if the server has no keys. Raises ConfigError.

    Args:
        page: the paths of the page's files.
    """
    if not config.has_keys:
        return None

    from octavo.tenants.key_ring import KeyRing  # imported late, with YAML

    def admit_operator(scope: Scope) -> None:
        models_admin.check_key(config.admin_key, Headers(scope=scope))

    ring = KeyRing(config.api_key or (), Path(config.keys) if config.keys else None)
    return Authentication(ring, admit_operator, also_open=page)
