"""app: engines and frontends as one application of Ray Serve."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.server.config import ServerConfig

from .autoscaling import Autoscaling
from .engine import Engine
from .frontend import Frontend
from .resources import engine_options

HEALTH_PERIOD = 2.0  # seconds between checks of a replica
DRAIN = 70.0  # seconds for an engine's requests to move or to finish
MANY = 1_000_000  # requests: frontends and engines have queues and limits of their own

Model = str | Mapping[str, Any]


def app(
    models: Model | Sequence[Model],
    autoscaling: Autoscaling | Mapping[str, Autoscaling] | None = None,
    frontends: int = 1,
    server: Mapping[str, Any] | None = None,
    engine_actor: Mapping[str, Any] | None = None,
    frontend_actor: Mapping[str, Any] | None = None,
) -> serve.Application:
    """Return an application for `serve run` or `ray.serve.run`, with all routes of `octavo serve`.

    Args:
        models: a model's name, or its settings, which are those of `LLM`; or several of them.
        autoscaling: how many engines each model has, or this by the model's name; by default one.
        frontends: HTTP servers. If one is lost, so are its connections; the others go on.
        server: settings of the HTTP server, named as the flags of `octavo serve`.
        engine_actor: ray_actor_options of engines, such as {"resources": {"big": 1}}. By default, an engine asks for as
            many CPUs as it has `threads`, or one, and with device cuda for its GPUs. With the setting `nnodes`, an
            engine is divided over so many nodes, each of which has these resources for it.
        frontend_actor: the same for frontends, which ask for no CPU by default.

    Raises:
        ConfigError: A setting is wrong.
    """
    given = [models] if isinstance(models, str | Mapping) else list(models)
    settings = [{"model": each} if isinstance(each, str) else dict(each) for each in given]
    for name in ("engines", "secret_file", "data_parallel_size", "node_rank", "master_addr", "master_port"):
        if any(name in each for each in settings):
            raise ConfigError(f"{name} must not be set with octavo.ray, which decides it")
    configs = {config.model_name: config for config in (EngineConfig.from_keywords(**each) for each in settings)}
    if len(configs) != len(settings) or not settings:
        raise ConfigError("models must be one or more models with different names; see served_model_name")
    ServerConfig(**(server or {}))
    scaling = autoscaling if isinstance(autoscaling, Mapping) else dict.fromkeys(configs, autoscaling or Autoscaling())
    if unknown := scaling.keys() - configs.keys():
        raise ConfigError(f"autoscaling names no model of the application: {', '.join(sorted(unknown))}")
    engines = {
        name: serve.deployment(
            name=f"engines of {name}".replace("/", "-"),
            autoscaling_config=scaling.get(name, Autoscaling()).for_serve(),
            **_placed(config, engine_options(config) | dict(engine_actor or {})),
            max_ongoing_requests=MANY,
            health_check_period_s=HEALTH_PERIOD,
            graceful_shutdown_timeout_s=DRAIN,
            logging_config={"enable_access_log": False},  # of calls between frontends and engines
        )(Engine).bind(own | {"served_model_name": name})
        for (name, config), own in zip(configs.items(), settings, strict=True)
    }
    frontend = serve.deployment(
        name="frontends",
        num_replicas=frontends,
        max_ongoing_requests=MANY,
        health_check_period_s=HEALTH_PERIOD,
        ray_actor_options={"num_cpus": 0} | dict(frontend_actor or {}),
    )(serve.ingress()(Frontend))
    shared = {name: _of_frontend(config) for name, config in configs.items()}
    handles = {f"engines_{number}": engine for number, engine in enumerate(engines.values())}
    return frontend.bind(shared, dict(server or {}), **handles)


def _placed(config: EngineConfig, actor: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a deployment that place its engines, and the further nodes of each."""
    if config.nnodes == 1:
        return {"ray_actor_options": actor}
    bundle = {"CPU": actor["num_cpus"], **actor.get("resources", {})}
    return {
        "ray_actor_options": actor,
        "placement_group_bundles": [bundle] * config.nnodes,
        "placement_group_strategy": "STRICT_SPREAD",
    }


def _of_frontend(config: EngineConfig) -> dict[str, Any]:
    """Return the settings that concern a frontend: all but those of the engine's place."""
    placed = ("engines", "secret_file", "threads", "data_parallel_size", "nnodes", "kv_disk", "trace")
    defaults = EngineConfig(model=config.model)
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if field.name not in placed and (value := getattr(config, field.name)) != getattr(defaults, field.name)
    } | {"model": config.model_name, "served_model_name": config.model_name}
