"""Assembles the server's ASGI application from its route families."""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import Scope

from octavo.errors import ConfigError
from octavo.fleet.fleet import Fleet

from . import admin, anthropic, models_admin, ollama, worker_info
from .api import Api
from .batch.service import BatchService
from .config import ServerConfig
from .database import DATABASE, Database
from .edge.body import BodyReader
from .edge.dispatch import Dispatcher
from .edge.hosts import host_check
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

if TYPE_CHECKING:
    from octavo.tenants.limiter import Limiter

    from .audit import AuditLog
    from .edge.authentication import Authentication


def create_app(
    fleet: Fleet,
    config: ServerConfig | None = None,
    draining: Callable[[], bool] = lambda: False,
    audit: "AuditLog | None" = None,
) -> Dispatcher:
    """Return the ASGI application that serves `fleet`, whose models must be started already.

    Args:
        config: settings; defaults if None.
        draining: returns whether the server is shutting down, for GET /ready.
        audit: the audit log, if there is one.
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
    authentication = _authentication(config, database, traffic, paths)
    if authentication is not None:
        from . import keys_admin

        routes += keys_admin.routes(config, authentication)
    described = documented(routes, fleet.default.name)
    hosts = host_check(config)
    app = Dispatcher(described, config.allowed_origins, traffic, authentication, hosts, on_end, audit)
    if service:
        service.start(app)
    return app


def _authentication(
    config: ServerConfig, database: Database, traffic: Traffic, page: Collection[str]
) -> "Authentication | None":
    """Return what checks the API keys of requests; None if the server has no keys. Raises ConfigError.

    Args:
        page: the paths of the page's files.
    """
    if not config.has_keys:
        return None

    from octavo.tenants.key_ring import KeyRing  # imported late, with YAML

    from .edge.authentication import Authentication
    from .edge.key_use import KeyLimits

    def admit_operator(scope: Scope) -> None:
        models_admin.check_key(config.admin_key, Headers(scope=scope))

    ring = KeyRing(config.api_key or (), Path(config.keys) if config.keys else None)
    limits = KeyLimits(_limiter(config, database), config.rate_limit_mode == "queue", traffic)
    return Authentication(ring, admit_operator, limits, also_open=page)


def _limiter(config: ServerConfig, database: Database) -> "Limiter":
    """Return what counts requests and tokens: in Redis, in this process, or there and on disk. Raises ConfigError."""
    if config.rate_limit_store:
        try:
            from octavo.tenants.redis_limiter import RedisLimiter
        except ImportError:
            raise ConfigError("rate_limit_store needs the package redis: pip install 'octavo[redis]'") from None
        return RedisLimiter(config.rate_limit_store)

    from octavo.tenants.local_limiter import LocalLimiter

    limiter = LocalLimiter()
    if database.is_on_disk:
        from octavo.tenants.usage_journal import UsageJournal

        UsageJournal(database, limiter)
    return limiter
